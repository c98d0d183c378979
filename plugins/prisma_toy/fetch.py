"""Published toys by where they are: a file, or a repository of the hub and a checkpoint in it."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from prisma_core import InputError, LoadError, UnknownName, hub
from prisma_core.errors import suggest
from prisma_core.files import read_checkpoint
from prisma_core.preprocess import Preprocess
from prisma_core.sources import Loaded
from prisma_toy.published import Options, PublishedViT, published

PREFIX = "published/"
ENDINGS = (".pth", ".pt", ".safetensors")


def is_published(rest: str) -> bool:
    """Whether a reference is a file or a repository, not the name of a model in the package."""
    return rest.startswith(PREFIX) or rest.endswith(ENDINGS)


def load(
    rest: str,
    *,
    pretrained: bool = True,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    **options: Any,
) -> Loaded:
    """Return a published toy.

    Args:
        rest: ``FILE.pth``, ``published/OWNER/NAME`` (the checkpoint after the most pictures) or
            ``published/OWNER/NAME@FILE.pth``.
        pretrained: False draws the weights at random; the shapes are those of a file that is here already.
        mean, std: of the pictures it was trained on, per channel, which no file says; without them there is no
            ``preprocess``.
        options: fields of ``Options``.

    Raises:
        InputError: no such option, or a value that does not go with the file.
        UnknownName: no such repository.
        LoadError: it cannot be reached or read, or holds something else.
    """
    names = [field.name for field in fields(Options)]
    for name in options:
        if name not in names:
            raise InputError(f"No option {name!r}.{suggest(name, names)} There are {', '.join(names)}, mean and std.")
    path = _on_the_hub(rest, download=pretrained) if rest.startswith(PREFIX) else Path(rest)
    model = published(read_checkpoint(path), Options(**options), path)
    if not pretrained:
        model = PublishedViT({name: tensor.shape for name, tensor in model.state_dict().items()}, Options(**options))
    return Loaded(model.eval(), _preprocess(model, mean, std))


def _preprocess(
    model: PublishedViT, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> Preprocess | None:
    if mean is None and std is None:
        return None
    proj = model.embed.proj
    for values in (mean, std):
        if values is None or len(values) != proj.in_channels:
            raise InputError(f"Expected mean and std, {proj.in_channels} numbers each, got mean={mean}, std={std}.")
    assert mean is not None
    assert std is not None
    size = (model.side * proj.kernel_size[0], model.side * proj.kernel_size[1])
    return Preprocess(size=size, resize="squash", interpolation="bilinear", mean=mean, std=std)


def _on_the_hub(rest: str, *, download: bool) -> Path:
    """Return a checkpoint of a repository, from the hub's cache where it lies there.

    Raises:
        UnknownName: no such repository, or no such file in it.
        LoadError: the hub cannot be reached, or nothing may be downloaded.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise LoadError(f'toy:{rest} is on the hub, which needs its library: pip install "prisma-interp[toy]"')
    reference = f"toy:{rest}"
    repository, _, file = rest.removeprefix(PREFIX).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UnknownName(f"{reference}: expected toy:{PREFIX}OWNER/NAME, or toy:{PREFIX}OWNER/NAME@FILE.pth.")
    if not download:
        kept = hub.cached(repository, [file]) if file else None
        if kept is None:
            raise LoadError(
                f"The shapes of {reference} are in its file alone: without pretrained=False it is downloaded, and "
                f"{reference.partition('@')[0]}@FILE.pth is found in the cache."
            )
        return kept
    return hub.fetch(repository, [file or _last(repository, reference)], reference=reference)


def _last(repository: str, reference: str) -> str:
    """Return the checkpoint after the most pictures: the project numbers them."""
    from huggingface_hub import HfApi

    hub.reach(reference, instead=f"{reference}@FILE.pth is found in the cache; a local file needs no network.")
    listing = partial(HfApi().list_repo_files, repository)
    found = [name for name in hub.asking(reference, listing) if name.endswith(ENDINGS)]
    if not found:
        raise UnknownName(f"{reference}: no {', '.join(ENDINGS)} file in it.")
    return max(found, key=lambda name: ([int(number) for number in re.findall(r"\d+", Path(name).stem)], name))
