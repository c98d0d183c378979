"""Mistakes planted in the adapter of a third party: edits of its facts, functions and tables; of a part's forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from prisma_conformance.doctor.diagnosis import examine
from prisma_conformance.subject import Subject
from torch import Tensor, nn

from prisma_core.plugin import Reader


@dataclass(frozen=True)
class Planted:
    """A mistake.

    Attributes:
        name: what is wrong.
        says: parts of the doctor's answer.
        fact, functions: as the adapter takes them.
        weights, hooks: texts in the tables, and what stands there instead.
    """

    name: str
    says: tuple[str, ...]
    fact: Mapping[str, Callable[[Reader], Any]] = field(default_factory=dict[str, Any])
    functions: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict[str, Any])
    weights: Mapping[str, str] = field(default_factory=dict[str, Any])
    hooks: Mapping[str, str] = field(default_factory=dict[str, Any])


def edited(table: str, edits: Mapping[str, str]) -> str:
    """Return a table with texts replaced, all at once."""
    marks = {old: f"<{n}>" for n, old in enumerate(edits)}
    for old, mark in marks.items():
        assert old in table, old
        table = table.replace(old, mark)
    for old, mark in marks.items():
        table = table.replace(mark, edits[old])
    return table


def assert_named(planted: Planted, subject: Subject) -> None:
    """Assert that the doctor finds a planted mistake and says what is expected of it."""
    answer = examine(subject)
    assert not answer.healthy
    for part in planted.says:
        assert part in str(answer), str(answer)


def forward(path: str, wrong: Callable[..., Tensor]) -> Callable[[nn.Module], None]:
    """Return a change of the forward of a part; ``wrong`` takes the part, its own forward and the input."""

    def change(model: nn.Module) -> None:
        part = model.get_submodule(path)
        own = part.forward
        part.forward = lambda x: wrong(part, own, x)

    return change


def biased_alone(part: nn.Linear, own: object, x: Tensor) -> Tensor:
    """The numbers of a linear layer, without the gradient by its bias."""
    return F.linear(x, part.weight, part.bias.detach())
