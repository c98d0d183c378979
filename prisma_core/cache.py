"""What a pass left behind: activations by hook name, and their decompositions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from prisma_core.decompose import Decompositions
from prisma_core.errors import InputError
from prisma_core.layout import TokenLayout
from prisma_core.names import LayerQuery, resolve_one

if TYPE_CHECKING:
    from prisma_core.hooked import Hooked, Index


class ActivationCache(Decompositions, Mapping[str, Tensor]):
    """Activations of one pass, by full hook name.

    ``cache["blocks.3.attn.hook_z"]``, ``cache["z", 3]`` and ``cache["resid_post", -1]`` all work; iteration gives full
    names. Nothing in a cache changes after the pass.

    Attributes:
        store: the activations themselves.
        model: the model that made them, needed for the decompositions.
        layout: which token is where, if the model knows.
        grad: gradients of the loss by the same activations, if ``run_with_cache`` was given one.
        has_batch_dim: whether the first axis is ``batch``.
        pos: the tokens kept, as they were asked for; None for all.
    """

    def __init__(
        self,
        store: dict[str, Tensor],
        *,
        model: Hooked | None = None,
        layout: TokenLayout | None = None,
        has_batch_dim: bool = True,
        pos: Index | str | None = None,
    ):
        self.store = store
        self.model = model
        self.layout = layout
        self.grad: ActivationCache | None = None
        self.has_batch_dim = has_batch_dim
        self.pos = pos

    def __getitem__(self, query: str | LayerQuery) -> Tensor:
        if isinstance(query, str) and query in self.store:
            return self.store[query]
        return self.store[resolve_one(query, list(self.store))]

    def __iter__(self) -> Iterator[str]:
        return iter(self.store)

    def __len__(self) -> int:
        return len(self.store)

    def __contains__(self, query: object) -> bool:
        return query in self.store

    def __repr__(self) -> str:
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.store.values())
        return f"ActivationCache({len(self)} activations, {size / 2**20:.1f} MiB)"

    def remove_batch_dim(self) -> ActivationCache:
        """Return the same cache without the batch axis.

        Raises:
            InputError: the batch holds more than one.
        """
        if not self.has_batch_dim:
            return self
        for name, tensor in self.store.items():
            if tensor.shape[0] != 1:
                raise InputError(f"{name} holds a batch of {tensor.shape[0]}; the batch axis of one alone can go.")
        cache = ActivationCache(
            {name: tensor[0] for name, tensor in self.store.items()},
            model=self.model,
            layout=self.layout,
            has_batch_dim=False,
            pos=self.pos,
        )
        cache.grad = None if self.grad is None else self.grad.remove_batch_dim()
        return cache
