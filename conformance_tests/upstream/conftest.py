"""A hooked upstream of two blocks, and its input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from windows import Adapter, Upstream

from prisma_core.upstream.model import HookedUpstream
from prisma_core.zoo import adapt_with


@pytest.fixture
def upstream() -> Upstream:
    torch.manual_seed(0)
    model = Upstream()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.fixture
def model(upstream: Upstream) -> HookedUpstream:
    made = adapt_with(Adapter(), upstream)
    assert isinstance(made, HookedUpstream)
    return made


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))
