"""``prisma check``, ``prisma doctor`` and ``prisma classes``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from prisma_core.plugin import UnknownName, screen, write_text

if TYPE_CHECKING:
    from prisma_conformance import Certificate, Check
    from prisma_conformance.subject import Subject

REFERENCE = Annotated[str, typer.Argument(help="SOURCE:MODEL, such as timm:vit_base_patch16_224.", show_default=False)]
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
            help="Compare logits in this dtype besides float64: float32, bfloat16 or float16; may be repeated. "
            "Default float32, and on a GPU all three."
        ),
    ] = None,
    checks: Annotated[list[str] | None, typer.Option(help="A check's name or a glob; may be repeated.")] = None,
    full: FULL = False,
    pretrained: PRETRAINED = False,
    json: Annotated[Path | None, typer.Option(help="Write the certificate to this file.", dir_okay=False)] = None,
) -> None:
    """Prove that a model computes what upstream computes.

    A model that was hooked from the start, such as those of `toy:` and `file:`, has no upstream to compare with:
    check the reference it was adapted from, such as `timm:vit_base_patch16_224`.
    """
    import prisma_conformance as conformance
    from prisma_core.plugin import device_of

    device_of(device)
    screen.check_output(json, ".json")
    notes: list[str] = []
    with _progress("building the model", lines=True) as say:

        def starting(subject: Subject, one: Check) -> None:
            if subject.note and subject.note not in notes:
                notes.append(subject.note)
                screen.note("note", subject.note, "yellow")
            say(f"{subject.case.name}: {one.name}")

        report = conformance.check(
            reference,
            device=device,
            dtypes=dtype,
            checks=checks or None,
            full=full,
            pretrained=pretrained,
            starting=starting,
        )
    for certificate in report.certificates:
        screen.out().print(
            Text(certificate.name, "bold"),
            f": {certificate.upstream} of {certificate.library} "
            f"{certificate.version}, on {_place(certificate)}, weights {certificate.weights}",
            sep="",
        )
        rows = screen.table("check", "outcome", "error", "at most", "")
        for result in certificate.results:
            passed = ("passed", "green") if result.passed else ("FAILED", "bold red")
            outcome = Text(*("skipped", "") if result.skipped else passed)
            why = result.skipped or result.detail
            rows.add_row(result.name, outcome, _number(result.error), _number(result.bound), why)
        screen.show(rows)
    if json is not None:
        write_text(json, "\n".join(certificate.model_dump_json(indent=1) for certificate in report.certificates) + "\n")
    ran = [result for result in report.results if result.skipped is None]
    if not report.passed:
        count = f"{len(report.failures)} of {len(ran)} checks failed" if ran else "no check applies"
        screen.note("Error", f"{count}. `prisma doctor {reference}` looks for the cause.")
        raise typer.Exit(1)
    if not pretrained:
        size = "at its real size" if all(one.full for one in report.certificates) else "shrunk"
        scope = f"this is about the architecture, {size}, with weights drawn at random. Those that {reference} names"
        screen.note("note", f"{scope} were not read: --pretrained checks them.", "yellow")
    screen.note("passed", f"{len(ran)} of {len(ran)} checks, {len(report.results) - len(ran)} skipped.", "green")


def doctor(reference: REFERENCE, device: DEVICE = None, full: FULL = False, pretrained: PRETRAINED = False) -> None:
    """Find where a model departs from upstream, and why."""
    import prisma_conformance as conformance
    from prisma_core.plugin import device_of

    device_of(device)
    with _progress("comparing") as say:
        diagnosis = conformance.diagnose(
            reference,
            device=device,
            full=full,
            pretrained=pretrained,
            progress=lambda change: say(f"trying: {change}"),
        )
    screen.out().print(str(diagnosis), soft_wrap=True)
    if not diagnosis.healthy:
        raise typer.Exit(1)


def classes(
    search: Annotated[list[str] | None, typer.Argument(help="Words that a class or its plugin must contain.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """List the upstream classes that adapters take, and what is proven about each."""
    from prisma_conformance.report.supported import read_supported
    from prisma_core.plugin import installed

    types, proven = installed().types(), read_supported(installed())
    chosen = [name for name in types if all(word.lower() in f"{types[name]} {name}".lower() for word in search or [])]
    if not chosen:
        raise UnknownName(f"No class matches. `prisma models --classes` lists all {len(types)}.")
    rows = {name: proven.get(name) for name in chosen}
    if as_json:
        about = {name: row.model_dump() if row else {} for name, row in rows.items()}
        screen.show_json([{"upstream": name, "plugin": types[name]} | about[name] for name in rows])
        return
    listing = screen.table("upstream class", "plugin", "form", "architectures that pass", "worst error of the logits")
    for name, row in rows.items():
        cells = ("", "no certificate", "")
        if row is not None:
            worst = "" if row.error is None else f"{row.error:.0e}"
            cells = (row.form, f"{row.passed} of {row.architectures}", worst)
        listing.add_row(name, types[name], *cells)
    screen.show(listing)
    known = [row for row in rows.values() if row]
    passed, counted = sum(row.passed for row in known), sum(row.architectures for row in known)
    summary = f"{passed} of {counted} architectures pass. Errors are in standard deviations."
    screen.note("classes", f"{len(chosen)} of {len(types)}. {summary}", "green")


@contextmanager
def _progress(beginning: str, *, lines: bool = False) -> Generator[Callable[[str], None]]:
    """Show the running step on stderr: in place on a screen; elsewhere a line each, or nothing."""
    if sys.stderr.isatty():
        with screen.console(stderr=True).status(Text(beginning)) as status:
            yield lambda step: status.update(Text(step))
    else:
        yield (lambda step: screen.note("running", step)) if lines else (lambda step: None)


def _place(certificate: Certificate) -> str:
    return f"{certificate.device} ({certificate.machine})" if certificate.machine else certificate.device


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
