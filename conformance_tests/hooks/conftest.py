"""Inputs of tests of hooks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.fixture
def other() -> Tensor:
    """Another batch than ``image``."""
    return torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
