"""Weights of all layers at once, and the circuits they make."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prisma_core.errors import NotApplicable
from prisma_core.transformer.factored import FactoredMatrix

if TYPE_CHECKING:
    from prisma_core.transformer.attention import Attention
    from prisma_core.transformer.mlp import MLP


class Circuits:
    """Stacked weights of a transformer: copies, so writing to them does not edit the model.

    Heads of attentions side by side follow each other; key and value heads that serve several heads are repeated.
    """

    spec: Any  # of a tower: it has blocks and classes
    blocks: nn.ModuleList
    head: nn.Linear

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Query weights: ``[layer head d_model d_head]``."""
        return self._heads(lambda attn: attn.W_Q)

    @property
    def W_K(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Key weights: ``[layer head d_model d_head]``."""
        return self._heads(lambda attn: attn.W_K)

    @property
    def W_V(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Value weights: ``[layer head d_model d_head]``."""
        return self._heads(lambda attn: attn.W_V)

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        """Output weights: ``[layer head d_head d_model]``."""
        return self._heads(lambda attn: attn.W_O)

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        """Query biases: ``[layer head d_head]``."""
        return self._heads(lambda attn: attn.b_Q)

    @property
    def b_K(self) -> Float[Tensor, "layer head d_head"]:
        """Key biases: ``[layer head d_head]``."""
        return self._heads(lambda attn: attn.b_K)

    @property
    def b_V(self) -> Float[Tensor, "layer head d_head"]:
        """Value biases: ``[layer head d_head]``."""
        return self._heads(lambda attn: attn.b_V)

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        """MLP input weights: ``[layer d_model d_mlp]``."""
        return self._mlps(lambda mlp: mlp.W_in)

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        """MLP output weights: ``[layer d_mlp d_model]``."""
        return self._mlps(lambda mlp: mlp.W_out)

    @property
    def W_U(self) -> Float[Tensor, "d_model class"]:
        """The head's weights, a view: ``[d_model class]``."""
        if self.spec.n_classes is None:
            raise NotApplicable("This model has no head, so it has no W_U.")
        if not hasattr(self, "head"):
            raise NotApplicable("This model's head is an MLP, so it has no W_U: see its head_mlp.")
        return self.head.weight.T

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q W_K^T`` of every head, without scale, biases, norms or rotations: ``[layer head d_model d_model]``."""
        return FactoredMatrix(self.W_Q, self.W_K.mT)

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V W_O`` of every head, without biases or layer scale: ``[layer head d_model d_model]``."""
        return FactoredMatrix(self.W_V, self.W_O)

    def _heads(self, read: Callable[[Attention], Tensor]) -> Tensor:
        layers: list[Tensor] = []
        for block, spec in zip(self.blocks, self.spec.blocks, strict=True):
            found = [read(cast("Attention", attn)) for attn in _sides(block.attn)]
            layers.append(torch.cat([each.repeat_interleave(spec.attn.n_heads // len(each), 0) for each in found]))
        return _stacked(layers)

    def _mlps(self, read: Callable[[MLP], Tensor]) -> Tensor:
        mlps = [_sides(block.mlp) for block in self.blocks if hasattr(block, "mlp")]
        if len(mlps) != len(self.blocks) or any(len(sides) != 1 for sides in mlps):
            raise NotApplicable("Not every layer has exactly one MLP: read model.blocks[...].mlp.")
        return _stacked([read(cast("MLP", sides[0])) for sides in mlps])


def _sides(module: object) -> list[nn.Module]:
    return list(module) if isinstance(module, nn.ModuleList) else [cast(nn.Module, module)]


def _stacked(layers: list[Tensor]) -> Tensor:
    if len({layer.shape for layer in layers}) > 1:
        raise NotApplicable("Layers differ in their sizes and cannot be stacked: read model.blocks[...] one by one.")
    return torch.stack(layers)
