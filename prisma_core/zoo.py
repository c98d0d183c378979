"""Load, adapt, export and save models."""

from __future__ import annotations

import copy as copying
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from prisma_core.adapter import Adapter, MapAdapter, Reader, qualified_name
from prisma_core.errors import InputError, LoadError, UnknownName, UnsupportedArchitecture, WeightMapError
from prisma_core.files import check_shapes, read_safetensors
from prisma_core.hooked import Hooked
from prisma_core.keywords import check_keywords, keywords
from prisma_core.mapped import HookedUpstream, own_copy
from prisma_core.plugins import host
from prisma_core.sources import Loaded, Source
from prisma_core.spec import read_spec
from prisma_core.transformer import Canonical, HookedDual, HookedText, HookedViT, build
from prisma_core.video import read_preprocess
from prisma_core.weights import WeightMap

SPEC, WEIGHTS = "spec.json", "model.safetensors"


@dataclass
class Origin:
    """Where an adapted model came from: what ``export`` needs.

    Attributes:
        upstream: upstream's tensors by name; without data where the weight map can make them again.
        persistent: the names in upstream's state dict.
    """

    kind: str
    adapter: Adapter = field(repr=False)
    map: WeightMap = field(repr=False)
    upstream: dict[str, Tensor] = field(repr=False)
    persistent: list[str] = field(repr=False)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer of a module by name, shared ones under each name."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def load(
    reference: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> Hooked:
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
    name, rest = parted(reference)
    if name == "file":
        check_keywords("file:", options, ())
        model = load_folder(Path(rest))
    else:
        loaded = _loaded(host().source(name), rest, options)
        model = loaded.model if isinstance(loaded.model, Hooked) else adapt(loaded.model, copy=False)
        if isinstance(model, Canonical):
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
        return source.load(rest, **options)
    except TypeError as error:
        if options and "unexpected keyword argument" in str(error):  # of the library's constructor, not of ours
            raise InputError(
                f"{source.name}:{rest} takes no such option (given: {', '.join(options)}): {error}."
            ) from error
        raise


def parted(reference: str) -> tuple[str, str]:
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


def adapt(upstream: nn.Module, *, copy: bool = True) -> Canonical:
    """Return a hooked model that computes what ``upstream`` computes in evaluation.

    Args:
        upstream: a model of a type some installed plugin adapts. It is never changed.
        copy: False shares its weights wherever they need no rearranging.

    Raises:
        UnsupportedArchitecture: it has something the canonical transformer cannot represent.
        WeightMapError: its tensors do not account for the canonical ones.
    """
    given = cast("object", upstream)
    if not isinstance(given, nn.Module):
        raise InputError(f"adapt takes a model, got {type(given).__name__}. prisma.load takes a reference.")
    return adapt_with(host().adapter(upstream), upstream, copy=copy)


def adapt_with(adapter: Adapter, upstream: nn.Module, *, copy: bool = True) -> Canonical:
    """Return what ``adapt`` returns, with an adapter given by hand."""
    if isinstance(adapter, MapAdapter):
        spec, table = adapter.facts(Reader(upstream)), adapter.table(Reader(upstream))
        return HookedUpstream(own_copy(upstream, copy=copy), table, spec, adapter.output)
    spec = adapter.spec(Reader(upstream))
    stem = adapter.stem(Reader(upstream), spec)
    table = adapter.weights(Reader(upstream), spec)
    with torch.device("meta"):
        model = build(spec)
    if stem is not None:
        for tower in _with_own_stem(model):
            tower.embed.stem = copying.deepcopy(stem)
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
        adapter,
        table,
        {
            name: tensor.detach().clone() if name in needed else tensor.detach().to("meta")
            for name, tensor in tensors.items()
        },
        persistent,
    )
    return model.eval()


def _with_own_stem(model: Canonical) -> list[HookedViT]:
    towers = [tower for tower in model.towers().values() if isinstance(tower, HookedViT)]
    return [tower for tower in towers if tower.spec.embed.stem == "opaque"]


def _not_invertible(table: WeightMap, tensors: Mapping[str, Tensor]) -> set[str]:
    return {name for name in tensors if table.reason_to_ignore(name) is not None} | table.function_sources(tensors)


def assign(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the places of a model's parameters and buffers, without a copy."""
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if attribute in module._parameters:  # pyright: ignore[reportPrivateUsage]
            value = nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
            module._parameters[attribute] = value  # pyright: ignore[reportPrivateUsage]
        else:
            module._buffers[attribute] = tensor.detach()  # pyright: ignore[reportPrivateUsage]


def export(model: Canonical) -> dict[str, Tensor]:
    """Return upstream's own state dict with the model's present weights: the weight map run backwards.

    Raises:
        LoadError: the model was not adapted from an upstream one.
        WeightMapError: weights were edited in a way upstream has no tensor for.
    """
    if isinstance(model, HookedUpstream):
        return model.export()
    if model.origin is None:
        raise LoadError("This model was not adapted from an upstream one, so there is nothing to export to. Use save.")
    canonical = {name: tensor.detach() for name, tensor in tensors_of(model).items()}
    state = model.origin.map.backward(canonical, model.origin.upstream)
    fixed = {name: was for name, was in model.origin.upstream.items() if name not in set(model.origin.persistent)}
    for name, was in fixed.items():
        if not torch.equal(state[name], was.to(state[name])):
            raise WeightMapError(f"What {name} makes was changed, and upstream's state dict does not hold it.")
    return {name: state[name].contiguous() for name in model.origin.persistent}


def save(model: Canonical, folder: str | Path) -> Path:
    """Write a model's spec, preprocessing and labels (JSON) and weights (safetensors) into a folder.

    ``load("file:FOLDER")`` reads it, with no plugin and no network.

    Raises:
        UnsupportedArchitecture: the model has an opaque stem, which a spec cannot describe.
    """
    if isinstance(model, HookedUpstream):
        raise UnsupportedArchitecture(
            qualified_name(model.upstream),
            "it runs as upstream's own module, which a file of facts and weights cannot hold; keep what "
            "prisma.export(model) returns, which upstream loads",
        )
    if _with_own_stem(model):
        raise UnsupportedArchitecture(
            model.origin.kind if model.origin else "this model",
            "its stem is upstream's own module, which a file of facts and weights cannot hold; use export",
        )
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoadError(f"Expected a folder to save into, got {folder}: {error.strerror}.") from error
    facts = {
        "spec": model.spec.model_dump(mode="json"),
        "preprocess": model.preprocess.model_dump(mode="json") if model.preprocess else None,
        "labels": model.labels,
        "reference": model.reference,
        "frozen": [name for name, tensor in tensors_of(model).items() if not tensor.requires_grad],
    }
    (folder / SPEC).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    # A tensor that is part of a larger one is copied: a file holds each on its own.
    whole = {
        name: tensor.detach().clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor.detach()
        for name, tensor in tensors_of(model).items()
    }
    save_file({name: tensor.contiguous() for name, tensor in whole.items()}, folder / WEIGHTS)
    return folder


def load_folder(folder: Path, *, weights: bool = True) -> Canonical:
    """Return the model that ``save`` wrote; without ``weights`` its facts alone, on the meta device.

    Raises:
        LoadError: a file is missing, truncated, corrupt, or does not fit the others.
    """
    for name in (SPEC, WEIGHTS):
        if not (folder / name).is_file():
            inner = sorted(folder.glob(f"*/{SPEC}"), key=lambda path: path.parent.name != "model")  # a run of training
            hint = f" Did you mean file:{inner[0].parent}?" if inner else ""
            raise LoadError(f"{folder} holds no {name}: expected a folder written by prisma.save.{hint}")
    try:
        facts = cast("dict[str, Any]", json.loads((folder / SPEC).read_text(encoding="utf-8")))
        spec = read_spec(facts["spec"])
        preprocess = read_preprocess(facts["preprocess"]) if facts.get("preprocess") else None
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise LoadError(f"{folder / SPEC} does not describe a model: {error}") from error
    with torch.device("meta"):
        model = build(spec)
    if weights:
        tensors = read_safetensors(folder / WEIGHTS)
        check_shapes(tensors, {name: tensor.shape for name, tensor in tensors_of(model).items()}, folder / WEIGHTS)
        frozen = set(facts.get("frozen", ()))
        assign(model, {name: tensor.requires_grad_(name not in frozen) for name, tensor in tensors.items()})
    model.preprocess, model.labels = preprocess, tuple(facts["labels"]) if facts.get("labels") else None
    model.reference = facts.get("reference")
    return model.eval()
