"""The page: one HTML file that holds everything, opens without a server and asks no network."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from prisma_core import TokenLayout
from prisma_core.plugin import checked
from prisma_view.colours import CLASSES, QUIET, REST, SCALE, Colour, assign
from prisma_view.findings import Report, head_values
from prisma_view.glyphs import look
from prisma_view.images import data_uri
from prisma_view.pack import grouped, pack, pack_patterns
from prisma_view.pages import rendered, saved
from prisma_view.words import component_name, facts, lens_words, patch_words, rest_name, stage_name, token_name, verdict

GUESSES = 3
"""Number of classes shown for a patch."""


@checked
def write_page(found: Report, path: str | Path, *, trained: bool = True, command: str = "prisma demo") -> Path:
    """Write the page of a report.

    >>> from prisma_view import report
    >>> import tempfile
    >>> import prisma_core as prisma
    >>> from prisma_toy import sample_scene
    >>> model = prisma.load("toy:scenes-3l")
    >>> found = report(model, sample_scene(0).image, sample_scene(3).image)
    >>> write_page(found, tempfile.mkdtemp() + "/page.html").name
    'page.html'

    Args:
        trained: False says on the page that the weights are random.
        command: what made the page, for its last line.
    """
    colours = class_colours(found)
    text = rendered(
        "page.html.j2",
        report=found,
        name=found.model.reference or "this model",
        trained=trained,
        command=command,
        image=data_uri(found.image),
        other=data_uri(found.other),
        verdict=verdict(found),
        lens_words=lens_words(found),
        facts=facts(found.model),
        patch_words={} if found.patching is None else {w: patch_words(found, w) for w in found.patching.change},
        data=json.dumps(_data(found, colours), separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"),
    )
    return saved(path, text)


def class_colours(found: Report) -> dict[int, Colour]:
    """Return a colour for every class the lens names, the most frequent ones apart."""
    if found.lens is None:
        return assign(found.shown[: len(CLASSES)], lambda index: look(found.symbol(index).emoji))
    stages = found.lens.logits.argmax(-1)
    counts = Counter(stages.flatten().tolist())
    for index in stages[-1].tolist():
        counts[index] += 10  # the last layer is looked at most
    order = [index for index, _ in counts.most_common()]
    chosen = assign(order[: len(CLASSES)], lambda index: look(found.symbol(index).emoji))
    return {index: chosen.get(index, REST) for index in order}


def _data(found: Report, colours: dict[int, Colour]) -> dict[str, Any]:
    probabilities = found.logits.softmax(-1)
    best = found.logits.topk(min(6, len(found.logits))).indices.tolist()
    used = {*found.shown, *best, *colours}
    lens = None if found.lens is None else _lens(found, used)
    patching = None if found.patching is None else _patching(found, used)
    return {
        "layout": _layout(found.layout),
        "symbols": {index: [*found.symbol(index), colours.get(index, REST)] for index in sorted(used)},
        "quiet": [index for index, colour in colours.items() if colour == QUIET],
        "shown": found.shown,
        "logits": _numbers(found.logits[found.shown]),
        "top": [[index, _number(found.logits[index]), _number(probabilities[index], 4)] for index in best],
        "scale": SCALE,
        "lens": lens,
        "attention": _attention(found),
        "layers": found.layers
        and {
            "labels": [component_name(label) for label in found.layers.names("component")],
            "values": _numbers(found.layers.values),
            "constant": _numbers(found.layers.tensors["constant"][0]),
            "rest": rest_name(found),
        },
        "heads": found.heads
        and {
            "values": _numbers(head_values(found)),
            "rest": _numbers((found.heads.tensors["rest"] + found.heads.tensors["constant"])[0]),
        },
        "patching": patching,
    }


def _layout(layout: TokenLayout) -> dict[str, Any]:
    prefix = [token_name(name) for name in layout.token_names()[: layout.n_prefix]]
    return {"rows": layout.rows, "columns": layout.columns, "prefix": prefix}


def _lens(found: Report, used: set[int]) -> dict[str, Any]:
    assert found.lens is not None
    logits = found.lens.logits
    values, classes = logits.topk(min(GUESSES, logits.shape[-1]))
    chances = logits.softmax(-1).gather(-1, classes)
    used |= set(classes.flatten().tolist())
    return {
        "stages": [stage_name(stage) for stage in found.lens.stages],
        "classes": pack(classes.cpu().numpy().astype("uint16")),
        "logits": pack(values.float().cpu().numpy().round(2)),
        "chances": pack(chances.float().cpu().numpy().round(4)),
        "maps": pack(logits[..., found.shown].float().cpu().numpy().round(2)),
    }


def _attention(found: Report) -> dict[str, Any]:
    patterns, layout, side = grouped(found.patterns, found.layout)
    return {**_layout(layout), "side": side, **pack_patterns(patterns)}


def _patching(found: Report, used: set[int]) -> dict[str, Any]:
    assert found.patching is not None
    used |= {found.patching.kept, found.patching.put}
    for guess in found.patching.guess.values():
        used |= set(guess.flatten().tolist())
    return {
        "kept": found.patching.kept,
        "put": found.patching.put,
        "before": _number(found.patching.before),
        "other": _number(found.patching.other),
        "change": {where: _numbers(change) for where, change in found.patching.change.items()},
        "guess": {where: guess.tolist() for where, guess in found.patching.guess.items()},
    }


def _numbers(tensor: Tensor) -> Any:
    return tensor.double().mul(1000).round().div(1000).tolist()


def _number(value: Any, digits: int = 3) -> float:
    return round(float(value), digits)
