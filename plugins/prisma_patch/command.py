"""The command ``prisma patch``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text
from torch import Tensor

import prisma_core as prisma
from prisma_core import HookedDual, InputError, Result
from prisma_core.plugin import open_image, screen

WIDEST = 16  # columns of a table


def patch(
    reference: Annotated[str, typer.Argument(help="The model; `prisma models` lists what there is.")],
    clean: Annotated[Path, typer.Option(help="The image whose run is edited.")],
    corrupt: Annotated[Path, typer.Option(help="The image whose activations are put in.")],
    metric: Annotated[
        str | None,
        typer.Option(
            help="A class, or two with a comma for their difference, as labels or numbers.",
            show_default="the class of --clean against that of --corrupt",
        ),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Of a dual encoder: a text to compare with; again for the next.")
    ] = None,
    at: Annotated[str, typer.Option(help="Hook points, such as z, resid_pre, mlp_out, or a full name.")] = "z",
    over: Annotated[
        str, typer.Option(help="Axes of the sweep: layer, head, pos, neuron, query_pos, with spaces.")
    ] = "layer head",
    pos: Annotated[
        str | None, typer.Option(help="Tokens to replace: cls, patches, registers, or numbers.", show_default="all")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images to run at once.")] = 64,
    top: Annotated[int, typer.Option(min=1, help="How many of the largest effects to list.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also save the result here, as .safetensors.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="A .safetensors file that keeps the effects so far; go on from it.")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--no-pretrained", help="Load trained weights, or random ones (no download).")
    ] = True,
) -> None:
    """Put activations of one image into the run of another, place by place, and show how far the prediction moves."""
    from prisma_patch.patching import activation_patch

    for path in (clean, corrupt):  # what cannot be read is told before anything is loaded
        open_image(path)
    for path in (out, resume):
        screen.check_output(path, ".safetensors")
    with screen.working(f"Loading {reference}"):
        model = prisma.load(reference, **({} if pretrained else {"pretrained": False}))
    ours, theirs = _inputs(model, reference, clean, text), _inputs(model, reference, corrupt, text)
    with torch.no_grad():
        first, second = (_first_row(model(*inputs)) for inputs in (ours, theirs))
    names = tuple(text) if text else getattr(model, "labels", None) or tuple(map(str, range(len(first))))
    classes = _metric(metric, names, first, second)
    effects = activation_patch(
        model,
        ours,
        theirs,
        classes if len(classes) == 2 else classes[0],
        at=at,
        over=over,
        pos=_positions(pos),
        batch_size=batch_size,
        progress=sys.stderr.isatty() or None,
        resume=resume,
    ).sel(batch=0)
    saved = None if out is None else effects.save(out)
    formula = " - ".join(names[each] for each in classes)
    seen = [names[int(each.argmax())] for each in (first, second)]
    if as_json:
        about = {"reference": reference, "metric": formula, "clean": seen[0], "corrupt": seen[1], "at": at}
        values = {"axes": effects.axes, "labels": {axis: effects.names(axis) for axis in effects.axes}}
        best = [{"place": place, "effect": value} for place, value in effects.top(top)]
        numbers = {"values": effects.values.tolist(), "before": float(effects.tensors["clean"][0])}
        screen.show_json({**about, **values, **numbers, "top": best, "saved": None if saved is None else str(saved)})
        return
    console = screen.out()
    console.print(
        f"clean: {seen[0]}   corrupt: {seen[1]}   metric: {formula} = {float(effects.tensors['clean'][0]):+.3f}"
    )
    screen.show(_table(effects, top))
    if saved is not None:
        console.print(f"Saved to {saved}: prisma.Result.load reads it.", soft_wrap=True)
    if not pretrained:
        console.print("These weights are random: the effects say nothing about a trained model.", style="yellow")


def _inputs(model: Any, reference: str, image: Path, text: list[str] | None) -> tuple[Tensor, ...]:
    preprocess = getattr(model, "preprocess", None)
    if not preprocess:
        raise InputError(f"{reference} does not know how to read images.")
    pixels = preprocess(image)
    if not isinstance(model, HookedDual):
        if text:
            raise InputError(f"{reference} is no dual encoder, so --text means nothing: leave it out.")
        return (pixels,)
    if not text:
        raise InputError(f'{reference} is a dual encoder: give texts to compare with, --text "a cat" --text "a dog".')
    return pixels, model.tokens(text)


def _first_row(output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 2:
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"Expected a model that returns a number for each class [batch class], got {shape}.")
    return output[0]


def _metric(metric: str | None, names: tuple[str, ...], first: Tensor, second: Tensor) -> Any:
    """Return the one or two classes that are measured."""
    from prisma_lens.metrics import class_of

    if metric is None:
        one, two = int(first.argmax()), int(second.argmax())
        return (one, two) if one != two else (one,)
    labelled = type("Labelled", (), {"labels": names})
    parts = [part.strip() for part in metric.split(",")]
    if len(parts) > 2:
        raise InputError(f"Expected one class or two, with a comma between them, got {metric!r}.")
    return tuple(class_of(labelled, int(part) if part.lstrip("-").isdigit() else part) for part in parts)


def _positions(pos: str | None) -> Any:
    if pos is None:
        return None
    parts = pos.replace(",", " ").split()
    return [int(part) for part in parts] if all(part.lstrip("-").isdigit() for part in parts) else pos


def _table(effects: Result, top: int) -> Table:
    """Return a table of all effects where two axes fit the screen, and of the largest ones otherwise."""
    if len(effects.axes) == 2 and effects.values.shape[1] <= WIDEST and effects.values.shape[0] <= 4 * WIDEST:
        rows, columns = (effects.names(axis) for axis in effects.axes)
        table = screen.table(" ".join(effects.axes), *columns, title=effects.unit)
        largest = effects.values.abs().max()
        for name, row in zip(rows, effects.values, strict=True):
            table.add_row(name, *(Text(f"{x:+.3f}", "bold" if abs(x) > largest / 2 else "") for x in row.tolist()))
        return table
    table = screen.table(*effects.axes, effects.unit)
    for place, value in effects.top(top):
        table.add_row(*place, f"{value:+.4f}")
    return table
