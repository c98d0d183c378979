"""Which references a technique, a model or a data set names."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from prisma_core import HookedUpstream, LoadError, PrismaError, UnknownName, outline
from prisma_core.plugin import checked, installed, qualified_name, suggest

if TYPE_CHECKING:
    from pybtex.database import Entry

NEEDS = 'citations need pybtex: pip install "prisma-interp[cite]"'


@dataclass(frozen=True)
class Citation:
    """References of one thing.

    Attributes:
        name: the thing, as it was asked for.
        entries: BibTeX entries by key.
        source: what a technique's file says of its source, in full.
    """

    name: str
    entries: Mapping[str, Entry]
    source: str = ""

    def text(self) -> list[str]:
        """Return each reference as a line of text, in the order of ``entries``."""
        from pybtex.plugin import find_plugin

        style, backend = (
            find_plugin("pybtex.style.formatting", "plain")(),
            find_plugin("pybtex.backends", "plaintext")(),
        )
        return [style.format_entry("", entry).text.render(backend) for entry in self.entries.values()]


@checked
def cite(*names: str) -> dict[str, Citation]:
    """Return the references of techniques, models and data sets, without a network call.

    Args:
        names: functions of techniques (``attribute``, ``prisma_lens.attribute``), references of models
            (``timm:vit_base_patch16_224``), data sets (``dsprites``, ``digits``), or ``prisma`` itself.

    Raises:
        UnknownName: nothing of that name is installed; the nearest are suggested.
        LoadError: pybtex is not installed, or a plugin's references cannot be read.

    >>> list(cite("rollout")["rollout"].entries)
    ['abnar2020', 'joseph2024']
    """
    packages = list(_packages())
    entries = _entries(packages)
    return {name: _cited(name, entries, packages) for name in names}


@checked
def bibtex(citations: Mapping[str, Citation]) -> str:
    """Return all entries of some citations as the text of a BibTeX file, each once, without our patterns."""
    from pybtex.database import BibliographyData, Entry

    entries = {
        key: Entry(
            entry.type, [(name, value) for name, value in entry.fields.items() if name != "keywords"], entry.persons
        )
        for each in citations.values()
        for key, entry in each.entries.items()
    }
    return BibliographyData(entries).to_string("bibtex") if entries else ""


def _cited(name: str, entries: Mapping[str, Entry], packages: Iterable[ModuleType]) -> Citation:
    if ":" in name:
        return Citation(name, _about([name, *_classes(name)], entries))
    functions = dict(_functions(packages))
    if name in functions:
        source = _source(functions[name])
        return Citation(name, {key: each for key, each in entries.items() if _names(source, each)}, source)
    if known := _about([name], entries):
        return Citation(name, known)
    words = {word for each in entries.values() for word in _patterns(each) if word.isalnum()}
    raise UnknownName(
        f"{name!r} is no technique, data set or SOURCE:MODEL that is installed.{suggest(name, [*functions, *words])}"
    )


def _classes(reference: str) -> list[str]:
    """Return the qualified names of a model's upstream classes, none if a network would be needed to know them."""
    try:
        model = outline(reference)
    except UnknownName:
        raise
    except PrismaError:  # it needs a network or has no form of ours: its reference alone says what it is
        return []
    if isinstance(model, HookedUpstream):
        return [qualified_name(model.upstream)]
    return [origin.kind] if (origin := getattr(model, "origin", None)) else []


def _about(names: Iterable[str], entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Select the entries one of whose patterns matches one of the names."""
    plain = [name.lower() for name in names]
    return {
        key: each
        for key, each in entries.items()
        if any(fnmatchcase(name, pattern.lower()) for pattern in _patterns(each) for name in plain)
    }


def _patterns(entry: Entry) -> list[str]:
    return str(entry.fields.get("keywords", "")).split()


def _names(source: str, entry: Entry) -> bool:
    """Whether a text names an entry: its first author's surname and, before the next semicolon, its year."""
    people, year = entry.persons.get("author", []), entry.fields.get("year")
    if not people or not year:
        return False
    surname = re.sub(r"[{}\\'`^\"]", "", " ".join(people[0].last_names))
    return bool(re.search(rf"\b{re.escape(surname)}\b[^;]*\b{year}\b", source))


def _source(function: Any) -> str:
    """Return the part ``Source:`` of the docstring of a function's file, on one line."""
    document = inspect.getdoc(inspect.getmodule(function)) or ""
    _, _, source = document.partition("\nSource:\n")
    return " ".join(source.split())


def _functions(packages: Iterable[ModuleType]) -> Iterator[tuple[str, Any]]:
    """Yield the public functions and classes of plugins whose files name a source, by both of their names."""
    for package in packages:
        for name in getattr(package, "__all__", ()):
            try:
                part = getattr(package, name)
            except (PrismaError, ImportError):  # a library that it needs is not installed
                continue
            if callable(part) and _source(part):
                yield from ((name, part), (f"{package.__name__}.{name}", part))


def _packages() -> Iterator[ModuleType]:
    """Yield the packages of all plugins that work, this one first."""
    roots = {"prisma_cite": None} | {
        info.module.partition(".")[0]: None for info in installed().plugins() if not info.error
    }
    for root in roots:
        yield importlib.import_module(root)


def _entries(packages: Iterable[ModuleType]) -> dict[str, Entry]:
    try:
        from pybtex.database import parse_string
        from pybtex.exceptions import PybtexError
    except ImportError as error:
        raise LoadError(NEEDS) from error
    entries: dict[str, Entry] = {}
    for package in packages:
        path = resources.files(package) / "references.bib"
        if path.is_file():
            try:
                read = parse_string(path.read_text(encoding="utf-8"), "bibtex")
            except (PybtexError, UnicodeDecodeError) as error:
                raise LoadError(f"{Path(str(path)).name} of {package.__name__} cannot be read: {error}") from error
            entries = {**dict(read.entries), **entries}
    return entries
