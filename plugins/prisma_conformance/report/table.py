"""Table of supported models, from certificates: ``python -m prisma_conformance.report.table docs/conformance``."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from prisma_conformance import tolerances
from prisma_conformance.registry import CHECKS
from prisma_conformance.report.results import Certificate, Precision, read_certificates
from prisma_conformance.report.supported import counted, summarise, write_supported
from prisma_core.plugin import LoadError, PrismaError, write_text

NAME = "supported.md"


def write_table(folder: str | Path, *packages: str) -> Path:
    """Write ``supported.md`` from a folder's certificates (``*.jsonl``), and the summaries in packages of plugins.

    Raises:
        LoadError: the folder holds no certificates, a line is none, or a package is no plugin's or has none among them.
    """
    folder = Path(folder)
    certificates = [certificate for path in sorted(folder.glob("*.jsonl")) for certificate in read_certificates(path)]
    if not certificates:
        raise LoadError(f"{folder} holds no certificates (*.jsonl): write them with pytest --certificates {folder}.")
    path = folder / NAME
    write_text(path, supported(certificates))
    for package in packages:
        write_supported(certificates, package)
    return path


def supported(certificates: Sequence[Certificate]) -> str:
    """The table as Markdown."""
    return "\n".join(_lines(certificates)) + "\n"


def _lines(everything: Sequence[Certificate]) -> Iterator[str]:
    certificates = counted(everything)
    kinds: dict[str, list[Certificate]] = defaultdict(list)
    for certificate in certificates:
        kinds[certificate.upstream].append(certificate)
    versions = sorted({f"{certificate.library} {certificate.version}" for certificate in certificates})
    combinations = len({certificate.facts for certificate in certificates})
    yield "# Supported models"
    yield ""
    yield "Generated from the certificates here by `python -m prisma_conformance.report.table`. Do not edit."
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
    yield from _precisions(everything)
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


def _precisions(certificates: Sequence[Certificate]) -> Iterator[str]:
    """Yield the table of dtypes and devices, and a line about each GPU."""
    by_place: dict[tuple[str, str], list[Precision]] = defaultdict(list)
    for certificate in certificates:
        for precision in (one for result in certificate.results for one in result.precisions):
            by_place[precision.device, precision.dtype].append(precision)
    if not by_place:
        return
    yield ""
    yield (
        "Where the logits are computed in another dtype, both sides err against float64. *Worst* is our error over "
        f"upstream's, which may be {tolerances.OWN_ERROR_FACTOR} at most."
    )
    yield ""
    yield "| device | dtype | architectures | bit-equal | worst | upstream cannot |"
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    for (device, dtype), rows in sorted(by_place.items()):
        ran = [one for one in rows if not one.skipped]
        shares = [one.error / one.upstream for one in ran if one.error is not None and one.upstream and not one.equal]
        cells = (len(rows), sum(one.equal for one in ran), f"{max(shares):.2f}" if shares else "", len(rows) - len(ran))
        yield f"| {device} | {dtype} | {' | '.join(str(cell or '') for cell in cells)} |"
    for machine in sorted({one.machine for one in certificates if one.machine and one.device != "cpu"}):
        there = [one for one in certificates if one.machine == machine and one.device != "cpu"]
        yield ""
        yield f"On {machine}, every check: {sum(one.passed for one in there)} of {len(there)} architectures pass."


def _error(certificate: Certificate, check: str) -> float | None:
    return next((result.error for result in certificate.results if result.name == check), None)


def _passed(certificate: Certificate) -> str:
    ran = [result for result in certificate.results if result.skipped is None]
    failed = [result.name for result in ran if not result.passed]
    return f"{len(ran) - len(failed)} of {len(ran)}" + (f"; fails {', '.join(failed)}" if failed else "")


def main(arguments: Sequence[str]) -> None:
    """Write the table; a mistake in the arguments is one line on stderr, and exit status 1."""
    try:
        write_table(*(arguments or ["docs/conformance"]))
    except PrismaError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
