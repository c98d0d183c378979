"""Conformance cases: a small upstream model with its adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from prisma_core.inputs import ImagePreprocess


class Images(NamedTuple):
    """Two ways from a Pillow image to a model's input: ours, and upstream's own ``[channel height width]``."""

    preprocess: ImagePreprocess
    reference: Callable[[Any], Tensor]


@dataclass(frozen=True)
class Case:
    """One architecture to prove.

    Attributes:
        name: unique among the plugin's cases; shown in reports.
        build: returns the upstream model, small, at upstream's own initialisation; the kit draws the weights.
        full: the same at its real size, where that differs; used by ``full=True``.
        forward: how upstream is called and its main output read, where that is not ``upstream(*inputs)``.
        images: returns our and upstream's preprocessing, given the upstream model.
        skips: names of checks that cannot hold here, each with the reason.
    """

    name: str
    build: Callable[[], nn.Module]
    full: Callable[[], nn.Module] | None = None
    forward: Callable[..., Tensor] | None = None
    images: Callable[[nn.Module], Images] | None = None
    skips: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)
