"""The table of supported models, made of certificates: ``python -m prisma_core.conformance.table docs/conformance``."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from prisma_core.conformance.registry import CHECKS
from prisma_core.conformance.results import Certificate, read_certificates
from prisma_core.conformance.supported import summarise, write_supported
from prisma_core.errors import LoadError

NAME = "supported.md"


def write_table(folder: str | Path, *packages: str) -> Path:
    """Write ``supported.md`` from a folder's certificates (``*.jsonl``), and what packages of plugins carry of it.

    Raises:
        LoadError: the folder holds no certificates, a line is none, or a package is no plugin's or has none among them.
    """
    folder = Path(folder)
    found = [certificate for path in sorted(folder.glob("*.jsonl")) for certificate in read_certificates(path)]
    if not found:
        raise LoadError(f"{folder} holds no certificates (*.jsonl): write them with pytest --certificates {folder}.")
    path = folder / NAME
    path.write_text(supported(found), encoding="utf-8")
    for package in packages:
        write_supported(found, package)
    return path


def supported(certificates: Sequence[Certificate]) -> str:
    """Return the table as Markdown."""
    return "\n".join(_lines(certificates)) + "\n"


def _lines(certificates: Sequence[Certificate]) -> Iterator[str]:
    kinds: dict[str, list[Certificate]] = defaultdict(list)
    for certificate in certificates:
        kinds[certificate.upstream].append(certificate)
    versions = sorted({f"{certificate.library} {certificate.version}" for certificate in certificates})
    combinations = len({certificate.facts for certificate in certificates})
    yield "# Supported models"
    yield ""
    yield "Generated from the certificates beside this page by `python -m prisma_core.conformance.table`. Do not edit."
    yield ""
    passed = sum(certificate.passed for certificate in certificates)
    yield (
        f"{passed} of {len(certificates)} architectures pass, with {combinations} distinct combinations of facts "
        f"({', '.join(versions)}; torch {', '.join(sorted({c.torch for c in certificates}))}). "
        "Each was built small, with every weight drawn at random, and compared in float64. Errors are in standard "
        "deviations of upstream's logits."
    )
    yield ""
    yield (
        "A *mapped* class has no canonical form: upstream's own module runs, hooked at the places of a map. "
        "Fewer checks apply to it."
    )
    yield ""
    yield "| upstream class | form | architectures | pass | worst error of the logits |"
    yield "| --- | --- | ---: | ---: | ---: |"
    for row in summarise(certificates):
        worst = "" if row.error is None else f"{row.error:.0e}"
        yield f"| `{row.upstream}` | {row.form} | {row.architectures} | {row.passed} | {worst} |"
    yield ""
    yield "| check | proves | pass | do not apply |"
    yield "| --- | --- | ---: | ---: |"
    for name, check in CHECKS.items():
        results = [result for certificate in certificates for result in certificate.results if result.name == name]
        if results:
            skipped = sum(result.skipped is not None for result in results)
            yield f"| {name} | {check.proves} | {sum(result.passed for result in results)} | {skipped or ''} |"
    for kind, members in sorted(kinds.items()):
        yield ""
        yield f"## {kind.rsplit('.', 1)[-1]} (`{kind}`)"
        yield ""
        yield "| architecture | logits | activations | gradients | checks passed |"
        yield "| --- | ---: | ---: | ---: | --- |"
        for member in sorted(members, key=lambda member: member.name):
            numbers = (_error(member, name) for name in ("parity.logits", "parity.hooks", "parity.gradients"))
            cells = " | ".join("" if number is None else f"{number:.0e}" for number in numbers)
            yield f"| {member.name} | {cells} | {_passed(member)} |"


def _error(certificate: Certificate, check: str) -> float | None:
    return next((result.error for result in certificate.results if result.name == check), None)


def _passed(certificate: Certificate) -> str:
    ran = [result for result in certificate.results if result.skipped is None]
    failed = [result.name for result in ran if not result.passed]
    return f"{len(ran) - len(failed)} of {len(ran)}" + (f"; fails {', '.join(failed)}" if failed else "")


if __name__ == "__main__":
    write_table(*(sys.argv[1:] or ["docs/conformance"]))
