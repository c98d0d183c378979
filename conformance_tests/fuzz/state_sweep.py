"""A move of upstream's state, judged: the numbers are upstream's, or the model is refused by a name of the place."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from prisma_conformance import tolerances
from prisma_conformance.measure import worst

import prisma_core as prisma
from prisma_core.contract.case import Case
from prisma_core.errors import PrismaError
from prisma_core.host import installed
from prisma_core.toolbox.attention import float64_softmax

from .hf_sweep import drawn, sample
from .state_moves import Move


class Outcome(NamedTuple):
    """What became of a move: ``no effect``, ``upstream fails``, ``agrees``, ``refused`` or ``defect``."""

    kind: str
    why: str = ""


def places(move: Move) -> Iterator[str]:
    """Yield what a sentence may call the place of a move."""
    yield move.path
    if move.kind == "subclass":
        yield move.path.rpartition(".")[0] or move.path  # a class of blocks is known by its parts
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", f".{move.path}")
    yield from (f"block {number}" for number in numbers)
    if move.kind == "class":  # the first module of that class
        yield move.what.partition(".")[0]


@dataclass
class Moved:
    """A case, and what it computes before any move."""

    case: Case

    def __post_init__(self) -> None:
        self.upstream = drawn(self.case.build())
        self.adapter = installed().adapter(self.upstream)
        self.inputs = sample(prisma.adapt(self.upstream))
        self.output = self.forward()

    def forward(self) -> torch.Tensor:
        with float64_softmax():  # upstream's explicit attention alone rounds scores to float32
            return (self.case.forward or self.adapter.call)(self.upstream, *self.inputs)

    def judge(self, move: Move) -> Outcome:
        """Compare with upstream as the move makes it, and take it back."""
        before = [(tensor, tensor._version, tensor.clone()) for tensor in self._tensors()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with move.made():
                    return self._judge(move)
            except TypeError as error:
                if "__class__ assignment" in str(error):
                    return Outcome("upstream fails", str(error))
                raise
            finally:
                for tensor, version, values in before:
                    if tensor._version != version:  # a pass changes the table of an embedding of bounded norm
                        tensor.copy_(values)

    def _tensors(self) -> list[torch.Tensor]:
        return [*self.upstream.parameters(), *self.upstream.buffers()]

    def _judge(self, move: Move) -> Outcome:
        try:
            theirs = self.forward()
            assert isinstance(theirs, torch.Tensor)
        except Exception as error:  # noqa: BLE001  # upstream's own, of any type
            return Outcome("upstream fails", f"{type(error).__name__}: {error}")
        still = theirs.shape == self.output.shape and torch.equal(theirs, self.output)  # an adapter may read it alone
        if not theirs.isfinite().all() or (theirs.numel() > 1 and not float(theirs.std()) > 0):
            return Outcome("upstream fails", "its output is constant or NaN")
        try:
            model = prisma.adapt(self.upstream)
            with float64_softmax():  # a mapped model is upstream's own code
                ours = model(*self.inputs)
        except PrismaError as error:
            named = any(place in str(error) for place in places(move))
            kind = "no effect" if still else "refused" if named else "refused elsewhere"
            return Outcome(kind, f"{type(error).__name__}: {error}")
        except Exception as error:  # noqa: BLE001
            return Outcome("defect", f"{type(error).__name__}: {error}")
        if not (error := worst(ours, theirs)) <= tolerances.FLOAT64:
            return Outcome("defect", f"logits differ by {error:.1e} of their standard deviation")
        return Outcome("no effect" if still else "agrees")
