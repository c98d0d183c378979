"""``prisma check`` and ``prisma doctor``: whether a model computes what upstream computes, and where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prisma_core.commands.info import REFERENCE
from prisma_core.commands.screen import note, out, table

DEVICE = Annotated[str, typer.Option(help="cpu or cuda.")]


def check(
    reference: REFERENCE,
    device: DEVICE = "cpu",
    checks: Annotated[list[str] | None, typer.Option(help="A check's name or a glob; may be given again.")] = None,
    full: Annotated[bool, typer.Option("--full", help="At the real size, not shrunk.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the certificate to this file.", dir_okay=False)] = None,
) -> None:
    """Prove that a model computes what upstream computes."""
    from prisma_core import conformance

    report = conformance.check(reference, device=device, checks=checks or None, full=full)
    console = out()
    for certificate in report.certificates:
        console.print(
            f"[bold]{certificate.name}[/] {certificate.upstream}, {certificate.library} {certificate.version}, "
            f"{certificate.device}, weights: {certificate.weights}"
        )
        shown = table("check", "outcome", "error", "at most", "")
        for result in certificate.results:
            outcome = "skipped" if result.skipped else "[green]passed[/]" if result.passed else "[bold red]FAILED[/]"
            shown.add_row(
                result.name, outcome, _number(result.error), _number(result.bound), result.skipped or result.detail
            )
        console.print(shown)
    if json is not None:
        json.write_text("\n".join(c.model_dump_json(indent=1) for c in report.certificates) + "\n", encoding="utf-8")
    if not report.passed:
        failed = f"{len(report.failures)} of {len(report.results)} checks failed"
        note("Error", f"{failed}. `prisma doctor {reference}` looks for the cause.")
        raise typer.Exit(1)


def doctor(reference: REFERENCE, device: DEVICE = "cpu") -> None:
    """Find where a model departs from upstream, and why."""
    from prisma_core import conformance

    out().print(str(conformance.diagnose(reference, device=device)))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
