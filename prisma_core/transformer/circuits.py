"""Weights of all layers at once, and the circuits they make."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prisma_core.errors import InputError, MissingPart, NotApplicable
from prisma_core.errors.arguments import check_flags, choice, shown, tensor
from prisma_core.transformer.block import Block, SideBySide, attentions, check_sum, end_of, mlps
from prisma_core.transformer.factored import FactoredMatrix, composition_scores
from prisma_core.transformer.weights import Stack, WeightViews

_OF_HEADS = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V")
_OF_MLPS = ("W_in", "W_gate", "W_out", "b_in", "b_out")


def _stack(name: str, doc: str) -> Any:
    """Return a property that holds the weights of a name of all layers."""

    def read(model: Circuits) -> Tensor:
        return Stack.of(stacked(model, name), model.place_of(name))

    return property(read, doc=doc)


class Circuits(WeightViews):
    """Stacked weights of a transformer: copies, so writing to them raises.

    Heads of attentions side by side follow each other; key and value heads that serve several heads are repeated.
    """

    spec: Any  # of a tower: it has blocks and classes
    blocks: nn.ModuleList
    head: nn.Linear

    W_Q: Float[Tensor, "layer head d_model d_head"] = _stack("W_Q", "Query weights: ``[layer head d_model d_head]``.")
    W_K: Float[Tensor, "layer head d_model d_head"] = _stack("W_K", "Key weights: ``[layer head d_model d_head]``.")
    W_V: Float[Tensor, "layer head d_model d_head"] = _stack("W_V", "Value weights: ``[layer head d_model d_head]``.")
    W_O: Float[Tensor, "layer head d_head d_model"] = _stack("W_O", "Output weights: ``[layer head d_head d_model]``.")
    b_Q: Float[Tensor, "layer head d_head"] = _stack("b_Q", "Query biases: ``[layer head d_head]``.")
    b_K: Float[Tensor, "layer head d_head"] = _stack("b_K", "Key biases: ``[layer head d_head]``.")
    b_V: Float[Tensor, "layer head d_head"] = _stack("b_V", "Value biases: ``[layer head d_head]``.")
    b_O: Float[Tensor, "layer d_model"] = _stack("b_O", "Attention output biases: ``[layer d_model]``.")
    W_in: Float[Tensor, "layer d_model d_mlp"] = _stack("W_in", "MLP input weights: ``[layer d_model d_mlp]``.")
    W_gate: Float[Tensor, "layer d_model d_mlp"] = _stack(
        "W_gate", "Gate weights of gated MLPs: ``[layer d_model d_mlp]``."
    )
    W_out: Float[Tensor, "layer d_mlp d_model"] = _stack("W_out", "MLP output weights: ``[layer d_mlp d_model]``.")
    b_in: Float[Tensor, "layer d_mlp"] = _stack("b_in", "MLP input biases: ``[layer d_mlp]``.")
    b_out: Float[Tensor, "layer d_model"] = _stack("b_out", "MLP output biases: ``[layer d_model]``.")

    @property
    def W_U(self) -> Float[Tensor, "d_model class"]:
        """The head's weights, a view: ``[d_model class]``."""
        return self._readable_head("W_U").weight.T

    @property
    def b_U(self) -> Float[Tensor, " class"]:
        """The head's bias: ``[class]``."""
        return self._readable_head("b_U").bias

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q W_K^T`` of every head, without scale, biases, norms or rotations: ``[layer head d_model d_model]``."""
        return FactoredMatrix(stacked(self, "W_Q"), stacked(self, "W_K").mT)

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V W_O`` of every head, without biases or layer scale: ``[layer head d_model d_model]``."""
        return FactoredMatrix(stacked(self, "W_V"), stacked(self, "W_O"))

    def place_of(self, name: str) -> str:
        if name not in (*_OF_HEADS, *_OF_MLPS, "b_O"):
            return f"model.{name}"
        return f"model.blocks[l].{'mlp' if name in _OF_MLPS else 'attn'}.{name}"

    def layers(self) -> list[Block | SideBySide]:
        """Return the blocks, in order."""
        return cast("list[Block | SideBySide]", list(self.blocks))

    def all_head_labels(self) -> list[str]:
        """Return a name for each head, as the decompositions of a cache call them: ``L0H0``, ``L0H1``, ..."""
        counts = [block.attn.n_heads * block.n_parallel for block in self.spec.blocks]
        return [f"L{layer}H{head}" for layer, n in enumerate(counts) for head in range(n)]

    def all_composition_scores(
        self, mode: Literal["Q", "K", "V"], *, rotation: Float[Tensor, "d_model d_model"] | None = None
    ) -> Float[Tensor, "layer head later head"]:
        """Return how much each head reads of what each earlier head writes: ``[layer head later_layer later_head]``.

        Norms, layer scales, biases and rotations are left out: fold norms and scales before
        (``prisma.rewrite``). 0 where the second head is not in a later layer.

        Args:
            mode: what the later head makes of it: queries, keys or values.
            rotation: an orthogonal matrix that what is written goes through: with one drawn at random, the scores of
                heads that have nothing to do with each other.

        Source: "A Mathematical Framework for Transformer Circuits" (Elhage et al. 2021): the norm of the product of two
            circuits, over the product of their norms.
        """
        reads = {"Q": lambda: self.QK, "K": lambda: self.QK.T, "V": lambda: self.OV}
        choice(mode, reads, "the mode")
        earlier, later, n = self.OV, reads[mode](), len(self.blocks)
        if rotation is not None:
            if tensor(rotation, "the rotation").shape != (self.spec.d_model,) * 2:
                raise InputError(f"Expected a rotation {[self.spec.d_model] * 2}, got {shown(rotation)}.")
            earlier = earlier @ rotation.to(earlier.B)
        # One layer at a time: the inner products of all pairs are large.
        scores = torch.stack([composition_scores(earlier[layer], later) for layer in range(n)])
        layer = torch.arange(n, device=scores.device)
        return torch.where(layer[:, None, None, None] < layer[:, None], scores, 0)

    def accumulated_bias(
        self, layer: int | None, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Return the sum of the output biases that are added to the stream before a layer: ``[d_model]``.

        Layer scale is applied. With ``include_mlp_biases=False`` that is the part of the stream which belongs to no
        head, no MLP and no embedding.

        Args:
            layer: the block whose input counts; None or -1 for the end of the stream.
            mlp_input: count up to the input of that block's MLP.
            include_mlp_biases: those of MLPs too.

        Raises:
            InputError: there is no such layer.
            NotApplicable: a norm stands between a bias and the stream.
        """
        check_flags(mlp_input=mlp_input, include_mlp_biases=include_mlp_biases)
        blocks = self.layers()
        end = end_of(blocks, layer, mlp_input)
        check_sum(blocks[:end])
        total = torch.zeros_like(attentions(blocks[0])[0].module.b_O)
        for index, block in enumerate(blocks[: end + mlp_input]):
            written = [("ln1", [branch.scaled(branch.module.b_O) for branch in attentions(block)])]
            if include_mlp_biases and index < end:
                written.append(("ln2", [branch.scaled(branch.module.b_out) for branch in mlps(block)]))
            for norm, biases in written:
                if biases and block.spec.kind == "res_post" and getattr(block.spec, norm) is not None:
                    raise NotApplicable(f"Layer {index} norms a bias ({norm}) before it joins the stream.")
                total = total + torch.stack(biases).sum(0) if biases else total
        return total

    def _readable_head(self, name: str) -> nn.Linear:
        if self.spec.n_classes is None:
            raise MissingPart(f"This model has no head, so it has no {name}.")
        if not hasattr(self, "head"):
            raise MissingPart(f"This model's head is an MLP, so it has no {name}: see its head_mlp.")
        return self.head


def stacked(model: Circuits, name: str) -> Float[Tensor, " layer *rest"]:
    """Return the weights of one name of all layers: ``[layer ...]``, a copy through which gradients flow.

    Args:
        name: as in ``model.blocks[0].attn`` (``W_Q``, ``b_O``) or ``model.blocks[0].mlp`` (``W_in``, ``b_out``).

    Raises:
        MissingPart: layers differ in their sizes, or one has no such weights or several that do not join.
    """
    layers: list[Tensor] = []
    for block in model.layers():
        branches = mlps(block) if name in _OF_MLPS else attentions(block)
        if name not in _OF_HEADS and len(branches) != 1:
            what = "MLP" if name in _OF_MLPS else "attention"
            raise MissingPart(f"Not every layer has exactly one {what}: read model.blocks[...].{what[:4].lower()}.")
        if name == "W_gate" and not hasattr(branches[0].module, "fc_gate"):
            raise MissingPart("This model's MLPs are not gated, so they have no W_gate.")
        sides = [cast(Tensor, getattr(branch.module, name)) for branch in branches]
        if name in _OF_HEADS:  # heads that serve several query heads are repeated
            sides = [side.repeat_interleave(block.spec.attn.n_heads // len(side), 0) for side in sides]
        layers.append(sides[0] if len(sides) == 1 else torch.cat(sides))
    if len({layer.shape for layer in layers}) > 1:
        raise MissingPart("Layers differ in their sizes and cannot be stacked: read model.blocks[...] one by one.")
    return torch.stack(layers)
