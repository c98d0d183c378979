"""Published toys by where they are: a file, or a repository of the hub and a checkpoint in it."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prisma_core import LoadError, UnknownName
from prisma_core.plugin import Loaded, Preprocess, hub, read_checkpoint, read_options
from prisma_toy.options import Options
from prisma_toy.published import PublishedViT, published

PREFIX = "published/"
ENDINGS = (".pth", ".pt", ".safetensors")


def is_published(rest: str) -> bool:
    """Whether a reference is a file or a repository, not the name of a model in the package."""
    return rest.startswith(PREFIX) or rest.endswith(ENDINGS)


def load(rest: str, *, pretrained: bool = True, **options: Any) -> Loaded:
    """Return a published toy.

    Args:
        rest: ``FILE.pth``, ``published/OWNER/NAME`` (the checkpoint after the most images) or
            ``published/OWNER/NAME@FILE.pth``.
        pretrained: False draws the weights at random; the shapes are those of a file that is here already.
        options: fields of ``Options``; without ``mean`` and ``std``, which no file says, there is no ``preprocess``.

    Raises:
        InputError: no such option, or a value that does not go with the file.
        UnknownName: no such repository.
        LoadError: it cannot be reached or read, or holds something else.
    """
    settings = read_options(Options, "toy:", options)
    path = _on_the_hub(rest, download=pretrained) if rest.startswith(PREFIX) else Path(rest)
    model = published(read_checkpoint(path, settings.key), settings, path)
    if not pretrained:
        model = PublishedViT({name: tensor.shape for name, tensor in model.state_dict().items()}, settings)
    proj = model.embed.proj
    if (pixels := settings.normalisation(path, proj.in_channels)) is None:
        return Loaded(model.eval())
    size = (model.side * proj.kernel_size[0], model.side * proj.kernel_size[1])
    facts = Preprocess(size=size, resize="squash", interpolation="bilinear", mean=pixels[0], std=pixels[1])
    return Loaded(model.eval(), facts)


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
    if download:
        return hub.fetch(repository, [file or _last(repository, reference)], reference=reference)
    here = [file] if file else _here(repository)
    if not here or (kept := hub.cached(repository, [last(here)])) is None:
        raise LoadError(
            f"The shapes of {reference} are in its file alone, and the cache has none: without pretrained=False it is "
            "downloaded."
        )
    return kept


def _last(repository: str, reference: str) -> str:
    """Return the last checkpoint on the hub; of those in its cache, where it cannot be reached.

    Raises:
        UnknownName: no such repository, or no checkpoint in it.
        LoadError: the hub cannot be reached, and the cache has none.
    """
    from huggingface_hub import HfApi

    try:
        hub.reach(reference, instead=f"{reference}@FILE.pth is found in the cache; a local file needs no network.")
    except LoadError as error:
        if not (here := _here(repository)):
            raise
        warnings.warn(f"{error} Of what the cache has, {last(here)} is taken; there may be later ones.", stacklevel=2)
        return last(here)
    listing = partial(HfApi().list_repo_files, repository)
    files = [name for name in hub.asking(reference, listing) if name.endswith(ENDINGS)]
    if not files:
        raise UnknownName(f"{reference}: no {', '.join(ENDINGS)} file in it.")
    return last(files)


def _here(repository: str) -> list[str]:
    """Return the checkpoints of a repository that lie in the hub's cache."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(repository, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        return []
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name.endswith(ENDINGS)]


def last(names: Sequence[str]) -> str:
    """Return the checkpoint after the most images: the project numbers them."""
    return max(names, key=lambda name: ([int(number) for number in re.findall(r"\d+", Path(name).stem)], name))
