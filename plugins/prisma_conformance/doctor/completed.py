"""Weight tables that fill what no rule makes, so that models of incomplete adapters can be compared."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prisma_core.maps.rule import Rule
from prisma_core.maps.table import pattern_of
from prisma_core.plugin import WeightMap, WeightMapError

FACTOR = re.compile(r".*gamma|(.*\.)?(ln\w*|\w*norm)(\.\d+)?\.weight")


@dataclass(frozen=True)
class Completed(WeightMap):
    """A weight table that makes what no rule makes of ones, where it is a factor, and of zeros.

    Attributes:
        gaps: the canonical tensors that it made so, each with the reason.
        used: upstream's tensors that rules took.
    """

    gaps: dict[str, str] = field(default_factory=dict[str, str])
    used: set[str] = field(default_factory=set[str])

    def forward(self, upstream: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        like = next(tensor for tensor in upstream.values() if tensor.is_floating_point())
        state: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            if name in state:
                continue
            rule = self._rule(name)
            try:
                if rule is None:
                    raise WeightMapError("no rule makes it")
                state |= self._of(rule, upstream, shapes, like)
            except WeightMapError as problem:
                self.gaps[name] = str(problem)
                make = torch.ones if FACTOR.fullmatch(name) else torch.zeros
                state[name] = make(shape, dtype=like.dtype, device=like.device)
        return state

    def copied(self, upstream: Mapping[str, Tensor], canonical: Mapping[str, Tensor]) -> dict[str, str]:
        """Nothing: a model of a table with gaps is compared, and then thrown away."""
        return {}

    def _rule(self, name: str) -> Rule | None:
        matches = ((rule, pattern_of(target).fullmatch(name)) for rule in self.rows for target in rule.targets)
        return next((rule.bind(match.groupdict()) for rule, match in matches if match), None)

    def _of(
        self, rule: Rule, upstream: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], like: Tensor
    ) -> dict[str, Tensor]:
        sources = {name: upstream[name] for name in rule.names if name in upstream}
        given = sources or {"": like}  # constants take the dtype of what is there
        table = WeightMap((rule,), self.sizes, dict.fromkeys(given, "not taken"))
        tensors = table.forward(given, {target: shapes[target] for target in rule.targets if target in shapes})
        self.used.update(sources)
        return tensors


__all__ = ["FACTOR", "Completed"]
