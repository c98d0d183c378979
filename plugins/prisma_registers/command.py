"""The command ``prisma registers``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

import prisma_core as prisma
from prisma_core import HookedDual, HookedViT, InputError
from prisma_core.plugin import screen
from prisma_registers.norms import LayerNorms, attention_to, check_outliers, token_norms


def registers(
    reference: Annotated[str, typer.Argument(help="What to look into; `prisma models` lists what there is.")],
    images: Annotated[list[Path], typer.Argument(help="Images to look at, or videos for a model of those.")],
    cutoff: Annotated[
        float | None,
        typer.Option(help="The norm above which a token is an outlier.", show_default="3 times the median"),
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--no-pretrained", help="Load trained weights, or random ones (no download).")
    ] = True,
) -> None:
    """Show which tokens are high-norm outliers, layer by layer, and which heads attend to registers."""
    check_outliers(cutoff, None)
    with screen.working(f"Loading {reference}"):
        loaded = prisma.load(reference, **({} if pretrained else {"pretrained": False}))
    model = loaded.vision if isinstance(loaded, HookedDual) else loaded
    if isinstance(loaded, HookedDual):
        screen.note("Note", f"{reference} is a pair of towers: this looks at its vision tower.", "dim")
    if not isinstance(model, HookedViT):
        raise InputError(
            f"{reference} is no vision transformer in canonical form, so it has no registers and no stream of tokens "
            "to measure: docs/how-to-other-architectures.md says how to look into it."
        )
    preprocess = loaded.preprocess if isinstance(loaded, HookedDual) else model.preprocess
    if not preprocess:
        raise InputError("This model does not know how to read images.")
    batch = preprocess(images)
    norms = token_norms(model, batch, progress=sys.stderr.isatty())
    keys = next((kind for kind in ("registers", "cls") if _any(norms.layout, kind)), None)
    shares = attention_to(model, batch, keys, progress=sys.stderr.isatty()) if keys else None
    out = screen.console()
    out.print(_table(norms.by_layer(cutoff=cutoff), norms.layout, shares, keys))
    first = norms.first_layer(cutoff=cutoff)
    text = "no patch is an outlier" if first is None else f"patches are outliers from layer {first} on"
    kind = "image" if model.spec.n_frames is None else "video"
    count = f"1 {kind}" if len(batch) == 1 else f"{len(batch)} {kind}s"
    out.print(f"{count}, {norms.layout.registers} registers: {text}.")
    if not pretrained:
        out.print("These weights are random: the norms say nothing about a trained model.", style="yellow")


def _any(layout: prisma.TokenLayout, kind: str) -> bool:
    where = layout.slice(kind)
    return where.start < where.stop


def _table(rows: list[LayerNorms], layout: prisma.TokenLayout, shares: torch.Tensor | None, keys: str | None) -> Table:
    prefix = layout.token_names()[: layout.n_prefix]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("layer", "median norm", "largest", "outliers"):
        table.add_column(column, justify="right")
    if keys:
        table.add_column(f"attention of patches to {keys}", justify="right")
        table.add_column("most in head", justify="right")
    table.add_column("outliers in most images", overflow="fold")
    for row in rows:
        cells = [str(row.layer), f"{row.median:.1f}", f"{row.largest:.1f}", f"{row.outliers:.1%}"]
        if shares is not None:
            row_shares = shares[row.layer]
            cells += [f"{float(row_shares.mean()):.1%}", f"{int(row_shares.argmax())} ({float(row_shares.max()):.0%})"]
        patches = [name for name in row.positions if name not in prefix]
        more = [f"{len(patches) - 6} patches more"] if len(patches) > 6 else []
        table.add_row(*cells, ", ".join([*patches[:6], *more, *(name for name in row.positions if name in prefix)]))
    return table
