"""Load, adapt and export models."""

from __future__ import annotations

import difflib
import os
import re
import traceback
import warnings
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from prisma_core.contract.adapter import Adapter, MapAdapter
from prisma_core.contract.source import Loaded, Reference, Source
from prisma_core.errors import (
    InputError,
    LoadError,
    PluginError,
    SpecError,
    UnknownName,
    UnsupportedArchitecture,
    blaming,
    describe,
    format_fields,
    qualified_name,
    returned,
)
from prisma_core.errors.arguments import check_flags, device_of, dtype_of, expect, path_of, several, shown
from prisma_core.errors.migration import check_keywords, keywords
from prisma_core.files.checkpoint import check_finite, check_merged
from prisma_core.hooks.model import HookedModel
from prisma_core.host import flaw_of, installed
from prisma_core.maps.places import HookMap
from prisma_core.maps.reader import Reader
from prisma_core.maps.weights import WeightMap
from prisma_core.model import Origin, ZooModel, assign, tensors_of
from prisma_core.saving.folder import load_folder, with_own_stem
from prisma_core.spec import AnySpec, DualSpec, MapSpec, ModelSpec, TextSpec
from prisma_core.toolbox.settings import guest
from prisma_core.toolbox.tables import check_rows
from prisma_core.transformer import HookedDual, HookedText, build
from prisma_core.transformer.names import optional_hook_names
from prisma_core.upstream.copies import copy_module
from prisma_core.upstream.model import HookedUpstream
from prisma_core.upstream.replaced import name_of
from prisma_core.upstream.undeclared import check_at_hand, check_counted, check_undeclared, unwrapped


@contextmanager
def _normal_mode() -> Generator[None]:
    """Leave ``torch.inference_mode()``: tensors made in it can take no gradients, ever."""
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        yield


@_normal_mode()
def load(
    reference: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> HookedModel:
    """Load the model of a reference, hooked.

    >>> model = load("timm:vit_tiny_patch16_224", pretrained=False)

    Args:
        reference: ``source:rest``, such as ``timm:vit_base_patch16_224``; or ``file:FOLDER`` written by ``save``, for
            which the folder's path stands too.
        device: of the weights.
        dtype: of the weights; the default is upstream's own.
        options: passed to the source, such as ``pretrained=False``.

    Raises:
        UnknownName: no such source or model; the nearest are suggested.
        LoadError: the weights cannot be read or reached.
        PluginError: the source's library is not installed.
        UnsupportedArchitecture: the model has something the canonical transformer cannot represent.
        InputError: no reference, device or floating point dtype.
    """
    place, kind = device_of(device), dtype_of(dtype)
    source, rest = reference_of(reference)
    reference = f"{source}:{rest}"
    if options.get("pretrained", True):
        check_merged(Path(rest).expanduser())
    if source == "file":
        check_keywords("file:", options, ())
        model = load_folder(path_of(rest))
    else:
        loaded = load_upstream(installed().source(source), rest, **options)
        model = loaded.model if isinstance(loaded.model, HookedModel) else _adapt(loaded.model, None, copy=False)
        if isinstance(model, ZooModel):
            model.preprocess = loaded.preprocess or model.preprocess
            model.labels = _labels(model, loaded) or model.labels
            model.reference = reference
        check_finite(dict(model.named_parameters()), reference)
        if isinstance(model, HookedDual | HookedText):
            model.tokenizer = loaded.tokenizer or model.tokenizer
    try:
        return model.to(device=place, dtype=kind)
    except (RuntimeError, TypeError) as error:  # too little memory, or a dtype that the device does not have
        raise LoadError(f"{reference} cannot be put on device={device}, dtype={dtype}: {error}") from error


def reference_of(text: str | Path) -> Reference:
    """Read a reference; a path is that of a folder written by ``save``.

    >>> reference_of("timm:vit_base_patch16_224")
    Reference(source='timm', rest='vit_base_patch16_224')

    Raises:
        UnknownName: it has no source; references that it may mean are suggested.
        InputError: it is no text.
    """
    what = "a reference such as 'timm:vit_base_patch16_224', or a path (prisma.adapt takes a model)"
    value = f"file:{text}" if isinstance(text, Path) else expect(text, str, what).strip()
    name, colon, rest = (part.strip() for part in value.partition(":"))
    if name == "file":
        rest = os.path.expanduser(rest)
    file = rest if name == "file" else os.path.expanduser(value)
    if os.path.isfile(file):  # unlike Path's, False for a name too long
        raise UnknownName(
            f"{file} is a file. A folder that prisma.save wrote stands by itself; a file of weights goes with the "
            f"model it is of, as in timm:vit_base_patch16_224@{file}."
        )
    if "://" in value and name != "file":
        page = re.search(r"//(?:www\.)?huggingface\.co/([^/]+/[^/?#]+)", value)
        hint = f" Did you mean hf:{page[1]}?" if page else ""
        raise UnknownName(f"{value!r} is an address, and not a reference: expected SOURCE:MODEL.{hint}")
    if colon and name and rest:
        return Reference(name, rest)
    near = [f"file:{value}"] if os.path.isdir(file) else [] if colon else _near(value)
    lost = f" There is nothing at {file}." if value.startswith((".", "~", "/")) else ""
    hint = f" Did you mean {' or '.join(near)}?" if near else lost
    raise UnknownName(
        f"{value!r} is not a reference: expected SOURCE:MODEL, such as timm:vit_base_patch16_224.{hint} "
        "`prisma models` lists them."
    )


def _near(text: str) -> list[str]:
    """References that a text without a source may mean."""
    if text.startswith((".", "~", "/")):  # a path, where nothing is
        return []
    sources = installed().sources().items()
    unlisted = [f"{name}:{text}" for name, one in sources if one.unlisted and re.fullmatch(one.unlisted, text)]
    models = installed().models()
    near = difflib.get_close_matches(text, dict.fromkeys(info.rest for info in models), n=3, cutoff=0.6)
    return unlisted + [info.reference for rest in near for info in models if info.rest == rest]


def adapt(upstream: nn.Module, *, adapter: Adapter | None = None, copy: bool = True) -> ZooModel:
    """Hook a model: the result computes what ``upstream`` computes in evaluation.

    In training mode (``model.train()``) a canonical form computes the same: it has no dropout and no stochastic depth.
    A hooked upstream draws as upstream does.

    >>> model = adapt(timm.create_model("vit_tiny_patch16_224"))

    It has the preprocessing and the labels that the library has put on the model (timm, transformers, open_clip).

    Args:
        upstream: a model of a type some installed plugin adapts, or one in ``torch.compile`` or ``DataParallel``. It is
            never changed.
        adapter: one whose ``types`` name the model's, to use instead of the installed one.
        copy: False shares its weights: what trains or edits one model does so with the other. Those that upstream holds
            in another form are copies; a warning says so, and ``model.origin.copied`` lists them with the reason.

    Raises:
        UnsupportedArchitecture: it has something the canonical transformer cannot represent.
        WeightMapError: its tensors do not account for the canonical ones.
        UnknownName: its hook map names a hook point that no model has.
        PluginError: the adapter failed.
        InputError: it is no model; or the adapter is none, or does not take this type.
    """
    check_flags(copy=copy)
    model = _adapt(upstream, adapter, copy=copy)
    if not copy and model.origin is not None and (copied := model.origin.copied):
        names, n = list(copied), len(tensors_of(model))
        warnings.warn(
            f"copy=False: {len(names)} of {n} tensors are copies, which do not follow upstream's, for it holds them in "
            f"another form: {copied[names[0]]}{', ...' if len(names) > 1 else ''}. model.origin.copied lists them.",
            stacklevel=2,
        )
    return model


def _adapt(upstream: nn.Module, adapter: Adapter | None, *, copy: bool) -> ZooModel:
    model = cast("object", upstream)
    if not isinstance(model, nn.Module):
        raise InputError(f"adapt takes a model, got {type(model).__name__}. prisma.load takes a reference.")
    model = unwrapped(model)
    if adapter is None:
        adapter = installed().adapter(model)
    elif not isinstance(cast("object", adapter), Adapter):
        raise InputError(f"adapter= takes an Adapter, such as MyAdapter(); got {describe(adapter)}.")
    elif flaw := flaw_of(adapter, (Adapter,)):
        raise InputError(f"{flaw.lstrip(': ')}.")
    elif (kind := qualified_name(model)) not in adapter.types:
        raise InputError(
            f"{type(adapter).__name__} adapts {', '.join(adapter.types) or 'no type'}; this model is a {kind}. Give an "
            "adapter whose types name it, or none for the installed one."
        )
    hooked = adapt_with(adapter, model, copy=copy)
    if source := installed().source_of(model):
        with blaming(source):
            description = returned(source.describe, source.describe(model), Loaded)
        if description.preprocess is not None and not hooked.preprocess:
            hooked.preprocess = description.preprocess
        hooked.labels = hooked.labels or _labels(hooked, description)
    return hooked


def _labels(model: ZooModel, loaded: Loaded) -> tuple[str, ...] | None:
    """Return the class names that a library knows; None for a head of another number of classes: it was replaced."""
    n = getattr(model.spec, "n_classes", None)
    labels = several(loaded.labels, "labels, a text for each class") if loaded.labels else None
    return tuple(labels) if labels and n in (None, len(labels)) else None


@_normal_mode()
def adapt_with(adapter: Adapter, upstream: nn.Module, *, copy: bool = True) -> ZooModel:
    """Hook a model with an adapter, whatever its ``types``; see ``adapt``."""
    check_at_hand(upstream)
    reader = Reader(upstream)
    spec, hooks, table, stem = read_adapter(adapter, reader)
    if isinstance(spec, MapSpec):
        hooked = HookedUpstream(copy_module(upstream, copy=copy), hooks, spec, partial(output_of, adapter))
        check_counted(upstream, hooked.counted, adapter.types)
        return hooked
    with blaming(adapter):
        adapters = (adapter, *adapter.parts(reader))
        types = [name for each in adapters for name in each.types]
        ignored = [name for each in adapters for name in each.ignored]
    check_undeclared(reader, spec, types, ignored, table, stem)
    with torch.device("meta"):
        model = build(spec)
    if stem is not None:
        for tower in with_own_stem(model):
            tower.embed.stem = copy_module(stem, copy=True)
    check_rows(hooks, model.hook_points(), optional_hook_names(model))
    theirs = tensors_of(upstream)
    with torch.enable_grad():  # a tensor made of a trainable one is trainable, whatever mode the caller is in
        tensors = table.forward(theirs, {name: tensor.shape for name, tensor in tensors_of(model).items()})
    shared = {tensor.untyped_storage().data_ptr() for tensor in theirs.values()} if copy else set[int]()
    places: set[tuple[int, torch.Size]] = set()
    for name, tensor in tensors.items():  # one upstream tensor may make several: each is to be edited on its own
        place = (tensor.data_ptr(), tensor.shape)
        if place in places or tensor.untyped_storage().data_ptr() in shared:
            tensors[name] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        places.add(place)
    assign(model, tensors)
    model.origin = Origin.of(qualified_name(upstream), table, theirs, upstream.state_dict(), tensors)
    return model.eval()


def export(model: ZooModel) -> dict[str, Tensor]:
    """Write the model's present weights as upstream's own state dict: the weight map run backwards.

    >>> upstream.load_state_dict(export(adapt(upstream)))
    <All keys matched successfully>

    Raises:
        LoadError: the model was not adapted from an upstream one.
        NotApplicable: the model does something that no weights say.
        WeightMapError: weights were edited in a way upstream has no tensor for.
    """
    return expect(model, ZooModel, "a model, as prisma.load or prisma.adapt returns").export()


# ------------------------------------------------------------ calls of plugins' code


def load_upstream(source: Source, rest: str, **options: Any) -> Loaded:
    """Load a model from a source.

    Raises:
        InputError: the source, or the library behind it, takes no such option.
        PluginError: the source failed.
    """
    check_keywords(f"{source.name}:", options, keywords(source.load))
    try:
        with guest(qualified_name(source)), blaming(source):
            loaded = source.load(rest, **options)
    except PluginError as error:
        problem = error.__cause__
        if options and isinstance(problem, TypeError) and "unexpected keyword argument" in str(problem):
            raise InputError(  # of the library's constructor, not of ours
                f"{source.name}:{rest} takes no such option (given: {', '.join(options)}): {problem}."
            ) from problem
        raise
    loaded = returned(source.load, loaded, Loaded)
    returned(source.load, loaded.model, nn.Module)
    return loaded


class Reading(NamedTuple):
    """An adapter's answers about one upstream module; those of a ``MapAdapter`` have a ``MapSpec`` and no weights."""

    spec: AnySpec | MapSpec
    hooks: HookMap
    weights: WeightMap = WeightMap(())
    stem: nn.Module | None = None


def read_adapter(adapter: Adapter, upstream: Reader) -> Reading:
    """Ask an adapter for everything about a module, with one reader; it raises what ``spec_of`` does."""
    spec = spec_of(adapter, upstream)
    with _reading(adapter):
        if isinstance(spec, MapSpec):
            return Reading(spec, returned(adapter.hooks, adapter.hooks(upstream, cast("Any", spec)), HookMap))
        stem = returned(adapter.stem, adapter.stem(upstream, spec), (nn.Module, type(None)))
        weights = returned(adapter.weights, adapter.weights(upstream, spec), WeightMap)
        hooks = returned(adapter.hooks, adapter.hooks(upstream, spec), HookMap)
    return Reading(spec, hooks, weights, stem)


def spec_of(adapter: Adapter, upstream: Reader) -> AnySpec | MapSpec:
    """Ask an adapter for a module's spec.

    Raises:
        UnsupportedArchitecture: facts that no spec can hold.
        PluginError: the adapter failed, or a spec lacks a field or has one that there is not.
    """
    kinds = (MapSpec,) if isinstance(adapter, MapAdapter) else (ModelSpec, TextSpec, DualSpec)
    try:
        with _reading(adapter):
            return returned(adapter.spec, adapter.spec(upstream), kinds)
    except PluginError as error:
        cause = error.__cause__
        problem = cause.__cause__ if isinstance(cause, SpecError) else cause
        names = ("missing", "extra_forbidden")  # of fields: the adapter's mistake; values are the model's
        if cause is None or not isinstance(problem, ValidationError):
            raise
        if any(one["type"] in names for one in problem.errors()):
            raise
        kind = qualified_name(upstream.module)
        facts = f"facts that no spec can hold ({format_fields(problem)}){_place(cause)}"
        raise UnsupportedArchitecture(kind, facts) from problem


@contextmanager
def _reading(adapter: Adapter) -> Generator[None]:
    """``blaming``, with the module that the adapter read when it failed."""
    try:
        with guest(qualified_name(adapter)), blaming(adapter):
            yield
    except PluginError as error:
        problem = error.__cause__
        if isinstance(problem, AttributeError | TypeError) and (part := _no_module(problem)) is not None:
            raise part from problem
        if problem is None or not (place := _place(problem)):
            raise
        raise PluginError(f"{str(error).rstrip('.')}{place}.") from problem


def _place(problem: BaseException) -> str:
    """Say which part's facts the code wrote down wrongly, or what it had read last when it raised an error."""
    readers = _readers(problem)
    if isinstance(problem, SpecError | ValidationError):
        path = min((one.path for one in readers), key=len, default="")
        return f". It was reading {path!r}" if path else ""
    reader, name, value = _latest(readers)
    path = f"{reader.path}.{name}".lstrip(".") if name else ""
    return f". The last that it read: {path!r}, {shown(value)}" if name else ""


def _no_module(problem: BaseException) -> UnsupportedArchitecture | None:
    """Name a function that an adapter took for a part, because it stands in the place of one."""
    reader, name, value = _latest(_readers(problem))
    meant = getattr(problem, "obj", None) is value or f"'{type(value).__name__}' object" in str(problem)
    if name and meant and callable(value) and not isinstance(value, nn.Module):
        return reader.unsupported(f"a function {name} ({name_of(value)}). Put a module in its place before")
    return None


def _latest(readers: list[Reader]) -> list[Any]:
    return readers[0].latest if readers else [None, "", None]


def _readers(problem: BaseException) -> list[Reader]:
    """The readers of the innermost call that has any."""
    frames = (frame.f_locals.values() for frame, _ in traceback.walk_tb(problem.__traceback__))
    readers = [[one for one in values if isinstance(one, Reader)] for values in frames]
    return next((several for several in reversed(readers) if several), list[Reader]())


def output_of(adapter: Adapter, result: Any) -> Tensor:
    """Ask an adapter for the main output; a ``PluginError`` where it fails."""
    with blaming(adapter):
        output = adapter.output(result)
    return returned(adapter.output, output, Tensor)
