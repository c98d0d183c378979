"""The catalogue of published vision coders: what each belongs to, where it lies, and what it was measured at.

``catalogue.csv`` beside this file has a line for each; its ``source`` column says where figures are from. Losses of
CLIP's coders were published without the logit scale, and stand in the columns ``..._no_scale``.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from prisma_core import InputError, LoadError, UnknownName
from prisma_core.plugin import Facts, checked, hub, path_of, suggest
from prisma_sae.coder import Kind, SparseCoder, Tokens
from prisma_sae.formats import read

TABLE = Path(__file__).parent / "catalogue.csv"
BUNDLED = Path(__file__).parent / "weights"
_FIGURES = ("l0", "l0_cls", "explained_variance", "cosine", "dead")
_LOSSES = tuple(f"loss{part}{scale}" for scale in ("", "_no_scale") for part in ("", "_spliced", "_zero", "_recovered"))


class Entry(Facts):
    """A published coder.

    Attributes:
        name: its name here.
        model, also: the reference of its model, and others of the same weights.
        hook, hook_out, tokens: where it belongs; None where its files and cards do not say.
        kind, k, d_in, d_sae: what it is.
        normalize: what is done to its input; empty where only its file says.
        format: the reader of its file.
        repository: on the hub; empty for one in this package.
        files: the file, the one to prefer first; none where the repository holds several.
        figures: what it was published with, named as ``evaluate`` names them.
        source: where the figures are from.
        note: what else one has to know.
    """

    name: str
    model: str
    also: tuple[str, ...]
    hook: str
    hook_out: str | None
    tokens: Tokens | None
    kind: Kind
    k: int | None
    d_in: int
    d_sae: int
    normalize: str
    format: str
    repository: str
    files: tuple[str, ...]
    figures: dict[str, float]
    source: str
    note: str


@cache
def catalogue() -> tuple[Entry, ...]:
    """Return all published coders that are known.

    >>> len(catalogue()) > 100
    True
    >>> [each.name for each in catalogue() if each.model == "hf:facebook/dino-vitb16"][:2]
    ['dino-b16-all-0-resid-post', 'dino-b16-all-1-resid-post']
    """
    with TABLE.open(encoding="utf-8", newline="") as file:
        return tuple(_entry(row) for row in csv.DictReader(file))


def _entry(row: dict[str, str]) -> Entry:
    figures = {name: float(row[name]) for name in (*_FIGURES, *_LOSSES) if row[name]}
    plain: dict[str, Any] = {name: row[name] for name in ("name", "model", "hook", "kind", "normalize", "format")}
    return Entry(
        **plain,
        also=tuple(row["also"].split()),
        hook_out=row["hook_out"] or None,
        tokens=row["tokens"] or None,  # type: ignore[arg-type]
        k=int(row["k"]) if row["k"] else None,
        d_in=int(row["d_in"]),
        d_sae=int(row["d_sae"]),
        repository=row["repository"],
        files=tuple(row["file"].split()),
        figures=figures,
        source=row["source"],
        note=row["note"],
    )


def entry(name: str) -> Entry:
    """Return a coder's line of the catalogue.

    Raises:
        UnknownName: there is none; the nearest are suggested.
    """
    names = [each.name for each in catalogue()]
    if name not in names:
        raise UnknownName(f"No coder {name!r} among {len(names)}.{suggest(name, names)} `prisma sae list` has all.")
    return catalogue()[names.index(name)]


@checked
def load(name: str, *, file: str | None = None, path: str | Path | None = None, **options: Any) -> SparseCoder:
    """Return a coder of the catalogue, downloaded if need be, bound to its model, place and tokens.

    What else one has to know of it, such as how its images were resized, is in ``facts.more["note"]``.

    >>> load("scenes-3l").facts.hook
    'blocks.1.hook_resid_post'

    Args:
        name: its name in the catalogue.
        file: which of several files of its repository.
        path: the file or folder on this machine, if it is here already.
        options: of the format's reader.

    Raises:
        UnknownName: no such name.
        LoadError: the file cannot be fetched or read, or is not what the catalogue says it is.
        InputError: ``file`` of a coder that comes with this package, or beside ``path``.
    """
    line = entry(name)
    if file is not None and (path is not None or not line.repository):
        raise InputError(f"file= chooses a file of a repository on the hub; leave it out here, got {file!r}.")
    place = Path(path) if path is not None else _fetched(line, file)
    asked = {"hook": line.hook} if line.format in ("vit_prisma", "saev", "overcomplete") else {}
    coder = read(place, line.format, **{**asked, **options})
    _compare(line, coder, place)
    if line.normalize == "standardize" and coder.facts.normalize != "standardize":
        raise LoadError(f"{name} {line.note}.")
    return coder.with_facts(
        model=line.model,
        also=line.also,
        hook=line.hook,
        hook_out=line.hook_out,
        tokens=line.tokens or coder.facts.tokens,
        kind=line.kind,
        figures={**coder.facts.figures, **line.figures},
        more={**coder.facts.more, **({"note": line.note} if line.note else {})},
    )


@checked
def open_coder(name: str, *, file: str | None = None) -> SparseCoder:
    """Return a coder as commands name it: a file or folder where there is one, else one of the catalogue.

    >>> open_coder("scenes-3l").facts.hook
    'blocks.1.hook_resid_post'

    Args:
        name: a path, or a name in the catalogue.
        file: which of several files of its repository; the name is then of the catalogue.

    Raises:
        UnknownName: no such name.
        InputError: it can be neither.
        LoadError: the file cannot be fetched or read.
    """
    return read(name) if file is None and path_of(name).exists() else load(name, file=file)


def _fetched(line: Entry, file: str | None) -> Path:
    if not line.repository:
        return BUNDLED / line.name
    names = (file,) if file else line.files
    if not names:
        raise LoadError(f"{line.name} is {line.note}.")
    try:
        return hub.fetch(line.repository, names, reference=line.name)
    except LoadError as error:
        raise LoadError(
            f"{error} It is {names[0]} of the repository {line.repository}: `prisma sae load {line.name}` where "
            f"there is a network, or load({line.name!r}, path=FILE) with the file brought here."
        ) from error


def _compare(line: Entry, coder: SparseCoder, place: Path) -> None:
    facts = coder.facts
    pairs = (
        ("hook", line.hook, facts.hook),
        ("hook_out", line.hook_out, facts.hook_out),
        ("tokens", line.tokens, facts.tokens),
        ("d_in", line.d_in, facts.d_in),
        ("d_sae", line.d_sae, facts.d_sae),
        ("k", line.k, facts.k if line.k is not None and line.format != "overcomplete" else line.k),
    )
    unlike = [f"{name} {ours} against {theirs}" for name, ours, theirs in pairs if ours and theirs and ours != theirs]
    if unlike:
        raise LoadError(
            f"{place} is not what the catalogue says of {line.name}: {'; '.join(unlike)} in the file. "
            "read(path) takes a file at its word."
        )


def figures_of(entries: Iterable[Entry]) -> list[tuple[str, ...]]:
    """Return rows of a table of coders: name, model, place, tokens, kind, features, L0, explained variance."""
    rows = []
    for each in entries:
        place = each.hook if each.hook_out is None else f"{each.hook} -> {each.hook_out}"
        l0, variance = each.figures.get("l0"), each.figures.get("explained_variance")
        figures = ("" if l0 is None else f"{l0:g}", "" if variance is None else f"{variance:.1%}")
        rows.append((each.name, each.model, place, each.tokens or "?", each.kind, str(each.d_sae), *figures))
    return rows
