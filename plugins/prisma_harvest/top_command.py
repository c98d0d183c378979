"""The command ``prisma harvest top``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prisma_core import InputError, Result
from prisma_core.plugin import screen

if TYPE_CHECKING:
    from torch import Tensor

    from prisma_harvest.passes import Pass
    from prisma_harvest.reading import Harvest


def top(
    source: Annotated[str, typer.Argument(help="The folder of a harvest, or a model for a pass of its own.")],
    name: Annotated[str, typer.Option(help="The hook point: a full name, or SHORTHAND:LAYER.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Examples of each unit.")] = 16,
    over: Annotated[str, typer.Option(help="feature: every number; head: the norm of each head.")] = "feature",
    per: Annotated[str, typer.Option(help="image: of each its largest token; patch: every token by itself.")] = "image",
    probe: Annotated[Path | None, typer.Option(help="Score the directions of a probe, saved as .safetensors.")] = None,
    directions: Annotated[
        Path | None, typer.Option(help="Score the rows of the one tensor of this .safetensors file.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="Score a text, of a dual encoder; again for the next.")] = None,
    coder: Annotated[str | None, typer.Option(help="Score the features of a sparse coder.")] = None,
    unit: Annotated[list[str] | None, typer.Option(help="Units to show; again for more. --out has all.")] = None,
    show: Annotated[int, typer.Option(min=1, help="Without --unit: how many units to show, highest first.")] = 10,
    data: Annotated[str | None, typer.Option(help="Of a pass: its images, as in `prisma harvest write`.")] = None,
    pos: Annotated[str | None, typer.Option(help="Of a pass: the tokens.", show_default="all")] = None,
    batch: Annotated[int | None, typer.Option(help="Of a pass: images at once.", show_default="32")] = None,
    limit: Annotated[int | None, typer.Option(help="Of a pass: take only so many images.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Of a pass: processes that decode.", show_default="by cores")
    ] = None,
    on_error: Annotated[
        str | None,
        typer.Option(help="Of a pass: stop at an image that cannot be read, or skip.", show_default="stop"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Of a harvest, for --text: its model.", show_default="by its manifest")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where the model runs.", show_default="cpu")] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--no-pretrained", help="Load trained weights, or random ones (no download).")
    ] = True,
    resume: Annotated[
        Path | None, typer.Option(help="A .safetensors file that keeps the search so far; go on from it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Save all units here, as .safetensors (Result.load).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Show the images, or patches, on which each neuron, head, sparse feature, probe or text is largest.

    From a harvest, or from a pass over images that writes nothing: `prisma harvest top toy:scenes-3l --data samples:64
    --name mlp.hook_post:1`.
    """
    from prisma_harvest.options import read_name
    from prisma_harvest.targets import of_coder, of_probe, of_rows, of_texts
    from prisma_harvest.top import top_examples

    for path in (out, resume):
        screen.check_output(path, ".safetensors")
    if sum(each is not None for each in (probe, directions, text or None, coder)) > 1:
        raise InputError("Expected one of --probe, --directions, --text and --coder.")
    of_pass = {"pos": pos, "batch": batch, "limit": limit, "workers": workers, "on_error": on_error}
    given = {option: value for option, value in of_pass.items() if value is not None}
    opened, loaded = _opened(source, data, name, given, model, device, pretrained, needs_model=bool(text))
    query = read_name(name)
    units: dict[str, Any] = {}
    if probe is not None:
        units = of_probe(probe, opened, query)
    elif directions is not None:
        units = of_rows(directions)
    elif text:
        units = of_texts(text, loaded, opened, query)
    elif coder is not None:
        units = of_coder(coder, opened, query)
    result = top_examples(opened, query, k, over=over, per=per, resume=resume, **units)  # type: ignore[arg-type]
    if data is not None:
        result = replace(result, facts={**result.facts, "data": {**result.facts["data"], "given": data}})
    saved = None if out is None else result.save(out)
    chosen = _chosen(result, unit, show)
    if as_json:
        about = {each: value for each, value in result.facts.items() if each != "examples"}
        shown = {"unit": result.axes[0], "edges": result.tensors["edges"].tolist()}
        rows = [unit_facts(result, each) for each in chosen]
        screen.show_json({**about, **shown, "units": rows, "saved": None if saved is None else str(saved)})
        return
    table = screen.table(result.axes[0], "largest", "mean", "share above 0", "where")
    for row in (unit_facts(result, each) for each in chosen):
        best = row["top"][:3]
        where = "; ".join(f"{one['path'] or one['example']} {one['token'] or ''}".strip() for one in best)
        named = row["label"] or str(row["unit"])
        table.add_row(named, ", ".join(f"{one['score']:.3g}" for one in best), f"{row['mean']:.3g}",
                      f"{row['positive']:.1%}", where)  # fmt: skip
    screen.show(table)
    screen.note("Note", f"{len(chosen)} of {result.values.shape[0]} units, {result.facts['seen']} images.", "dim")
    if saved is not None:
        screen.note("Saved", f"to {saved}: prisma.Result.load reads it.", "green")


def unit_facts(result: Result, unit: int) -> dict[str, Any]:
    """Return what was found of one unit, as JSON: mean, share above zero, histogram, and each example in order."""
    axis, tokens = result.axes[0], result.facts["tokens"]
    counts = result.tensors["histogram"][unit]
    ranks = zip(*(each[unit].tolist() for each in (result.values, *_places(result))), strict=True)
    rows: list[dict[str, Any]] = []
    for score, example, token in ranks:
        line = result.facts["examples"][str(example)]
        named = tokens[token] if tokens and token < len(tokens) else None
        rows.append({"score": score, "example": example, "place": token, "token": named, **line})
    return {
        "unit": unit,
        "label": result.labels[axis][unit] if axis in result.labels else None,
        "mean": float(result.tensors["mean"][unit]),
        "positive": float(result.tensors["positive"][unit] / counts.sum().clamp_min(1)),
        "histogram": counts.tolist(),
        "top": rows,
    }


def _places(result: Result) -> tuple[Tensor, Tensor]:
    return result.tensors["example"], result.tensors["token"]


def _chosen(result: Result, units: list[str] | None, show: int) -> list[int]:
    axis = result.axes[0]
    if units:
        labels = result.labels.get(axis, ())
        return [result.index(axis, each if each in labels or not each.isdecimal() else int(each)) for each in units]
    return result.values[:, 0].argsort(descending=True, stable=True)[:show].tolist()


# -------------------------------------------------------------------- what is searched


def _opened(
    source: str,
    data: str | None,
    name: str,
    of_pass: dict[str, Any],
    model: str | None,
    device: str | None,
    pretrained: bool,
    *,
    needs_model: bool,
) -> tuple[Harvest | Pass, Any]:
    """Return the harvest or the pass, and the model where it was loaded."""
    import prisma_core as prisma
    from prisma_harvest.opening import open_harvest
    from prisma_harvest.options import read_name, read_pos, read_source
    from prisma_harvest.passes import Pass

    how = {} if pretrained else {"pretrained": False}
    if not Path(source).is_dir():
        if data is None:
            raise InputError(f"{source} is no folder of a harvest; of a model, say its images: --data.")
        if model is not None:
            raise InputError(f"{source} is not a harvest, so it is the model itself: leave out --model.")
        loaded = prisma.load(source, device=device, **how)
        options = {"batch": 32, **of_pass, "pos": read_pos(of_pass.get("pos"))}
        return Pass(loaded, read_source(data, source), [read_name(name)], **options), loaded
    idle = {"data": data, **of_pass} | ({} if needs_model else {"model": model, "device": device})
    if given := [f"--{option.replace('_', '-')}" for option, value in idle.items() if value is not None]:
        raise InputError(
            f"{source} is a harvest, whose images and tokens are fixed, and a model is run for --text alone: leave out "
            f"{', '.join(given)}."
        )
    acts = open_harvest(source)
    if not needs_model:
        return acts, None
    reference = model or acts.manifest.model.reference
    if reference is None:
        raise InputError("This harvest does not say which model it is of: give --model REFERENCE.")
    loaded = prisma.load(reference, device=device, **how)
    acts.check_model(loaded)
    return acts, loaded
