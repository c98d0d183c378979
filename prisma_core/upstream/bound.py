"""A row of a hook map with its hook point."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prisma_core.errors import PrismaError
from prisma_core.errors.arguments import in_transform
from prisma_core.hooks.point import HookPoint
from prisma_core.maps.places import Row
from prisma_core.toolbox.query_rows import AXIS, Rows
from prisma_core.upstream.observer import Observer


class BoundRow(Observer):
    """Applies the hooks of a hook point at the place of its row.

    Attributes:
        point: the hook point, with the row's axes and equation.
    """

    def __init__(self, row: Row, sizes: Mapping[str, int]):
        self.row = row
        self.place = row.place
        self.sizes = sizes
        self.point = HookPoint(row.axes, row.equation)

    def passed(self, x: Tensor, batch: int) -> Tensor:
        """Apply the hooks of the active scope to upstream's tensor, axes ordered as the row says."""
        sizes = {**self.sizes, "batch": batch}
        activation = self.row.read(x, sizes)
        if activation.ndim != len(self.row.axes.split()):
            raise PrismaError(
                f"The hook map says {self.row.hook} has the axes {self.row.axes!r}; {self.place} "
                f"holds {list(activation.shape)}."
            )
        activation = activation.clone()
        result = self.point(activation)
        if result is activation and not (torch.is_grad_enabled() and activation.requires_grad):
            return x
        return _laid_out_as(self.row.write(result, sizes), x)

    def rows(self) -> Rows | None:
        upstream = self.row.how.partition("->")[0].split()  # the queries stand last but one, or among others
        alone = upstream[-2:-1] == [AXIS] and AXIS not in self.sizes
        return Rows.asked(self.point) if alone else None

    def store(self, rows: Rows, x: Tensor, batch: int) -> None:
        rows.store(self.point, self.row.read(x, {**self.sizes, "batch": batch}))

    def missed(self) -> None:
        raise PrismaError(f"No tensor passes {self.place}; the hook map names it for {self.row.hook}.")


def _laid_out_as(y: Tensor, x: Tensor) -> Tensor:
    """Return a copy of y, which may be cached, in the memory layout of x, so that kernels add in the same order."""
    if in_transform() or any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True)):
        return y.clone()  # of what a transform holds, sizes and steps are not those in memory
    return torch.empty_strided(x.shape, x.stride(), dtype=y.dtype, device=y.device).copy_(y)
