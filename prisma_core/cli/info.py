"""``prisma info``: a model's facts, tokens and hook points, without its weights."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any, cast

import typer
from rich.table import Table
from rich.text import Text

from prisma_core.cli.outline import outline, shapes
from prisma_core.hooks.model import HookedModel
from prisma_core.spec import AnySpec, DualSpec, Facts, MapSpec, ModelSpec, brief
from prisma_core.toolbox.screen import out, show, show_json, table

WIDE = 130  # columns that the table of hook points needs to have each on one line
REFERENCE = Annotated[str, typer.Argument(help="SOURCE:MODEL, such as timm:vit_base_patch16_224.", show_default=False)]


def info(
    reference: REFERENCE,
    pattern: Annotated[
        str | None, typer.Option("--filter", help="Only hook points this glob or shorthand selects, one by one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON, every hook point by itself.")] = False,
) -> None:
    """Show a model's facts, tokens and hook points with their shapes."""
    model = outline(reference)
    rows = hook_rows(model, pattern)
    if as_json:
        show_json({"reference": reference, **_facts(model), "hook_points": rows})
        return
    if pattern is None:
        facts = _facts(model)
        grid = table("fact", "value", title=Text(reference, style="bold"))
        grid.add_row("parameters", f"{facts['parameters']:,}")
        for label, text in _stated(model):
            grid.add_row(label, text)
        if facts["tokens"]:
            grid.add_row("tokens", f"{facts['tokens']['total']}: {facts['tokens']['order']}")
        show(grid)
        out().print()
    show(_points(rows if pattern is not None else folded(rows), narrow=sys.stdout.isatty() and out().width < WIDE))


def _points(rows: list[dict[str, Any]], *, narrow: bool) -> Table:
    """Return a table of hook points; a narrow one has a second column of two lines instead of three of one."""
    grid = table("hook point", *(["axes, shape and equation"] if narrow else ["axes", "shape", "equation"]))
    for row in rows:
        equation = row["equation"] + ("  (only when asked for by name)" if row["derived"] else "")
        shape = " ".join(map(str, row["shape"]))
        below = Text.assemble(f"{row['axes']} ", (f"({shape})", "dim"), "\n", (equation, "dim"))
        grid.add_row(row["name"], *([below] if narrow else [row["axes"], shape, equation]))
    return grid


def _stated(model: HookedModel) -> list[tuple[str, str]]:
    """Return rows of the facts of a model that are not what they are by default; each tower's under its name."""
    spec: Any = getattr(model, "spec", None)
    if not isinstance(spec, AnySpec):
        return []
    facts: dict[str, Any] = spec.model_dump(mode="json", exclude_defaults=True)
    towers = {f"{tower}.": facts.pop(tower) for tower in ("vision", "text") if isinstance(spec, DualSpec)}
    parts = {"": facts, **towers}
    return [
        (f"{prefix}{label}", text)
        for prefix, part in parts.items()
        for name, value in part.items()
        for label, text in _rows_of(name, value)
    ]


def hook_rows(model: HookedModel, pattern: str | None = None) -> list[dict[str, Any]]:
    """Return a row for every hook point: name, axes, shape, equation, derived."""
    sizes = shapes(model)
    points = model.hook_points()
    return [
        {
            "name": name,
            "axes": points[name].axes,
            "shape": list(sizes[name]),
            "equation": points[name].equation,
            "derived": points[name].derived,
        }
        for name in (points if pattern is None else model.resolve(pattern))
    ]


def folded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with those of layers that are alike written once: ``blocks.{0-11}.attn.hook_q``."""
    texts = ((row["name"], json.dumps({key: row[key] for key in row if key != "name"})) for row in rows)
    return [{"name": name, **json.loads(text)} for name, text in brief.folded(texts)]


def _facts(model: HookedModel) -> dict[str, Any]:
    spec: Any = getattr(model, "spec", None)
    layout: Any = getattr(model, "layout", None)
    preprocess: Any = getattr(model, "preprocess", None) or None
    text = None if preprocess is None else str(preprocess)  # a library's own code
    parts = [("class token", "cls"), ("distillation token", "distillation"), ("registers", "registers")]
    tokens = None
    if layout is not None:
        prefix = [f"{getattr(layout, key)} {name}" for name, key in parts if getattr(layout, key)]
        frames = f"{layout.frames} frames of " if layout.frames > 1 else ""
        order = ", ".join([*prefix, f"{frames}{layout.rows} x {layout.columns} patches"])
        tokens = {"total": layout.n_tokens, "order": order}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "spec": spec.model_dump(mode="json") if isinstance(spec, ModelSpec | MapSpec) else None,
        "tokens": tokens,
        "preprocess": preprocess.model_dump(mode="json") if isinstance(preprocess, Facts) else text,
    }


def _rows_of(name: str, value: Any) -> list[tuple[str, str]]:
    """Return a fact as rows of label and text; blocks that are alike once."""
    if name == "layout":
        return []
    if name != "blocks":
        return [(name, _brief(value))]
    groups: dict[str, list[int]] = {}
    for layer, block in enumerate(value):
        groups.setdefault(json.dumps(block), []).append(layer)
    rows: list[tuple[str, str]] = []
    for text, layers in groups.items():
        label = f"blocks.{brief.layer_range(layers)}"
        rows += [(f"{label}.{key}", _brief(part)) for key, part in json.loads(text).items()]
    return rows


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        parts = cast("dict[str, Any]", value).items()
        return "  ".join(f"{key}={_brief(part)}" for key, part in parts if part is not None) or "default"
    if isinstance(value, list):
        return " x ".join(map(str, cast("list[Any]", value)))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
