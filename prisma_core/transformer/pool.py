"""From tokens to the vector the head reads."""

from __future__ import annotations

from torch import Tensor, nn

from prisma_core.spec import PoolSpec


class Pool(nn.Module):
    """Class token, mean, or all tokens."""

    def __init__(self, spec: PoolSpec):
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor, n_prefix: int) -> Tensor:
        if self.spec.kind == "none":
            return x
        if self.spec.kind == "token":
            return x[:, 0]
        if not self.spec.with_prefix:
            x = x[:, n_prefix :]
        return x.mean(dim=1)
