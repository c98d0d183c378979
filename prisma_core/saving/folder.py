"""What a saved model is: facts as JSON, weights as safetensors, and files of what goes with it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from prisma_core.errors import LoadError, NotApplicable, PrismaError, UnsupportedArchitecture
from prisma_core.files.checkpoint import check_shapes, read_safetensors
from prisma_core.inputs.video import read_preprocess
from prisma_core.maps.reader import qualified_name
from prisma_core.model import Absent
from prisma_core.plugin.host import host
from prisma_core.saving.companions import Kept, Lost
from prisma_core.spec import Facts, read_spec
from prisma_core.transformer import HookedViT, ZooModel, build
from prisma_core.upstream.model import HookedUpstream

SPEC, WEIGHTS, COMPANIONS = "spec.json", "model.safetensors", "companions"


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer of a module by name, shared ones under each name."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


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


def with_own_stem(model: ZooModel) -> list[HookedViT]:
    """Return the towers whose stem is upstream's own module."""
    towers = [tower for tower in model.towers().values() if isinstance(tower, HookedViT)]
    return [tower for tower in towers if tower.spec.embed.stem == "opaque"]


def save(model: ZooModel, folder: str | Path) -> Path:
    """Write a model's spec, preprocessing and labels (JSON) and weights (safetensors) into a folder.

    ``load("file:FOLDER")`` reads it, with no plugin and no network. What goes with the model and is another library's,
    a tokenizer, is written beside it by the source that knows it, and needs that library again when it is used.
    ``save`` warns of what no source knows, and the loaded model says so when it is asked for.

    Raises:
        UnsupportedArchitecture: the model has an opaque stem, which a spec cannot describe.
        NotApplicable: the model does something that no spec says.
    """
    if isinstance(model, HookedUpstream):
        raise UnsupportedArchitecture(
            qualified_name(model.upstream),
            "it runs as upstream's own module, which a file of facts and weights cannot hold; keep what "
            "prisma.export(model) returns, which upstream loads",
        )
    if (beyond := model.unsaved_behaviour()) is not None:
        raise NotApplicable(f"This model {beyond}, which a saved file cannot hold; save the original.")
    if with_own_stem(model):
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
        "preprocess": model.preprocess.model_dump(mode="json") if isinstance(model.preprocess, Facts) else None,
        "labels": model.labels,
        "reference": model.reference,
        "frozen": [name for name, tensor in tensors_of(model).items() if not tensor.requires_grad],
        "companions": _keep_companions(model, folder / COMPANIONS),
    }
    (folder / SPEC).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    # A tensor that is part of a larger one is copied: a file holds each on its own.
    whole = {
        name: tensor.detach().clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor.detach()
        for name, tensor in tensors_of(model).items()
    }
    save_file({name: tensor.contiguous() for name, tensor in whole.items()}, folder / WEIGHTS)
    return folder


def load_folder(folder: Path, *, weights: bool = True) -> ZooModel:
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
        with torch.device("meta"):
            model = build(spec)
        companions = _companions(model, dict(facts.get("companions") or {}), folder / COMPANIONS)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise LoadError(f"{folder / SPEC} does not describe a model: {error}") from error
    if weights:
        tensors = read_safetensors(folder / WEIGHTS)
        check_shapes(tensors, {name: tensor.shape for name, tensor in tensors_of(model).items()}, folder / WEIGHTS)
        frozen = set(facts.get("frozen", ()))
        assign(model, {name: tensor.requires_grad_(name not in frozen) for name, tensor in tensors.items()})
    model.preprocess = preprocess or model.preprocess
    model.labels = tuple(facts["labels"]) if facts.get("labels") else None
    model.reference = facts.get("reference")
    for what, companion in companions.items():
        setattr(model, what, companion)
    return model.eval()


# -------------------------------------------------------------------- what goes with a model


def _keep_companions(model: ZooModel, home: Path) -> dict[str, dict[str, str]]:
    """Write a model's companions, each into a folder named after it; return who can read each, or why none can."""
    records: dict[str, dict[str, str]] = {}
    for what, tried in model.companions().items():
        companion: Any = getattr(model, what)
        if companion is None or isinstance(companion, Absent | Facts):  # data goes into the JSON
            continue
        try:
            if isinstance(companion, Lost):
                raise LoadError(companion.why)
            records[what] = {"source": _keep(companion, tried, home / what)}
        except Exception as error:  # noqa: BLE001  # another library's code, or the user's; the weights are saved all the same
            told = str(error) if isinstance(error, PrismaError) else f"{type(error).__name__}: {error}"
            records[what] = {"lost": told.rstrip(".")}
            warnings.warn(f"The {what} is not saved with the model: {told.rstrip('.')}.", stacklevel=3)
    for folder in home.glob("*"):
        if "source" not in records.get(folder.name, {}):
            shutil.rmtree(folder)  # of a model that was saved here before
    if home.is_dir() and not any(home.iterdir()):
        home.rmdir()
    return records


def _keep(companion: Any, tried: Callable[[Any], Tensor], folder: Path) -> str:
    """Write a companion into a folder, and return the name of the source that reads it.

    Raises:
        PrismaError: no source does, or what it reads does something else.
    """
    fresh = folder.with_name(f"{folder.name}.new")  # the old folder may be where the companion lies
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        if isinstance(companion, Kept):
            companion.copy(fresh)
            source = companion.source
        else:
            source = host().keep(companion, fresh)
            if not torch.equal(tried(companion), tried(host().kept(source, fresh))):
                raise LoadError(f"the source {source!r} does not read back what it wrote")
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return source


def _made(source: str, folder: Path) -> Any:
    return host().kept(source, folder)


def _companions(model: ZooModel, records: Mapping[str, Any], home: Path) -> dict[str, Kept | Lost]:
    """Return the companions that ``_keep_companions`` wrote, none of them made yet."""
    found: dict[str, Kept | Lost] = {}
    for what in (what for what in model.companions() if what in records):
        record = records[what]
        lost = "lost" in record
        found[what] = Lost(what, str(record["lost"])) if lost else Kept(what, str(record["source"]), home / what, _made)
    return found
