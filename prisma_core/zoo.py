"""Load, adapt and export models."""

from __future__ import annotations

import copy as copying
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from prisma_core.errors import (
    InputError,
    LoadError,
    NotApplicable,
    PluginError,
    UnknownName,
    WeightMapError,
    ask,
)
from prisma_core.hooks.keywords import check_keywords, keywords
from prisma_core.hooks.model import HookedModel
from prisma_core.maps.places import HookMap
from prisma_core.maps.reader import Reader, qualified_name
from prisma_core.maps.weights import Origin, WeightMap
from prisma_core.plugin.adapter import Adapter, MapAdapter, read_spec
from prisma_core.plugin.host import host
from prisma_core.plugin.source import Loaded, Source
from prisma_core.saving.folder import SPEC, assign, load_folder, tensors_of, with_own_stem
from prisma_core.spec import DualSpec, MapSpec, ModelSpec, TextSpec
from prisma_core.transformer import HookedDual, HookedText, ZooModel, build
from prisma_core.transformer.every import lacking
from prisma_core.upstream.model import HookedUpstream, copy_module


def load(
    reference: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> HookedModel:
    """Return the model a reference names, hooked.

    Args:
        reference: ``source:rest``, such as ``timm:vit_base_patch16_224``, or ``file:FOLDER`` written by ``save``.
        device, dtype: where and as what to keep the weights.
        options: passed to the source, such as ``pretrained=False``.

    Raises:
        UnknownName: no such source or model; the nearest are suggested.
        LoadError: the weights cannot be read or reached.
        PluginError: the source's library is not installed.
        UnsupportedArchitecture: the model has something the canonical transformer cannot represent.
    """
    name, rest = split_reference(reference)
    if name == "file":
        check_keywords("file:", options, ())
        model = load_folder(Path(rest))
    else:
        loaded = _loaded(host().source(name), rest, options)
        model = loaded.model if isinstance(loaded.model, HookedModel) else adapt(loaded.model, copy=False)
        if isinstance(model, ZooModel):
            model.preprocess = loaded.preprocess or model.preprocess
            model.labels = loaded.labels or model.labels
            model.reference = reference
        if isinstance(model, HookedDual | HookedText):
            model.tokenizer = loaded.tokenizer or model.tokenizer
    if isinstance(dtype, str):
        named = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(named, torch.dtype):
            raise LoadError(f"{dtype!r} is not a dtype: expected one of torch's, such as torch.float16.")
        dtype = named
    try:
        return model.to(device=device, dtype=dtype)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch's ways to say that there is no such device
        raise LoadError(f"{reference} cannot be put on device={device}, dtype={dtype}: {error}") from error


def _loaded(source: Source, rest: str, options: dict[str, Any]) -> Loaded:
    check_keywords(f"{source.name}:", options, keywords(source.load))
    try:
        return ask(source, "load", rest, gives=Loaded, **options)
    except PluginError as error:
        problem = error.__cause__
        if options and isinstance(problem, TypeError) and "unexpected keyword argument" in str(problem):
            raise InputError(  # of the library's constructor, not of ours
                f"{source.name}:{rest} takes no such option (given: {', '.join(options)}): {problem}."
            ) from problem
        raise


def split_reference(reference: str) -> tuple[str, str]:
    """Return a reference's source and the rest.

    Raises:
        UnknownName: it has no source; references that it may mean are suggested.
        InputError: it is no text.
    """
    given = cast("object", reference)
    if not isinstance(given, str):
        raise InputError(
            f"Expected a reference such as 'timm:vit_base_patch16_224', got {type(given).__name__}. "
            "prisma.adapt takes a model."
        )
    name, colon, rest = reference.partition(":")
    if colon and name and rest:
        return name, rest
    hint = f" Did you mean file:{reference}?" if (Path(reference) / SPEC).is_file() else ""
    if not colon and not hint:
        models = {info.reference.partition(":")[2]: info.reference for info in host().models()}
        near = difflib.get_close_matches(reference, models, n=3, cutoff=0.6)
        hint = f" Did you mean {' or '.join(models[one] for one in near)}?" if near else ""
    raise UnknownName(
        f"{reference!r} is not a reference: expected SOURCE:MODEL, such as timm:vit_base_patch16_224.{hint} "
        "`prisma models` lists them."
    )


def adapt(upstream: nn.Module, *, copy: bool = True) -> ZooModel:
    """Return a hooked model that computes what ``upstream`` computes in evaluation.

    Args:
        upstream: a model of a type some installed plugin adapts. It is never changed.
        copy: False shares its weights wherever they need no rearranging.

    Raises:
        UnsupportedArchitecture: it has something the canonical transformer cannot represent.
        WeightMapError: its tensors do not account for the canonical ones.
        UnknownName: its hook map names a hook point that no model has.
        PluginError: the adapter failed.
    """
    given = cast("object", upstream)
    if not isinstance(given, nn.Module):
        raise InputError(f"adapt takes a model, got {type(given).__name__}. prisma.load takes a reference.")
    return adapt_with(host().adapter(upstream), upstream, copy=copy)


def adapt_with(adapter: Adapter, upstream: nn.Module, *, copy: bool = True) -> ZooModel:
    """Return what ``adapt`` returns, with an adapter given by hand."""
    if isinstance(adapter, MapAdapter):
        facts = read_spec(adapter, Reader(upstream), MapSpec)
        rows = ask(adapter, "table", Reader(upstream), gives=HookMap)
        return HookedUpstream(copy_module(upstream, copy=copy), rows, facts, adapter.output)
    spec = read_spec(adapter, Reader(upstream), (ModelSpec, TextSpec, DualSpec))
    stem = ask(adapter, "stem", Reader(upstream), spec, gives=(nn.Module, type(None)))
    table = ask(adapter, "weights", Reader(upstream), spec, gives=WeightMap)
    with torch.device("meta"):
        model = build(spec)
    if stem is not None:
        for tower in with_own_stem(model):
            tower.embed.stem = copying.deepcopy(stem)
    ask(adapter, "hooks", Reader(upstream), spec, gives=HookMap).check(model.hook_points(), lacking(model))
    tensors = tensors_of(upstream)
    shapes = {name: tensor.shape for name, tensor in tensors_of(model).items()}
    with torch.enable_grad():  # what is made of a trainable tensor is trainable, whatever mode the caller is in
        made = table.forward(tensors, shapes)
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in made.items():  # one upstream tensor may make several of ours: each is to be edited on its own
        if (place := (tensor.data_ptr(), tensor.shape)) in seen:
            made[name] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        seen.add(place)
    owned = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    for name, tensor in made.items():
        if copy and tensor.untyped_storage().data_ptr() in owned:
            made[name] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    assign(model, made)
    persistent = list(upstream.state_dict())
    needed = _not_invertible(table, tensors) | (set(tensors) - set(persistent))
    model.origin = Origin(
        qualified_name(upstream),
        table,
        {
            name: tensor.detach().clone() if name in needed else tensor.detach().to("meta")
            for name, tensor in tensors.items()
        },
        persistent,
    )
    return model.eval()


def _not_invertible(table: WeightMap, tensors: Mapping[str, Tensor]) -> set[str]:
    return {name for name in tensors if table.reason_to_ignore(name) is not None} | table.function_sources(tensors)


def export(model: ZooModel) -> dict[str, Tensor]:
    """Return upstream's own state dict with the model's present weights: the weight map run backwards.

    Raises:
        LoadError: the model was not adapted from an upstream one.
        NotApplicable: the model does something that no weights say.
        WeightMapError: weights were edited in a way upstream has no tensor for.
    """
    if isinstance(model, HookedUpstream):
        return model.export()
    if (beyond := model.unsaved_behaviour()) is not None:
        raise NotApplicable(f"This model {beyond}, which upstream's weights cannot hold; export the original.")
    if model.origin is None:
        raise LoadError("This model was not adapted from an upstream one, so there is nothing to export to. Use save.")
    canonical = {name: tensor.detach() for name, tensor in tensors_of(model).items()}
    state = model.origin.map.backward(canonical, model.origin.upstream)
    fixed = {name: was for name, was in model.origin.upstream.items() if name not in set(model.origin.persistent)}
    for name, was in fixed.items():
        if not torch.equal(state[name], was.to(state[name])):
            raise WeightMapError(f"What {name} makes was changed, and upstream's state dict does not hold it.")
    return {name: state[name].contiguous() for name in model.origin.persistent}
