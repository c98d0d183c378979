"""The same panels as still pictures: PNG files for papers, slides and posts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont
from torch import Tensor

from prisma_core.plugin import checked, replacing
from prisma_view.colours import LESS, MORE, QUIET, REST, SCALE, Colour, blend
from prisma_view.findings import Report, head_values
from prisma_view.glyphs import glyph
from prisma_view.page import class_colours
from prisma_view.words import component_name, rest_name, stage_name

PAPER: Colour = (251, 250, 248)
INK: Colour = (22, 24, 29)
SOFT: Colour = (92, 98, 112)
ZERO: Colour = (241, 239, 234)
MARGIN = 48
MOST_STAGES = 4
BAND = 54
WARNING: Colour = (176, 62, 8)
LEGEND_ROWS, LEGEND_STEP = 3, 38


@checked
def write_pictures(found: Report, folder: str | Path, *, trained: bool = True) -> list[Path]:
    """Write ``lens.png``, ``attention.png``, ``attribution.png`` and ``patching.png``, those that apply.

    Args:
        trained: False says on each that the weights are random.
    """
    drawn: dict[str, Callable[[Report], Image.Image]] = {"attention": attention}
    if found.lens is not None:
        drawn = {"lens": lens, **drawn}
    if found.layers is not None:
        drawn["attribution"] = attribution
    if found.patching is not None:
        drawn["patching"] = patching
    paths: list[Path] = []
    for name, draw in drawn.items():
        paths.append(Path(folder) / f"{name}.png")
        sheet = draw(found)
        with replacing(paths[-1]) as fresh:
            (sheet if trained else _under_warning(sheet)).save(fresh, optimize=True)
    return paths


def _under_warning(sheet: Image.Image) -> Image.Image:
    """Return a sheet under a band that says that its weights are random."""
    made = Image.new("RGB", (sheet.width, sheet.height + BAND), WARNING)
    made.paste(sheet, (0, BAND))
    _text(made, (MARGIN, 12), "Random weights: nothing here was learned.", 26, PAPER)
    return made


def lens(found: Report, side: int = 420) -> Image.Image:
    """Draw the picture and the emoji logit lens at some layers, the last one among them."""
    assert found.lens is not None
    n = len(found.lens.stages)
    count = min(MOST_STAGES, n)
    stages = [round(1 + index * (n - 2) / max(1, count - 1)) for index in range(count)] if n > count else list(range(n))
    width, height = _fitted(found.picture, side)
    gap, top = 28, 108
    colours = class_colours(found)
    across = 2 * MARGIN + (width + gap) * (len(stages) + 1) - gap
    legend = _legend(found, stages, across, colours)
    sheet = _sheet(across, top + height + 80 + LEGEND_STEP * len(legend))
    _text(sheet, (MARGIN, 30), "What each patch says, layer by layer", 34)
    panels = [("the picture", found.picture.resize((width, height), Image.Resampling.LANCZOS))]
    for stage in stages:
        panels.append((stage_name(found.lens.stages[stage]), lens_panel(found, stage, width, height, colours)))
    for index, (title, panel) in enumerate(panels):
        left = MARGIN + index * (width + gap)
        sheet.paste(panel, (left, top), _rounded(panel.size, 14))
        _text(sheet, (left, top + height + 10), title, 20, SOFT)
    for row, entries in enumerate(legend):
        for left, name, emoji, colour in entries:
            at = top + height + 58 + LEGEND_STEP * row
            ImageDraw.Draw(sheet).rounded_rectangle((left, at + 2, left + 24, at + 26), 5, fill=colour)
            drawn = None if emoji is None else glyph(emoji, 28)
            if drawn is not None:
                sheet.paste(drawn, (left + 33, at), drawn)
            _text(sheet, (left + (34 if emoji is None else 70), at), name, 22)
    return sheet


def lens_panel(found: Report, stage: int, width: int, height: int, colours: Mapping[int, Colour]) -> Image.Image:
    """Draw one layer of the lens over the picture: a colour and an emoji for each patch."""
    assert found.lens is not None
    layout = found.layout
    logits = found.lens.logits[stage, layout.slice("patches")]
    classes = logits.argmax(-1).view(layout.rows, layout.columns).tolist()
    chances = logits.softmax(-1).amax(-1).view(layout.rows, layout.columns).tolist()
    panel = found.picture.resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    wash = Image.new("RGBA", panel.size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(wash)
    size = round(0.66 * min(width / layout.columns, height / layout.rows))
    for row, line in enumerate(classes):
        for column, index in enumerate(line):
            left, right = (round(width * (column + step) / layout.columns) for step in (0, 1))
            top, bottom = (round(height * (row + step) / layout.rows) for step in (0, 1))
            faint = colours[index] == QUIET
            pen.rectangle((left, top, right - 1, bottom - 1), fill=(*colours[index], 107 if faint else 168))
            white = (255, 255, 255, 235)
            if column + 1 < layout.columns and line[column + 1] != index:
                pen.rectangle((right - 2, top, right, bottom), fill=white)
            if row + 1 < layout.rows and classes[row + 1][column] != index:
                pen.rectangle((left, bottom - 2, right, bottom), fill=white)
    panel = Image.alpha_composite(panel, wash)
    for row, line in enumerate(classes):
        for column, index in enumerate(line):
            drawn = glyph(found.symbol(index).emoji, size) if size >= 9 else None
            if drawn is None:
                continue
            strength = (0.4 + 0.6 * chances[row][column]) * (0.45 if colours[index] == QUIET else 1)
            alpha = drawn.getchannel("A").point(lambda a, s=strength: a * s)
            faded = Image.merge("RGBA", (*drawn.split()[:3], alpha))
            x, y = width * (column + 0.5) / layout.columns, height * (row + 0.5) / layout.rows
            at = (round(x - size / 2), round(y - size / 2))
            shadow = Image.new("RGBA", drawn.size, (0, 0, 0, 0))
            shadow.putalpha(ImageChops.offset(alpha, 1, 1).point(lambda a: a * 0.7))
            panel.alpha_composite(shadow, at)
            panel.alpha_composite(faded, at)
    return panel.convert("RGB")


def attention(found: Report, side: int = 150) -> Image.Image:
    """Draw where every head reads from for the class token, or for the middle patch where there is none."""
    layout = found.layout
    layers, heads = found.patterns.shape[:2]
    side = max(48, min(side, 1800 // heads))
    query = 0 if layout.cls else layout.n_prefix + layout.n_patches // 2 + layout.columns // 2
    weights = found.patterns[:, :, query, layout.slice("patches")].float().cpu()
    weights = weights / weights.amax(-1, keepdim=True).clamp_min(1e-9)
    weights = weights.view(layers, heads, layout.rows, layout.columns)
    width, height = _fitted(found.picture, side)
    left, top = MARGIN + 60, 150
    sheet = _sheet(max(left + heads * (width + 8) + MARGIN, 760), top + layers * (height + 8) + MARGIN)
    _text(sheet, (MARGIN, 30), "Where every head looks", 34)
    who = "the class token" if layout.cls else "the patch in the middle"
    _text(sheet, (MARGIN, 76), f"seen from {who}; bright is the most, one row a block, one column a head", 20, SOFT)
    for layer in range(layers):
        _text(sheet, (MARGIN, top + layer * (height + 8) + height // 2 - 12), str(layer), 20, SOFT)
        for head in range(heads):
            if layer == 0:
                _text(sheet, (left + head * (width + 8) + width // 2 - 6, top - 32), str(head), 20, SOFT)
            drawn = Image.fromarray(_scaled(weights[layer, head].numpy()))
            drawn = drawn.resize((width, height), Image.Resampling.NEAREST)
            at = (left + head * (width + 8), top + layer * (height + 8))
            sheet.paste(drawn, at, _rounded(drawn.size, 8))
    return sheet


def attribution(found: Report) -> Image.Image:
    """Draw what each layer and each head wrote towards the best guess."""
    assert found.layers is not None
    at = found.shown.index(found.best)
    rows = [component_name(label) for label in found.layers.names("component")] + [rest_name(found)]
    values = [*found.layers.values[:, at].tolist(), float(found.layers.tensors["constant"][0, at])]
    grid = None if found.heads is None else head_values(found)[..., at]
    height = 150 + max(34 * len(rows), 0 if grid is None else _grid_size(grid, 560)[1] + 40) + MARGIN
    sheet = _sheet(820 if grid is None else 1480, height)
    _title(sheet, f"Who wrote “{found.symbol(found.best).name}”?", found.symbol(found.best).emoji)
    _text(sheet, (MARGIN, 84), "orange speaks for it, blue against it", 20, SOFT)
    most = max(map(abs, values)) or 1.0
    pen = ImageDraw.Draw(sheet)
    for index, (row, value) in enumerate(zip(rows, values, strict=True)):
        top = 140 + 34 * index
        _text(sheet, (MARGIN, top), row, 20)
        middle, width = 440, round(190 * abs(value) / most)
        pen.line((middle, top - 2, middle, top + 28), fill=SOFT)
        box = (middle, top + 2, middle + width, top + 22) if value > 0 else (middle - width, top + 2, middle, top + 22)
        pen.rounded_rectangle(box, 3, fill=MORE if value > 0 else LESS)
        _text(sheet, (660, top), _signed(value, 2), 20, SOFT)
    if grid is not None:
        _text(sheet, (830, 84), "each head: one row a block, one column a head", 20, SOFT)
        _heat(sheet, grid, (830, 150), 560)
    return sheet


def patching(found: Report) -> Image.Image:
    """Draw what each head's output from the second picture does to the lead of the first picture's class."""
    assert found.patching is not None
    where, change = next(iter(found.patching.change.items()))
    guess = found.patching.guess[where]
    kept, put = found.symbol(found.patching.kept), found.symbol(found.patching.put)
    sheet = _sheet(1280, max(470, 170 + _grid_size(change, 620)[1] + MARGIN))
    _text(sheet, (MARGIN, 30), "One head from another picture", 34)
    words = f"what it does to the lead of {kept.name} over {put.name}, {found.patching.before:+.1f}"
    _text(sheet, (MARGIN, 78), f"{words}; an emoji marks a new answer", 20, SOFT)
    for index, picture in enumerate((found.picture, found.other)):
        width, height = _fitted(picture, 230)
        small = picture.resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(small, (MARGIN + index * 250, 150), _rounded(small.size, 12))
        _text(sheet, (MARGIN + index * 250, 160 + height), ("first", "second")[index], 20, SOFT)
    marks = [[found.symbol(index).emoji if index != found.best else "" for index in line] for line in guess.tolist()]
    _heat(sheet, change, (620, 150), 620, marks)
    return sheet


# -------------------------------------------------------------------- pieces


def _sheet(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), PAPER)


def _text(sheet: Image.Image, at: tuple[int, int], words: str, size: int, colour: Colour = INK) -> float:
    font = ImageFont.load_default(size)
    ImageDraw.Draw(sheet).text(at, words, font=font, fill=colour)
    return font.getlength(words)


def _title(sheet: Image.Image, words: str, emoji: str) -> None:
    drawn = glyph(emoji, 40)
    if drawn is not None:
        sheet.paste(drawn, (MARGIN, 28), drawn)
    _text(sheet, (MARGIN + (0 if drawn is None else 54), 30), words.replace("“", '"').replace("”", '"'), 34)


def _legend(
    found: Report, stages: Sequence[int], width: int, colours: Mapping[int, Colour]
) -> list[list[tuple[int, str, str | None, Colour]]]:
    """Return the rows of a legend of every class that the panels show: where, its name, emoji and colour.

    Classes without a colour of their own, and what three rows do not hold, are named together.
    """
    assert found.lens is not None
    shown = found.lens.logits[list(stages)][:, found.layout.slice("patches")].argmax(-1)
    classes, counts = shown.unique(return_counts=True)
    ordered = classes[counts.argsort(descending=True)].tolist()
    font = ImageFont.load_default(22)
    rows: list[list[tuple[int, str, str | None, Colour]]] = [[]]
    left, left_out = MARGIN, [index for index in ordered if colours[index] == REST]
    kept = [index for index in ordered if colours[index] != REST]
    for place, index in enumerate(kept):
        symbol = found.symbol(index)
        needed = 70 + round(font.getlength(symbol.name)) + 32
        last = len(rows) == LEGEND_ROWS  # whose end is for those left out
        if rows[-1] and left + needed > width - MARGIN - (240 if last else 0):
            if last:
                left_out += kept[place:]
                break
            rows.append([])
            left = MARGIN
        rows[-1].append((left, symbol.name, symbol.emoji, colours[index]))
        left += needed
    if left_out:
        words = f"{len(left_out)} other {'class' if len(left_out) == 1 else 'classes'}"
        if left + 34 + font.getlength(words) > width - MARGIN:
            rows.append([])
            left = MARGIN
        rows[-1].append((left, words, None, REST))
    return rows


def _fitted(picture: Image.Image, side: int) -> tuple[int, int]:
    return side, round(side * picture.height / picture.width)


def _rounded(size: tuple[int, int], radius: int) -> Image.Image:
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), radius, fill=255)
    return mask


def _scaled(share: np.ndarray) -> np.ndarray:
    """Return shares in 0..1 as colours: ``[... ] -> [... 3]``."""
    stops = np.linspace(0, 1, len(SCALE))
    channels: Sequence[np.ndarray] = [np.interp(share, stops, [colour[i] for colour in SCALE]) for i in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text if float(text) else text[1:]


def _grid_size(values: Tensor, width: int) -> tuple[int, int]:
    layers, heads = values.shape
    step = min(96, (width - 40) // heads)
    return step * heads, step * layers


def _heat(
    sheet: Image.Image, values: Tensor, at: tuple[int, int], width: int, marks: list[list[str]] | None = None
) -> None:
    layers, heads = values.shape
    step = _grid_size(values, width)[0] // heads
    most = float(values.abs().max()) or 1.0
    pen = ImageDraw.Draw(sheet)
    for layer in range(layers):
        _text(sheet, (at[0], at[1] + layer * step + step // 2 - 10), str(layer), 18, SOFT)
        for head in range(heads):
            value = float(values[layer, head])
            left, top = at[0] + 36 + head * step, at[1] + layer * step
            if layer == 0:
                _text(sheet, (left + step // 2 - 8, top - 26), str(head), 18, SOFT)
            strength = (abs(value) / most) ** 0.5
            colour = blend(ZERO, MORE if value > 0 else LESS, strength)
            pen.rounded_rectangle((left, top, left + step - 4, top + step - 4), 7, fill=colour)
            drawn = glyph(marks[layer][head], step // 2) if marks and marks[layer][head] else None
            if drawn is not None:
                sheet.paste(drawn, (left + step // 4 - 2, top + step // 10), drawn)
            if step >= 60:
                lower = step * 5 // 8 if drawn else step // 2 - 12
                ink = PAPER if strength > 0.75 else INK
                _text(sheet, (left + step // 2 - 20, top + lower), _signed(value, 1), 18, ink)
