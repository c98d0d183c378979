"""The attention viewer: every layer, head and token of a pass in one HTML file that needs no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from prisma_lens import head_scores
from prisma_lens.heads import layer_label
from torch import Tensor

from prisma_core import HookedDual, HookedModel, HookedText, InputError, NotApplicable, TokenLayout
from prisma_core.plugin import checked, open_image, shown
from prisma_view.colours import SCALE
from prisma_view.images import as_image, data_uri
from prisma_view.maps import Map, Stored, collect, fitted, label_of, pattern_names, store
from prisma_view.pages import framed, rendered, saved
from prisma_view.text import words_in
from prisma_view.words import token_name

TOUR = ("corner", "edge", "row", "column", "local", "modulus 2", "self", "cls", "registers", "previous_frame")
SEEN = 448


@dataclass(frozen=True)
class AttentionPage:
    """A page as text, with what was measured when it was made.

    Attributes:
        html: the page.
        pattern_error, score_error: how far the stored numbers are off, at most.
    """

    html: str
    pattern_error: float
    score_error: float

    @checked
    def save(self, path: str | Path) -> Path:
        """Write the page."""
        return saved(path, self.html)

    def _repr_html_(self) -> str:
        return framed(self.html, "Attention", 52)

    def __repr__(self) -> str:
        return (
            f"AttentionPage({len(self.html) / 1e6:.1f} MB, shares within {self.pattern_error:.1e}): save('page.html')"
        )


@checked
def attention_page(
    model: HookedModel,
    image: Any = None,
    *,
    text: str | None = None,
    layers: Sequence[int] | None = None,
    title: str = "",
    trained: bool = True,
) -> AttentionPage:
    """Return a page with the attention of every head on an image, a video or a text.

    Beside the image stands the head's matrix; pointing at a token shows what it attends to and what attends to it, as
    pattern or as scores.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> page = attention_page(model, torch.zeros(1, 3, 96, 96))
    >>> page.pattern_error < 1e-3
    True

    Args:
        model: any hooked model with patterns over all tokens or over windows. Of a pair of towers, ``text=`` takes the
            text tower, and ``image`` the vision tower.
        image: what ``model.preprocess`` takes (a path, a Pillow image, an array; frames of a video), or its result, a
            tensor ``[1 channel height width]`` or ``[1 frame channel height width]``.
        text: for text towers.
        layers: some layers only. Above 6 million weights neighbouring patches are taken together, which fewer layers
            avoid.
        title: by default the model's reference.
        trained: False states on the page that the weights are random.

    Raises:
        NotApplicable: the model has no such patterns.
        InputError: no image and no text, an unreadable image, or a model without preprocessing.
    """
    if (image is None) == (text is None):
        raise InputError(f"Expected an image or text=, one of them; got {'neither' if image is None else 'both'}.")
    reference = getattr(model, "reference", None)
    if isinstance(model, HookedDual):
        model = model.text if text is not None else model.vision
    if isinstance(model, HookedText) != (text is not None):
        raise InputError(
            f"{type(model).__name__} reads {'texts: pass text=' if text is None else 'images: pass image'}."
        )
    words, seen = [], None
    if text is not None:
        inputs = model.tokens(text)
        words, n_words = words_in(model, inputs[0])
        maps = _without_padding(collect(model, [inputs], layers), n_words)
        words, layout = words[: maps[0].pattern.shape[-1]], None
    else:
        inputs, seen = prepare(model, image)
        maps, layout = collect(model, [inputs], layers), model.layout_for(inputs)
    kinds = _kinds(model, inputs, layout, maps)
    maps, layout, side = fitted(maps, layout)
    stored = store(maps)
    frames = [] if words else frames_of(seen, layout)
    data = {
        "scale": SCALE,
        "layers": [{k: v for k, v in layer.items() if k != "data"} for layer in stored.layers],
        "steps": stored.steps,
        "side": side,
        "words": words,
        "place": _place(layout),
        "kinds": kinds,
        "start": _start(maps),
        "names": layout.token_names() if layout is not None else [],
    }
    html = rendered(
        "viewer.html.j2",
        title=title or reference or "this model",
        trained=trained,
        words=words,
        frames=[data_uri(frame) for frame in frames],
        packed=[layer["data"] for layer in stored.layers],
        facts=[*_facts(maps, layout, side, texts=text is not None), *_left_out(model, maps, layers), _stored(stored)],
        any_scores=any(layer["scores"] for layer in stored.layers),
        windows=any(layer["windows"] for layer in stored.layers),
        data=json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"),
    )
    return AttentionPage(html, stored.pattern_error, stored.score_error)


# ------------------------------------------------------------------ inputs


def prepare(model: Any, image: Any) -> tuple[Tensor, Any]:
    """Return an image as the model takes it, and as what it sees: an image, or the pixels of frames.

    Raises:
        InputError: the model does not know how to read images.
    """
    preprocess = getattr(model, "preprocess", None)
    if isinstance(image, Tensor) and image.is_meta:
        raise InputError(f"Expected an image, got {shown(image)} on meta, without data.")
    if isinstance(image, Tensor) and image.ndim >= 4:
        x = image[:1]
        pixels = preprocess.denormalise(x.float().cpu()).clamp(0, 1) if preprocess else x
        return x.to(model.input_like), pixels
    if preprocess is None:
        raise InputError("This model does not know how to read images: set model.preprocess, or give a tensor.")
    x = preprocess(image)
    if x.ndim == 5:
        seen: Any = preprocess.denormalise(x[:1]).clamp(0, 1)
    else:
        seen = preprocess.seen(open_image(image, channels=x.shape[1]), SEEN).convert("RGB")
    return x[:1].to(model.input_like), seen


def frames_of(seen: Any, layout: TokenLayout | None) -> list[Image]:
    """Return an image for each frame of the layout: the first of those that a patch takes together."""
    if not isinstance(seen, Tensor):
        return [seen]
    if seen.ndim == 4:
        return [as_image(seen)]
    wanted = layout.frames if layout is not None else seen.shape[1]
    return [as_image(seen[0, frame * seen.shape[1] // wanted]) for frame in range(wanted)]


def _without_padding(maps: list[Map], n: int) -> list[Map]:
    """Return maps of the first ``n`` tokens, or of all where one of those attends to the padding behind them."""
    if any((one.pattern[..., :n, n:] > 1e-6).any() for one in maps):
        return maps
    return [
        Map(one.name, one.pattern[..., :n, :n], None if one.scores is None else one.scores[..., :n, :n]) for one in maps
    ]


# ------------------------------------------------------------------ what the page is told


def _place(layout: TokenLayout | None) -> dict[str, Any] | None:
    if layout is None:
        return None
    prefix = [token_name(name) for name in layout.token_names()[: layout.n_prefix]]
    order = "row" if layout.order == "row column frame" else "frame"
    return {
        "prefix": prefix, "frames": layout.frames, "rows": layout.rows, "columns": layout.columns, "first": order
    }  # fmt: skip


def _kinds(
    model: HookedModel, inputs: Tensor, layout: TokenLayout | None, maps: list[Map]
) -> dict[str, list[list[float]]]:
    """Return for each kind of token how much more of each head's attention falls on it than if it were uniform.

    Rows are the maps'; of a map that has no scores, as within windows, none falls on any.
    """
    if layout is None:
        return {}
    try:
        scores = head_scores(model, inputs)
    except NotApplicable:
        return {}
    more = scores.values - scores.tensors["baseline"][:, None, None].to(scores.values)
    names, scored = scores.names("kind"), scores.names("layer")
    labels = [layer_label([one.name]) for one in maps]
    rows = [more[:, scored.index(label)] if label in scored else torch.zeros_like(more[:, 0]) for label in labels]
    return {
        kind: [[round(x, 4) for x in row[names.index(kind)].tolist()] for row in rows] for kind in TOUR if kind in names
    }


def _start(maps: list[Map]) -> list[int]:
    """Return the layer and head to begin with: in the last layer, the one whose first token is choosiest."""
    first = maps[-1].pattern[0, :, 0].clone()
    first[..., 0] = 0
    return [len(maps) - 1, int((first**2).sum(-1).argmax())]


def _facts(maps: list[Map], layout: TokenLayout | None, side: int, *, texts: bool) -> list[str]:
    heads = sum(m.pattern.shape[1] for m in maps)
    tokens = sorted({m.pattern.shape[2] for m in maps})
    facts = [f"{len(maps)} layers, {heads} heads, {' or '.join(map(str, tokens))} tokens."]
    if side > 1:
        facts.append(f"To keep this page light, groups of {side} by {side} patches are taken together.")
    if layout is not None and layout.frames > 1 and not all(m.within for m in maps):
        facts.append(f"{layout.frames} frames, from left to right and top to bottom.")
    if any(m.within == "window" for m in maps):
        facts.append("Windows are numbered row by row, of the shifted image where a block shifts them.")
    if texts and any((m.pattern == 0).any() for m in maps):
        facts.append("Grey tokens are masked: a token does not attend to those behind it, nor to padding.")
    if not texts and layout is None and any(m.grid is None for m in maps):
        facts.append("Tokens without a row and a column stand in the model's own order, which is not the image's.")
    return facts


def _left_out(model: HookedModel, maps: list[Map], layers: Sequence[int] | None) -> list[str]:
    names, shown = pattern_names(model), {m.name for m in maps}
    chosen = names if layers is None else [names[layer] for layer in layers]
    pooled = [label_of(sides[0]) for sides in chosen if sides[0] not in shown]
    return [f"Left out, for their queries are pooled: {', '.join(pooled)}."] if pooled else []


def _stored(stored: Stored) -> str:
    exact = f" and scores within {stored.score_error:.1g}" if any(layer["scores"] for layer in stored.layers) else ""
    return (
        f"Stored in {stored.steps} steps a row: shares are within {stored.pattern_error:.1g}{exact} of what the model "
        "computed."
    )
