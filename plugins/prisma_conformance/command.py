"""``prisma check`` and ``prisma doctor``: whether a model computes what upstream computes, and where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from prisma_core import hookimpl
from prisma_core.cli.info import REFERENCE
from prisma_core.cli.screen import note, out, show, show_json, table
from prisma_core.errors import LoadError, UnknownName

if TYPE_CHECKING:
    from prisma_conformance import Certificate


@hookimpl
def prisma_commands(app: typer.Typer) -> None:
    """Add ``check``, ``doctor`` and ``classes``."""
    for command in (check, doctor, classes):
        app.command(rich_help_panel="Commands")(command)


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
    import prisma_conformance as conformance
    from prisma_conformance.devices import usable

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
    import prisma_conformance as conformance
    from prisma_conformance.devices import usable

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


def classes(
    search: Annotated[list[str] | None, typer.Argument(help="Words that a class or its plugin must contain.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """List the upstream classes that adapters take, and what is proven about each."""
    from prisma_conformance.report.supported import read_supported
    from prisma_core.plugin.host import host

    types, proven = host().types(), read_supported(host())
    chosen = [name for name in types if all(word.lower() in f"{types[name]} {name}".lower() for word in search or [])]
    if not chosen:
        raise UnknownName(f"No class matches. `prisma models --classes` lists all {len(types)}.")
    rows = {name: proven.get(name) for name in chosen}
    if as_json:
        about = {name: row.model_dump() if row else {} for name, row in rows.items()}
        show_json([{"upstream": name, "plugin": types[name]} | about[name] for name in rows])
        return
    shown = table("upstream class", "plugin", "form", "architectures that pass", "worst error of the logits")
    for name, row in rows.items():
        cells = ("", "no certificate", "")
        if row is not None:
            worst = "" if row.error is None else f"{row.error:.0e}"
            cells = (row.form, f"{row.passed} of {row.architectures}", worst)
        shown.add_row(name, types[name], *cells)
    show(shown)
    known = [row for row in rows.values() if row]
    passed, counted = sum(row.passed for row in known), sum(row.architectures for row in known)
    told = f"{passed} of {counted} architectures pass. Errors are in standard deviations."
    note("classes", f"{len(chosen)} of {len(types)}. {told}", "green")


def _place(certificate: Certificate) -> str:
    return f"{certificate.device} ({escape(certificate.machine)})" if certificate.machine else certificate.device


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LoadError(f"{path} cannot be written: {error.strerror}.") from error


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
