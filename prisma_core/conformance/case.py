"""What the kit checks: an upstream model with its adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Case:
    """One architecture to prove.

    Attributes:
        name: unique among the plugin's cases; shown in reports.
        build: returns the upstream model, small, at upstream's own initialisation; the kit draws the weights.
    """

    name: str
    build: Callable[[], nn.Module]
