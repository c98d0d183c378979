"""The numbers of a page: one pass with a cache, one lens, two attributions, and a patch of every head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL.Image import Image
from prisma_lens import LENS_NAMES, Lens, attribute, logit_lens, names_for
from prisma_patch import patch_heads
from torch import Tensor

from prisma_core import HookedViT, InputError, NotApplicable, Result, TokenLayout, UnknownName
from prisma_core.plugin import BriefRepr, checked, layer_of, open_image
from prisma_view.symbols import Symbol, symbol

SHOWN = 8
"""Number of classes that can be picked on the page: at least the model's best guesses."""

FEW_HEADS = 72
"""Up to so many heads, each is also patched at the class token alone; for more, that takes too long."""


@dataclass(repr=False)
class Patching(BriefRepr):
    """Effects of swapping heads between two images.

    Attributes:
        kept, put: the classes whose logit difference is watched: the first image's and the second's best guess.
        before, other: that difference on the first and the second image.
        change: what it does to the difference ``[layer head]``, by where heads are replaced: ``all`` tokens, ``cls``.
        guess: the best guess after it, ``[layer head]``.
    """

    kept: int
    put: int
    before: float
    other: float
    change: dict[str, Tensor] = field(default_factory=dict)
    guess: dict[str, Tensor] = field(default_factory=dict)


@dataclass(repr=False)
class Report(BriefRepr):
    """Everything a page shows of one model and one image. A part that does not apply is None and says why in ``why``.

    Attributes:
        image, other: what the model sees of the two images, at more pixels than it gets.
        layout: where the patches are.
        logits: ``[class]``.
        shown: the classes that can be picked, best guesses first.
        lens: of one image: ``[stage pos class]``.
        patterns: ``[layer head query_pos key_pos]``.
        layers, heads: attributions to the shown classes, ``[component class]`` and ``[layer head class]``.
    """

    model: HookedViT = field(repr=False)
    image: Image
    other: Image
    layout: TokenLayout
    logits: Tensor
    shown: list[int]
    patterns: Tensor
    lens: Lens | None = None
    layers: Result | None = None
    heads: Result | None = None
    patching: Patching | None = None
    why: dict[str, str] = field(default_factory=dict)

    @checked
    def symbol(self, index: int) -> Symbol:
        """Return how a class is shown."""
        n = self.logits.shape[-1]
        if not 0 <= index < n:
            raise UnknownName(f"No class {index}: they run from 0 to {n - 1}.")
        labels = self.model.labels
        return symbol(labels[index]) if labels else symbol(f"class {index}")

    @property
    def best(self) -> int:
        return int(self.logits.argmax())


@checked
def report(model: HookedViT, image: Any, other: Any, *, progress: bool = False) -> Report:
    """Return everything a page shows.

    >>> import tempfile
    >>> import prisma_core as prisma
    >>> from prisma_toy import sample_scene
    >>> model = prisma.load("toy:scenes-3l")
    >>> found = report(model, sample_scene(0).image, sample_scene(3).image)
    >>> found.logits.shape
    torch.Size([12])

    Args:
        model: a classifier with its preprocessing.
        image: what ``model.preprocess`` takes: a path, a Pillow image or an array.
        other: a second image, whose heads' outputs are put into the run on the first.
        progress: show a bar while heads are patched.

    Raises:
        InputError: an image that is none, or a model that does not know how to read images.
        NotApplicable: the model is no image classifier.
    """
    if model.spec.n_classes is None:
        raise NotApplicable("This model has no classification head; the page is about what a classifier sees.")
    if not model.preprocess:
        raise InputError("This model does not know how to read images: set model.preprocess.")
    images = [open_image(each, channels=model.spec.embed.in_channels) for each in (image, other)]
    inputs = [model.preprocess(each).to(model.input_like) for each in images]
    patterns = [name for name in model.resolve("hook_pattern") if layer_of(name) is not None]
    with torch.no_grad():
        names = {*model.resolve(LENS_NAMES), *patterns, *names_for(model), *names_for(model, "head")}
        logits, cache = model.run_with_cache(inputs[0], names=names)
        if cache.layout is None or cache.layout.frames > 1:
            raise NotApplicable("The page shows images; this model reads films.")
        found = Report(
            model, *(_seen(model, each) for each in images), cache.layout, logits[0], [],
            _by_layer([cache[name][0] for name in patterns], patterns),
        )  # fmt: skip
        lens = _try(found, "lens", lambda: logit_lens(model, cache))
        found.lens = lens and lens.sel(batch=0)
        found.shown = _shown(logits[0], found.lens)
        found.layers = _try(found, "layers", lambda: attribute(model, cache, found.shown).sel(batch=0))
        found.heads = _try(found, "heads", lambda: attribute(model, cache, found.shown, by="head").sel(batch=0))
        found.patching = _try(found, "patching", lambda: _patching(model, inputs[0], inputs[1], progress))
    return found


def head_values(found: Report) -> Tensor:
    """Return the heads' attributions ``[layer head class]`` of a report that has them."""
    assert found.heads is not None
    return found.heads.values


def _seen(model: HookedViT, image: Image) -> Image:
    """Return the part of an image that the model sees, at no fewer than 448 pixels a side."""
    assert model.preprocess
    return model.preprocess.seen(image, 448).convert("RGB")


def _by_layer(patterns: list[Tensor], names: list[str]) -> Tensor:
    layers = [layer_of(name) for name in names]
    placed = list(zip(patterns, layers, strict=True))
    heads = [torch.cat([pattern for pattern, at in placed if at == layer]) for layer in dict.fromkeys(layers)]
    if len({each.shape for each in heads}) > 1:
        raise NotApplicable("The layers of this model have different numbers of heads; the page shows them as a grid.")
    return torch.stack(heads)


def _try(found: Report, part: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (NotApplicable, InputError) as error:
        found.why[part] = str(error)
        return None


def _shown(logits: Tensor, lens: Lens | None) -> list[int]:
    best = logits.topk(min(SHOWN - 2, len(logits))).indices.tolist()
    if len(logits) <= 16:
        return logits.argsort(descending=True).tolist()
    if lens is None:
        return best
    common = [index for index, _ in Counter(lens.logits[-1].argmax(-1).tolist()).most_common(SHOWN)]
    return list(dict.fromkeys([*best, *common]))[: SHOWN + 4]


def _patching(model: HookedViT, clean: Tensor, other: Tensor, progress: bool) -> Patching:
    logits, others = model(clean)[0], model(other)[0]
    kept = int(logits.argmax())
    put = next(index for index in others.argsort(descending=True).tolist() if index != kept)
    found = Patching(kept, put, float(logits[kept] - logits[put]), float(others[kept] - others[put]))
    n_heads = sum(block.attn.n_heads for block in model.spec.blocks)
    places: dict[str, int | None] = {"all": None}
    if model.spec.pool.kind == "token" and n_heads <= FEW_HEADS:
        places["cls"] = 0
    for where, pos in places.items():
        change = patch_heads(model, clean, other, lambda out: out, pos=pos, progress=progress).values[:, :, 0]
        found.change[where] = change[..., kept] - change[..., put]
        found.guess[where] = (logits + change).argmax(-1)
    return found
