"""``prisma check`` and ``prisma doctor``: whether a model computes what upstream computes, and where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from prisma_core.commands.info import REFERENCE
from prisma_core.commands.screen import note, out, table
from prisma_core.errors import LoadError

if TYPE_CHECKING:
    from prisma_core.conformance import Certificate

DEVICE = Annotated[
    str | None, typer.Option(help="cpu or cuda; without it the CPU, and the logits on a GPU too where there is one.")
]
FULL = Annotated[bool, typer.Option("--full", help="At the real size, not shrunk.")]
PRETRAINED = Annotated[
    bool, typer.Option("--pretrained", help="With the real weights (downloads them), not drawn ones.")
]


def check(
    reference: REFERENCE,
    device: DEVICE = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="What logits are compared in besides float64: float32, bfloat16 or float16; may be given again. "
            "Without it float32, and on a GPU all three."
        ),
    ] = None,
    checks: Annotated[list[str] | None, typer.Option(help="A check's name or a glob; may be given again.")] = None,
    full: FULL = False,
    pretrained: PRETRAINED = False,
    json: Annotated[Path | None, typer.Option(help="Write the certificate to this file.", dir_okay=False)] = None,
) -> None:
    """Prove that a model computes what upstream computes.

    A model that was hooked from the start, such as those of `toy:` and `file:`, has no upstream to compare with:
    check the reference it was adapted from, such as `timm:vit_base_patch16_224`.
    """
    from prisma_core import conformance
    from prisma_core.conformance.devices import usable

    usable(device)
    with Console(stderr=True).status("checking") as status:
        report = conformance.check(
            reference,
            device=device,
            dtypes=dtype,
            checks=checks or None,
            full=full,
            pretrained=pretrained,
            progress=lambda name, result: status.update(f"{name}: {result.name} done"),
        )
    for certificate in report.certificates:
        out().print(
            f"[bold]{escape(certificate.name)}[/]: {certificate.upstream} of {certificate.library} "
            f"{certificate.version}, on {_place(certificate)}, weights {certificate.weights}"
        )
        shown = table("check", "outcome", "error", "at most", "")
        for result in certificate.results:
            outcome = "skipped" if result.skipped else "[green]passed[/]" if result.passed else "[bold red]FAILED[/]"
            why = escape(result.skipped or result.detail)
            shown.add_row(result.name, outcome, _number(result.error), _number(result.bound), why)
        out().print(shown)
    if json is not None:
        _write(json, "\n".join(certificate.model_dump_json(indent=1) for certificate in report.certificates) + "\n")
    ran = [result for result in report.results if result.skipped is None]
    if not report.passed:
        told = f"{len(report.failures)} of {len(ran)} checks failed" if ran else "no check applies"
        note("Error", f"{told}. `prisma doctor {reference}` looks for the cause.")
        raise typer.Exit(1)
    if not pretrained:
        size = "at its real size" if full else "shrunk where a small form is known"
        told = f"this is about the architecture, {size}, with weights drawn at random. Those that {reference} names"
        note("note", f"{told} were not read: --pretrained checks them.", "yellow")
    note("passed", f"{len(ran)} of {len(ran)} checks, {len(report.results) - len(ran)} skipped.", "green")


def doctor(reference: REFERENCE, device: DEVICE = None, full: FULL = False, pretrained: PRETRAINED = False) -> None:
    """Find where a model departs from upstream, and why."""
    from prisma_core import conformance
    from prisma_core.conformance.devices import usable

    usable(device)
    with Console(stderr=True).status("looking") as status:
        found = conformance.diagnose(
            reference,
            device=device,
            full=full,
            pretrained=pretrained,
            progress=lambda change: status.update(f"trying: {change}"),
        )
    out().print(escape(str(found)), soft_wrap=True)
    if not found.agrees:
        raise typer.Exit(1)


def _place(certificate: Certificate) -> str:
    return f"{certificate.device} ({escape(certificate.machine)})" if certificate.machine else certificate.device


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LoadError(f"{path} cannot be written: {error.strerror}.") from error


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
