"""A model in a folder: ``spec.json`` with its facts, ``model.safetensors`` with its weights, and files of processors.

``spec.json`` holds the digests of all the rest, and is replaced last: what it does not name is not there. New weights
lie beside the old ones under a name with their digest until then, and are moved into their place afterwards.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

from prisma_core.errors import InputError, LoadError, NotApplicable, UnsupportedArchitecture, qualified_name
from prisma_core.errors.arguments import expect, path_of
from prisma_core.files.atomic import beside, locked, move, place, settled, staging, writing
from prisma_core.files.checkpoint import check_shapes, digest, read_outline, read_safetensors
from prisma_core.files.texts import check_regular, read_text
from prisma_core.model import ZooModel, assign, tensors_of
from prisma_core.saving import processors
from prisma_core.saving.facts import SavedFacts, SavedProcessor, read_facts
from prisma_core.spec import AnySpec, DualSpec
from prisma_core.transformer import HookedViT, build
from prisma_core.upstream.model import HookedUpstream

SPEC, WEIGHTS, COMPANIONS = "spec.json", "model.safetensors", "companions"
_WAITING = re.compile(r"(model|tokenizer|preprocess)-[0-9a-f]{12}(\.safetensors)?")


def with_own_stem(model: ZooModel) -> list[HookedViT]:
    """Return the towers whose stem is upstream's own module."""
    towers = [tower for tower in model.towers().values() if isinstance(tower, HookedViT)]
    return [tower for tower in towers if tower.spec.embed.stem == "opaque"]


def save(model: ZooModel, folder: str | Path) -> Path:
    """Write a model's spec, preprocessing and labels (JSON) and weights (safetensors) into a folder, and return it.

    ``load("file:FOLDER")`` reads it, with no plugin and no network. A tokenizer or image processor of another library
    is written beside the weights, and needs that library again when it is used; ``save`` warns of what cannot be
    written, and the loaded model says so when it is used.

    A kill, a full disk, or another process that saves or loads at the same time leaves the model that was there before
    or the new one. Other files in the folder are left alone.

    >>> folder = prisma.save(model, "my-model")
    >>> again = prisma.load(f"file:{folder}")

    Raises:
        UnsupportedArchitecture: the model has an opaque stem, which a spec cannot describe.
        NotApplicable: the model does something that no spec says, or has no weights.
        InputError: its labels are not one text a class, its weights are not all numbers, or its parts are not those of
            its spec.
        LoadError: the disk is full, read-only, or refuses in another way.
    """
    _check_savable(expect(model, ZooModel, "a model, as prisma.load or prisma.adapt returns"))
    folder = path_of(folder, "the path of a folder")
    tensors = {name: tensor.detach() for name, tensor in tensors_of(model).items()}
    frozen = [name for name, tensor in tensors_of(model).items() if not tensor.requires_grad]
    try:
        with torch.device("meta"):
            check_shapes(tensors, tensors_of(build(model.spec)), "What its parts hold now")
    except LoadError as error:
        raise InputError(f"{error} Nothing is saved.") from error
    facts = SavedFacts.of(model, digest(tensors), frozen)
    # A tensor that is part of a larger one is copied: a file holds each on its own.
    whole = {name: x.clone() if x.untyped_storage().nbytes() > x.nbytes else x for name, x in tensors.items()}
    with writing(folder):
        _make(folder)
        with locked(folder.resolve()), staging(folder) as fresh:
            facts = facts.model_copy(update={"companions": processors.write(model, fresh)})
            save_file({name: tensor.contiguous() for name, tensor in whole.items()}, fresh / WEIGHTS)
            (fresh / SPEC).write_text(facts.to_json(), encoding="utf-8")
            _commit(facts, fresh, folder)
    return folder


def _check_savable(model: ZooModel) -> None:
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
    if any(tensor.is_meta for tensor in tensors_of(model).values()):
        raise NotApplicable("This model has no weights to save: they are on the device meta.")
    model.warn_of_hooks()


def _make(folder: Path) -> None:
    """Make the folder, and refuse what stands where something is to be written: a ``LoadError`` says what it is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoadError(f"Expected a folder to save into, got {folder}: {error.strerror}.") from error
    for path in (folder / SPEC, folder / WEIGHTS):
        if path.is_dir() and not path.is_symlink():
            raise LoadError(f"{path} is a folder, and a file is to be written there: save into another folder.")
    home = folder / COMPANIONS
    if home.is_symlink() or (home.exists() and not home.is_dir()):
        raise LoadError(f"{home} is no folder but a file or a link, which save does not follow: move it away.")


def _commit(facts: SavedFacts, fresh: Path, folder: Path) -> None:
    """Move what was written into place: beside the old weights and processors first, then the spec, then the rest."""
    home, old = folder / COMPANIONS, _processors_of(folder)
    new = {what: str(record.sha256) for what, record in facts.companions.items() if record.source is not None}
    for what, sha256 in new.items():
        home.mkdir(exist_ok=True)
        if not beside(home, what, sha256).exists():
            move(fresh / what, beside(home, what, sha256))
    weights = beside(folder, WEIGHTS, str(facts.weights and facts.weights.sha256))
    move(fresh / WEIGHTS, weights)
    move(fresh / SPEC, folder / SPEC)
    with suppress(OSError, LoadError):  # from here on the new model is there
        weights.replace(folder / WEIGHTS)
        for what, record in old.items():
            if (home / what).is_dir() and record.sha256 in (None, processors.digest(home / what)):
                shutil.rmtree(home / what)
        for what, sha256 in new.items():
            if not (home / what).exists():
                beside(home, what, sha256).replace(home / what)
        _sweep(folder, home, {beside(home, what, sha256) for what, sha256 in new.items()})


def _processors_of(folder: Path) -> Mapping[Any, SavedProcessor]:
    """Return the processors that a folder's spec names: these folders are Prisma's own."""
    try:
        return read_facts(_text(folder), folder / SPEC).companions
    except LoadError:
        return {}


def _sweep(folder: Path, home: Path, used: set[Path]) -> None:
    """Remove what a killed ``save`` left beside its place."""
    for left in folder.glob("model-*"):
        if _WAITING.fullmatch(left.name) and left.is_file():
            left.unlink()
    for left in home.glob("*-*"):
        if _WAITING.fullmatch(left.name) and left not in used and not left.is_symlink():
            shutil.rmtree(left)
    if home.is_dir() and not any(home.iterdir()):
        home.rmdir()


def _text(folder: Path) -> str:
    if not os.path.lexists(folder / SPEC):
        found = folder.glob(f"*/{SPEC}") if os.path.isdir(folder) else ()  # unlike Path's, False for a name too long
        inner = sorted(found, key=lambda path: path.parent.name != "model")  # a run of training
        hint = f" Did you mean file:{inner[0].parent}?" if inner else ""
        raise LoadError(f"{folder} holds no {SPEC}: expected a folder written by prisma.save.{hint}")
    return read_text(folder / SPEC)


def load_folder(folder: Path, *, weights: bool = True) -> ZooModel:
    """Return the model that ``save`` wrote; without ``weights`` its facts alone, on the meta device.

    Raises:
        LoadError: a file is missing, truncated, corrupt, or does not fit the others.
    """
    return settled(folder / SPEC, lambda: _loaded(folder, _text(folder), weights))


def _n_blocks(spec: AnySpec) -> int:
    towers = (spec.vision, spec.text) if isinstance(spec, DualSpec) else (spec,)
    return sum(block.n_parallel for tower in towers for block in tower.blocks)


def _loaded(folder: Path, text: str, weights: bool) -> ZooModel:
    facts = read_facts(text, folder / SPEC)
    sha256 = facts.weights and facts.weights.sha256
    path = place(folder, WEIGHTS, sha256)
    check_regular(path)
    if not path.is_file():
        raise LoadError(f"{folder} holds no {WEIGHTS}: expected a folder written by prisma.save.")
    n_tensors, n_blocks = len(read_outline(path)), _n_blocks(facts.spec)
    if n_blocks > n_tensors:  # each has one at least; modules are made one by one, even without numbers
        raise LoadError(f"{folder / SPEC} describes {n_blocks} blocks, and {WEIGHTS} holds {n_tensors} tensors.")
    try:
        with torch.device("meta"):
            model = build(facts.spec)
    except (ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        problem = str(error).partition("\n")[0]  # torch adds where it stood
        raise LoadError(f"{folder / SPEC} does not describe a model: {problem}") from error
    if weights:
        tensors = read_safetensors(path)
        check_shapes(tensors, tensors_of(model), path)
        if sha256 and digest(tensors) != sha256:
            raise LoadError(f"{path} holds other weights than {SPEC} was written with: save the model again.")
        if not sha256 and _text(folder) != text:  # only a digest shows what a save replaces meanwhile
            raise LoadError(f"{folder} is being saved to: try again.")
        frozen = set(facts.frozen)
        assign(model, {name: tensor.requires_grad_(name not in frozen) for name, tensor in tensors.items()})
    model.preprocess = facts.preprocess or model.preprocess
    model.labels, model.reference = facts.labels, facts.reference
    for what, processor in processors.read(facts.companions, folder / COMPANIONS).items():
        setattr(model, what, processor)
    return model.eval()
