"""Facts of a model that each block has for itself, answered for all of them where they agree."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, TypeVar, cast

from prisma_core.errors import MissingPart
from prisma_core.spec.parts import Activation, BlockSpec

T = TypeVar("T")


def _alike(place: str, kind: type[T], doc: str) -> T:
    """Return a property that reads a fact at one place of every block, such as ``attn.n_heads``."""

    def read(spec: AllBlocks) -> object:
        values = [
            reduce(lambda part, name: getattr(part, name, None), place.split("."), block) for block in spec.blocks
        ]
        if len(set(values)) > 1:
            first, (other, value) = values[0], next(each for each in enumerate(values) if each[1] != values[0])
            raise MissingPart(
                f"The blocks differ: {place} is {first} in block 0 and {value} in block {other}. "
                f"Read spec.blocks[l].{place}."
            )
        if values[0] is None:
            raise MissingPart(f"The blocks of this model have no {place.partition('.')[0]}, so no {place}.")
        return values[0]

    return cast("T", property(read, doc=doc))


class AllBlocks:
    """The names by which TransformerLens' users know facts of blocks.

    Each raises ``MissingPart`` where blocks differ, or have no such part; the message names the place in a block.
    """

    if TYPE_CHECKING:
        blocks: tuple[BlockSpec, ...]

    n_heads = _alike("attn.n_heads", int, "Query heads of each attention.")
    n_key_value_heads = _alike("attn.n_kv_heads", int, "Key and value heads of each attention.")
    d_head = _alike("attn.d_head", int, "Channels of each head.")
    d_mlp = _alike("mlp.d_mlp", int, "Neurons of each MLP.")
    act_fn = cast("Activation", _alike("mlp.act", str, "The activation function of each MLP."))
    gated_mlp = _alike("mlp.gated", bool, "Whether MLPs are gated.")
    eps = _alike("ln1.eps", float, "The eps of the norm before each attention.")

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)
