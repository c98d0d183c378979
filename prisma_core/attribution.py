"""What parts of the residual stream say about the logits, and how a cache is read for it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from prisma_core.captures import positions_of
from prisma_core.errors import InputError, NotApplicable, UnknownName, suggest
from prisma_core.layout import TokenLayout
from prisma_core.names import layer_of
from prisma_core.spec import DualSpec, ModelSpec, TextSpec

if TYPE_CHECKING:
    from prisma_core.captures import Index
    from prisma_core.hooked import Hooked
    from prisma_core.transformer.block import Block
    from prisma_core.transformer.norm import Norm
    from prisma_core.transformer.vit import HookedViT

Classes = int | str | Sequence["int | str"] | Tensor


class LogitAttribution(Mapping[str, Tensor]):
    """The part of an ``ActivationCache`` that reads the end of the stream as the model does, its scales frozen."""

    store: dict[str, Tensor]
    model: Hooked | None
    layout: TokenLayout | None
    has_batch_dim: bool
    pos: Index | str | None

    def apply_ln_to_stack(
        self,
        residual_stack: Float[Tensor, "component *batch pos d_model"],
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Index | str | None = None,
    ) -> Float[Tensor, "component *batch pos d_model"]:
        """Return a stack as the norm that reads the stream would leave it, its scale frozen at the cached one.

        The norm is then linear: components stay components, and the biases of the norm are left out (for the logits,
        ``logit_constant`` counts them). At the end of the stream that is ``ln_final`` and the norm after pooling,
        whichever the model has.

        Args:
            layer, mlp_input: which norm: ``ln1`` of the layer, its ``ln2``, or (None, -1) the final ones.
            pos_slice: the tokens the stack was cut to, if it was.

        Raises:
            UnknownName: the cache lacks a scale; the message says which to ask for.
        """
        norms = self._norm_before(self._end(layer, mlp_input), mlp_input)
        self._need([f"{path}.hook_scale" for path, _ in norms])
        for path, norm in norms:
            residual_stack = self._normed(path, norm, residual_stack, pos_slice)
        return residual_stack

    def logit_attrs(
        self,
        residual_stack: Float[Tensor, "component *batch pos d_model"],
        classes: Classes,
        against: Classes | None = None,
        pos_slice: Index | str | None = None,
        per_token: bool = False,
    ) -> Float[Tensor, " component *read"]:
        """Return what each component adds to a logit: ``[component batch]``.

        The final norms are applied with their cached scales, then the model's own pooling, then the head. Over a full
        decomposition the attributions and ``logit_constant`` sum to the logit.

        Args:
            residual_stack: components of the stream at its end, with no norm applied.
            classes: a class, as index or label, for all images, or one for each.
            against: classes whose logit is subtracted.
            pos_slice: the tokens the stack was cut to, if it was. All that the model pools must be there.
            per_token: keep the token axis, ``[component batch pos]``; the sum over it is what is returned otherwise.

        Raises:
            UnknownName: no such class, or the cache lacks a scale.
            NotApplicable: the model has no head, or pools by attention, which is no sum over tokens.
        """
        heads = self._heads()
        normed = self.apply_ln_to_stack(residual_stack, pos_slice=pos_slice)
        attrs = torch.zeros_like(normed[..., 0])
        for head, pooled in heads:
            direction = self._of(head.weight, classes, against).to(normed) / len(heads)
            of_head = einsum(normed, direction, "... pos d_model, ... d_model -> ... pos")
            attrs = attrs + (of_head if pooled is None else of_head * self._shares(pooled, normed, pos_slice))
        return attrs if per_token or heads[0][1] is None else attrs.sum(-1)

    def logit_constant(self, classes: Classes, against: Classes | None = None) -> Float[Tensor, " *read"]:
        """Return the part of a logit that is in no component: the biases of the final norms and the head, ``[batch]``.

        Args:
            classes, against: as in ``logit_attrs``.
        """
        heads = self._heads()
        norms = self._norm_before(len(self._vit().blocks), False)
        self._need([f"{path}.hook_scale" for path, _ in norms])
        like = next(iter(self.store.values()))
        x = like.new_zeros(*([like.shape[0]] if self.has_batch_dim else []), 1, self._vit().spec.d_model)
        for path, norm in norms:
            x = _linear(norm, x, self._scale(path, None)) if path == "ln_pool" else x
            x = x if norm.bias is None else x + norm.bias.to(x)
        constant = torch.zeros_like(x[..., 0])
        for head, _ in heads:
            direction = self._of(head.weight, classes, against).to(x)
            of_head = einsum(x, direction, "... pos d_model, ... d_model -> ... pos")
            constant = constant + (of_head + self._of(head.bias, classes, against).to(x)[..., None]) / len(heads)
        return constant if heads[0][1] is None else constant[..., 0]

    def _heads(self) -> list[tuple[nn.Linear, int | slice | None]]:
        """The model's heads, whose mean are the logits, each with the tokens it averages (None: reads each)."""
        vit = self._vit()
        spec = vit.spec
        if spec.n_classes is None:
            raise NotApplicable("This model has no head, so there are no logits to attribute.")
        if spec.pool.kind == "attention":
            raise NotApplicable(
                "This model pools by attention, which weighs tokens by their content: logits are no sum over "
                "components of the stream. decompose_resid and accumulated_resid hold all the same."
            )
        if spec.pool.kind == "token_and_avg":
            raise NotApplicable(
                "This model's head reads the class token and the mean of the others side by side: logits are no sum "
                "over components of one stream. decompose_resid and accumulated_resid hold all the same."
            )
        if spec.n_heads_out == 2:
            return [(vit.head, 0), (vit.head_dist, spec.layout.cls)]
        if spec.pool.kind == "avg":
            return [(vit.head, slice(0 if spec.pool.with_prefix else spec.layout.n_prefix, None))]
        return [(vit.head, 0 if spec.pool.kind == "token" else None)]

    def _of(self, parameter: Tensor, classes: Classes, against: Classes | None) -> Tensor:
        """The rows of the classes, ``[...]`` or ``[batch ...]``, less those they are held against."""
        found = parameter[self._classes(classes)]
        return found if against is None else found - parameter[self._classes(against)]

    def _norm_before(self, end: int, mlp_input: bool) -> list[tuple[str, Norm]]:
        """The norms that read the stream there, in order."""
        vit = self._vit()
        if end == len(vit.blocks):
            found = [("ln_final", vit.ln_final)] if vit.spec.ln_final is not None else []
            return cast("list[tuple[str, Norm]]", [*found, *([("ln_pool", vit.ln_pool)] if vit.spec.ln_pool else [])])
        block = block_of(vit, end)
        if block.spec.kind == "res_post":
            return []
        if block.spec.n_parallel > 1:
            raise NotApplicable(f"Layer {end} reads the stream through {block.spec.n_parallel} norms side by side.")
        name, spec = ("ln2", block.spec.ln2) if mlp_input else ("ln1", block.spec.ln1)
        return [] if spec is None else [(f"blocks.{end}.{name}", cast("Norm", getattr(block, name)))]

    def _scale(self, path: str, pos_slice: Index | str | None) -> Tensor:
        if path == "ln_pool" and self._vit().spec.pool.kind != "none":
            return self.store[f"{path}.hook_scale"][..., None, :]
        return self._at(f"{path}.hook_scale", pos_slice)

    def _normed(self, path: str, norm: Norm, stack: Tensor, pos_slice: Index | str | None) -> Tensor:
        scale = self._scale(path, pos_slice)
        if stack.ndim < 2 or stack.shape[-1] != norm.width or scale.shape[-2] not in (1, stack.shape[-2]):
            raise InputError(
                f"Expected a stack [component {'batch ' if self.has_batch_dim else ''}{scale.shape[-2]} {norm.width}], "
                f"got shape {list(stack.shape)}. Was it cut to some tokens? Give the same pos_slice."
            )
        return _linear(norm, stack, scale)

    def _shares(self, pooled: int | slice, stack: Tensor, pos_slice: Index | str | None) -> Tensor:
        """The share of each of a stack's tokens in the mean of those pooled: ``[pos]``."""
        kept = self.positions()
        if kept is None or self.layout is None:
            raise NotApplicable("The cache has no token layout, so what the model pools is not known.")
        tokens = [kept[column] for column in self._columns(pos_slice, len(kept))]
        wanted = positions_of(pooled, self.layout.n_tokens)
        if len(tokens) != stack.shape[-2] or not set(wanted) <= set(tokens):
            raise InputError(
                f"The model pools {len(wanted)} of {self.layout.n_tokens} tokens, and the stack's {stack.shape[-2]} "
                "positions do not hold them all. Was it cut to some tokens? Give the same pos_slice."
            )
        return torch.tensor([token in wanted for token in tokens], dtype=stack.dtype, device=stack.device) / len(wanted)

    def _classes(self, classes: Classes) -> Tensor:
        vit = self._vit()
        given = cast("int | list[int]", classes.tolist()) if isinstance(classes, Tensor) else classes
        if isinstance(given, int | str):
            return torch.tensor(self._class(given))
        found = torch.tensor([self._class(each) for each in cast("Sequence[int | str]", given)])
        batch = next(iter(self.store.values())).shape[0]
        if not self.has_batch_dim or len(found) not in (1, batch):
            raise InputError(f"Expected one class, or one for each of the {batch} images; got {len(found)}.")
        return found.to(vit.head.weight.device)

    def _class(self, given: int | str) -> int:
        vit = self._vit()
        labels = vit.labels or ()
        if isinstance(given, str):
            if given in labels:
                return labels.index(given)
            alike = [index for index, label in enumerate(labels) if _words(label) == _words(given)]
            if len(alike) != 1:
                raise UnknownName(f"No class {given!r} among the model's {len(labels)} labels.{suggest(given, labels)}")
            return alike[0]
        n = vit.spec.n_classes or 0
        if not 0 <= given < n:
            raise UnknownName(f"No class {given}: they run from 0 to {n - 1}.")
        return given

    # ---------------------------------------------------------------- reading the cache

    def _vit(self) -> HookedViT:
        if not isinstance(getattr(self.model, "spec", None), ModelSpec):
            raise NotApplicable(_no_decomposition(self.model))
        return cast("HookedViT", self.model)

    def _end(self, layer: int | None, mlp_input: bool = False) -> int:
        vit = self._vit()
        n = len(vit.blocks)
        end = n if layer is None or layer == -1 else layer
        if not 0 <= end <= n:
            raise InputError(f"No layer {layer}: expected 0 to {n}, where {n}, -1 and None are the end of the stream.")
        if mlp_input and end == n:
            raise InputError("mlp_input speaks of a layer's MLP: give the layer.")
        if mlp_input and (block_of(vit, end).spec.mlp is None or block_of(vit, end).spec.kind == "parallel"):
            raise NotApplicable(f"Layer {end} has no MLP that reads the stream after its attention.")
        return end

    def _need(self, names: Sequence[str]) -> None:
        missing = [name for name in names if name not in self.store]
        if not missing:
            return
        layers = len(self._vit().blocks)
        wanted = dict.fromkeys(
            name if layer_of(name) is None or layers == 1 else f"blocks.*.{name.split('.', 2)[2]}" for name in names
        )
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UnknownName(f"The cache lacks {missing[0]}{more}. Cache them: names={list(wanted)}.")

    def _at(self, name: str, pos_slice: Index | str | None) -> Tensor:
        x = self.store[name]
        if pos_slice is None:
            return x
        axis = 1 if self.has_batch_dim else 0
        return x.index_select(axis, torch.tensor(self._columns(pos_slice, x.shape[axis]), device=x.device))

    def _columns(self, pos_slice: Index | str | None, n: int) -> list[int]:
        """Indices along the cached token axis."""
        if not isinstance(pos_slice, str):
            return positions_of(pos_slice, n)
        kept = self.positions()
        if kept is None or self.layout is None:
            raise NotApplicable(f"The cache has no token layout, so pos_slice={pos_slice!r} means nothing.")
        wanted = positions_of(self.layout.slice(pos_slice), self.layout.n_tokens)
        return [index for index, token in enumerate(kept) if token in wanted]

    def positions(self) -> list[int] | None:
        """Return which tokens of the layout the cache holds along ``pos``, or None if it has no layout."""
        if self.layout is None:
            return None
        kept = self.layout.slice(self.pos) if isinstance(self.pos, str) else self.pos
        return positions_of(kept, self.layout.n_tokens)


def _no_decomposition(model: Hooked | None) -> str:
    spec = getattr(model, "spec", None)
    if model is None:
        return (
            "Decompositions need the weights of a canonical vision transformer, and this cache has no model. "
            "Set cache.model, or give it to ActivationCache.load(path, model=model)."
        )
    if isinstance(spec, DualSpec):
        return (
            "Decompositions read one vision transformer, and this cache is of a pair of towers. Take the tower's own: "
            "model.vision.run_with_cache(image)."
        )
    if isinstance(spec, TextSpec):
        return "Text towers have no decompositions yet: they hold for vision transformers in canonical form."
    return (
        f"Decompositions and the logit lens need a canonical form, and this model ({type(model).__name__}) has none: "
        "there are no weights such as W_O to read. Its activations, edits and patches are all there is."
    )


def block_of(vit: HookedViT, index: int) -> Block:
    return cast("Block", vit.blocks[index])


@dataclass(frozen=True)
class Branch:
    """One attention or MLP of a block, with the norm and the layer scale that belong to it.

    Attributes:
        side: its number among those side by side.
    """

    path: str
    side: int
    module: nn.Module
    norm: nn.Module
    scale: nn.Module


def branches(vit: HookedViT, index: int, kind: Literal["attn", "mlp"]) -> list[Branch]:
    """Return the attentions or the MLPs of a block: one, several side by side, or none."""
    block = block_of(vit, index)
    if not hasattr(block, kind):
        return []
    norm = "ln1" if kind == "attn" or block.spec.kind == "parallel" else "ln2"
    scale = "ls1" if kind == "attn" else "ls2"
    found = [cast(nn.Module, getattr(block, name)) for name in (kind, norm, scale)]
    path = f"blocks.{index}.{kind}"
    if not isinstance(found[0], nn.ModuleList):
        return [Branch(path, 0, *found)]
    sides = zip(*(cast(nn.ModuleList, each) for each in found), strict=True)
    return [Branch(f"{path}.{side}", side, *parts) for side, parts in enumerate(sides)]


def _linear(norm: Norm, x: Tensor, scale: Tensor) -> Tensor:
    if norm.spec.kind == "ln":
        x = x - x.mean(-1, keepdim=True)
    return x / scale * norm.weight.to(x)


def _words(label: str) -> list[str]:
    """Return the words of a label: an emoji before them, capitals and punctuation do not count."""
    return re.findall(r"\w+", label.casefold())
