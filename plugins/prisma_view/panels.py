"""What a section of an overview is made of, and what it is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from einops import rearrange
from PIL import Image
from prisma_lens.inputs import vision_of
from torch import Tensor

from prisma_core import HookedDual, Result, TokenLayout
from prisma_core.plugin import BriefRepr
from prisma_view.figures import Figure, plot

SIDE = 288
"""Pixels of the longer side of an image that is drawn from one value for each patch, at least."""
GAP = 2
"""Pixels of the line between frames side by side, on either side."""
STAGES = 3
"""Layers that are shown of a deep model: the first, the last, and those between them."""
T = TypeVar("T")


@dataclass(frozen=True)
class Section:
    """A heading, a sentence, and figures or images (as data URIs, with what they show in words)."""

    title: str
    words: str
    figures: tuple[Figure, ...] = ()
    images: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, repr=False)
class Subject(BriefRepr):
    """A model and the input that it is looked at with.

    Attributes:
        x: the input, one image or video.
        seen: what the model sees of it: an image, or the pixels of frames ``[1 frame channel height width]``.
        words: texts for a dual encoder to tell apart.
    """

    model: Any = field(repr=False)
    x: Tensor
    seen: Any
    words: tuple[str, ...] = ()

    @property
    def tower(self) -> Any:
        """The part of the model that sees the input."""
        return vision_of(self.model)

    @cached_property
    def layout(self) -> TokenLayout | None:
        return self.tower.layout_for(self.x)

    @cached_property
    def output(self) -> Tensor:
        """The model's output; of a dual encoder the probabilities of its words, ``[1 word]``."""
        with torch.no_grad():
            if isinstance(self.model, HookedDual):
                return self.model.classify(self.x, list(self.words), template="{}")
            return self.model(self.x)

    @cached_property
    def still(self) -> Any:
        """The image that lies under patches: frames of a video side by side, one for each that patches have."""
        if not isinstance(self.seen, Tensor) or self.seen.ndim < 5:
            return self.seen
        n = 1 if self.layout is None else self.layout.frames
        return enlarged(self.seen[0, :: self.seen.shape[1] // n].movedim(-3, -1))

    def patches(self, values: Tensor, title: str, unit: str, names: tuple[str, tuple[str, ...]]) -> Figure:
        """Return values of tokens ``[panel pos]`` over the image, frames side by side.

        Args:
            names: what a panel is, and its labels.

        Raises:
            InputError: the values are of other tokens than the layout's.
        """
        layout, (axis, labels) = self.layout, names
        assert layout is not None
        axes, about = (axis, "pos"), {axis: labels}
        if layout.frames > 1:
            values = rearrange(layout.grid(values, axis=1), "n frame row column -> n row (frame column)")
            axes = (axis, "row", "column")
        else:
            about["pos"] = tuple(layout.token_names()[layout.n_tokens - values.shape[-1] :])
        result = Result(values, axes, about, technique=title, unit=unit)
        return plot(result, kind="patches", image=self.still)


def spread(items: Sequence[T], n: int = STAGES) -> list[T]:
    """Return up to ``n`` items at even distances, the first and the last among them.

    >>> spread("abcdefg", 3)
    ['a', 'd', 'g']
    """
    places = [round(at * (len(items) - 1) / max(1, n - 1)) for at in range(n)]
    return [items[at] for at in dict.fromkeys(places)]


def enlarged(pixels: Tensor) -> Image.Image:
    """Return pixels ``[row column channel]`` in 0..1, or frames of them side by side, as an image without smoothing."""
    rows = pixels if pixels.ndim == 3 else pixels.transpose(0, 1).flatten(1, 2)
    times = max(1, SIDE // max(pixels.shape[-3:-1]))
    bytes_ = (rows.float().cpu().clamp(0, 1) * 255).round().byte().expand(-1, -1, 3)
    small = Image.fromarray(bytes_.contiguous().numpy())
    large = small.resize((small.width * times, small.height * times), Image.Resampling.NEAREST)
    for at in range(1, pixels.shape[0] if pixels.ndim == 4 else 1):  # a line between frames, over their edges
        edge = at * pixels.shape[2] * times
        large.paste("white", (edge - GAP, 0, edge + GAP, large.height))
    return large
