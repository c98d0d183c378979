"""The facts of a model that is hooked where it stands: what it takes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from prisma_core.spec.layout import TokenLayout
from prisma_core.spec.parts import Facts, Side


class MapSpec(Facts):
    """The inputs of a model that has a hook map but no canonical form.

    Attributes:
        shape: of one input, the batch left out: ``(3, 224, 224)`` for an image, ``(8, 3, 224, 224)`` for a video.
        sizes: other lengths of the last axes it admits, such as heights and widths; none where the size is fixed.
        layout: which token is where along the ``pos`` axes of its hook points, at the native size; a ``pos`` beside an
            axis ``frame`` counts one frame's tokens. Of an input of another size there are more patches or fewer, as
            large as at the native one. None where ``pos`` counts something else.
        n_classes: the width of its head; None where there is none.
        pixels: height and width of the patches, where the output is the pixels of each patch, in the values of the
            input: ``[batch patch pixel]``, patches row by row, a patch's pixels in the order row, column, channel.
    """

    kind: Literal["map"] = "map"
    shape: tuple[int, ...] = Field(min_length=1)
    sizes: tuple[tuple[int, ...], ...] = ()
    layout: TokenLayout | None = None
    n_classes: int | None = Field(default=None, gt=0)
    pixels: tuple[Side, Side] | None = None
