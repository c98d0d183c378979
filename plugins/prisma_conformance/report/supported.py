"""Summary of certificates by upstream class, which each plugin carries in its package as ``supported.json``."""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import TypeAdapter, ValidationError

from prisma_conformance.report.results import Certificate
from prisma_core.plugin import Facts, LoadError, write_text

if TYPE_CHECKING:
    from prisma_core.plugin import Host

NAME = "supported.json"


class Supported(Facts):
    """One upstream class.

    Attributes:
        upstream: its qualified name.
        form: ``canonical``, or ``mapped``: upstream's own module is hooked at the places of a map.
        architectures: how many have a certificate.
        passed: how many of them pass every check that applies.
        error: the worst error of the logits, in standard deviations; None where the logits were not compared.
        versions: of the libraries it was proven with.
    """

    upstream: str
    form: Literal["canonical", "mapped"]
    architectures: int
    passed: int
    error: float | None = None
    versions: tuple[str, ...] = ()


_LIST = TypeAdapter(list[Supported])


def counted(certificates: Iterable[Certificate]) -> list[Certificate]:
    """Certificates from a CPU, or all if there are none: those from a GPU are about the same architectures."""
    everything = list(certificates)
    return [one for one in everything if one.device == "cpu"] or everything


def summarise(certificates: Iterable[Certificate]) -> list[Supported]:
    """Summarise certificates, one row a class, by name."""
    classes: dict[str, list[Certificate]] = defaultdict(list)
    for certificate in counted(certificates):
        classes[certificate.upstream].append(certificate)
    return [_row(name, members) for name, members in sorted(classes.items())]


def _row(name: str, members: list[Certificate]) -> Supported:
    logits = [result for member in members for result in member.results if result.name == "parity.logits"]
    return Supported(
        upstream=name,
        form=members[0].form,
        architectures=len(members),
        passed=sum(member.passed for member in members),
        error=max((result.error for result in logits if result.error is not None), default=None),
        versions=tuple(sorted({v for m in members for v in (f"{m.library} {m.version}", f"torch {m.torch}")})),
    )


def write_supported(certificates: Iterable[Certificate], package: str) -> Path:
    """Write the summary of a plugin's classes into its package, where ``prisma models --classes`` reads it.

    Raises:
        LoadError: there is no such package, or no certificate of a class that its adapters take.
    """
    from prisma_core.plugin import installed

    modules = {info.name: _package(info.module) for info in installed().plugins()}
    if package not in modules.values():
        raise LoadError(f"{package!r} is no installed plugin's package. Packages: {', '.join(modules.values())}.")
    theirs = {kind for kind, plugin in installed().types().items() if modules[plugin] == package}
    rows = [row for row in summarise(certificates) if row.upstream in theirs]
    if not rows:
        raise LoadError(f"None of the certificates is of one of the {len(theirs)} classes that {package} adapts.")
    text = "[\n" + ",\n".join(row.model_dump_json() for row in rows) + "\n]\n"
    return write_text(Path(str(files(package))) / NAME, text)


def read_supported(plugins: Host) -> dict[str, Supported]:
    """Read the summaries of all plugins' packages; a plugin whose file cannot be read is reported as broken."""
    supported: dict[str, Supported] = {}
    types = plugins.types()
    for info in plugins.plugins():
        if not (package := _package(info.module)):
            continue  # a module by itself
        try:
            text = (files(package) / NAME).read_text(encoding="utf-8")
            rows = _LIST.validate_python(json.loads(text))
        except (FileNotFoundError, NotADirectoryError, ModuleNotFoundError):
            continue  # it carries none
        except (ValueError, ValidationError, RecursionError) as problem:
            plugins.broke(
                info.name, f"{NAME} is not what `python -m prisma_conformance.report.table` writes: {problem}"
            )
            continue
        supported |= {row.upstream: row for row in rows if types.get(row.upstream) == info.name}
    return supported


def _package(module: str) -> str:
    """The package that an entry point names, or that holds the module it names."""
    path = module.partition(":")[0]
    spec = importlib.util.find_spec(path)
    is_package = spec is None or spec.submodule_search_locations is not None
    return path if is_package else path.rpartition(".")[0]
