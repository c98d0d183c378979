"""What the residual stream is a sum of, and what each addend says about the logits.

All stacks are ``[component batch pos d_model]``, without ``batch`` where the cache has none. Names and meaning are
TransformerLens'; ``layer`` is the block whose input is decomposed, and None or -1 the end of the stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, cast

import torch
from einops import einsum, rearrange
from torch import Tensor

from prisma_core.errors import InputError, NotApplicable, UnknownName, suggest
from prisma_core.layout import TokenLayout
from prisma_core.names import layer_of
from prisma_core.spec import ModelSpec

if TYPE_CHECKING:
    from prisma_core.hooked import Hooked, Index
    from prisma_core.transformer.block import Block
    from prisma_core.transformer.norm import Norm
    from prisma_core.transformer.vit import HookedViT

Classes = int | str | Sequence["int | str"] | Tensor
Labelled = tuple[Tensor, list[str]]


class Decompositions(Mapping[str, Tensor]):
    """The decompositions of an ``ActivationCache``."""

    store: dict[str, Tensor]
    model: Hooked | None
    layout: TokenLayout | None
    has_batch_dim: bool
    pos: Index | str | None

    # ---------------------------------------------------------------- stacks

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Index | str | None = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Tensor | Labelled:
        """Return what was added to the stream before a layer, one component each.

        Components are ``embed`` and ``pos_embed`` (or ``ln_pre``, where a norm of the embedding starts the stream),
        then ``{l}_attn_out`` and ``{l}_mlp_out``.

        Args:
            layer: the block whose input is decomposed; None or -1 for the end of the stream.
            mlp_input: include the attention of ``layer`` itself: decompose the input of its MLP.
            mode: all, or only what MLPs or only what attentions add.
            apply_ln: apply the norm that reads the stream there (see ``apply_ln_to_stack``).
            pos_slice: tokens, as positions or a subset of the layout such as ``"cls"``. Axes stay.
            incl_embeds: start with the embeddings.
            return_labels: return ``(stack, labels)``.

        Raises:
            UnknownName: the cache lacks activations; the message says which to ask for.
        """
        vit = self._vit()
        end = self._end(layer)
        found: list[tuple[str, str]] = []
        for index in range(end + mlp_input):
            if mode != "mlp":
                found.append((f"{index}_attn_out", f"blocks.{index}.hook_attn_out"))
            if mode != "attn" and _block(vit, index).spec.mlp is not None and index < end:
                found.append((f"{index}_mlp_out", f"blocks.{index}.hook_mlp_out"))
        if mlp_input:
            self._norm_before(end, mlp_input)
        start = self._start() if incl_embeds else []
        self._need([*(name for _, names in start for name in names), *(name for _, name in found)])
        parts: list[Tensor] = []
        for _, names in start:
            whole, *less = (self._at(name, pos_slice) for name in names)
            parts.append(whole - less[0] if less else whole)
        parts += [self._at(name, pos_slice) for _, name in found]
        labels = [label for label, _ in (*start, *found)]
        return self._stacked(parts, labels, layer, mlp_input, apply_ln, pos_slice, return_labels)

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Index | str | None = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Tensor | Labelled:
        """Return the stream itself before every block up to a layer: ``0_pre``, ``0_mid``, ..., ``final_post``.

        Args:
            layer, apply_ln, pos_slice, mlp_input, return_labels: as in ``decompose_resid``.
            incl_mid: also the stream between attention and MLP, where a block has such a place.

        Raises:
            UnknownName: the cache lacks activations; the message says which to ask for.
        """
        vit = self._vit()
        end = self._end(layer)
        found: list[tuple[str, str]] = []
        for index in range(min(end + 1, len(vit.blocks))):
            found.append((f"{index}_pre", f"blocks.{index}.hook_resid_pre"))
            spec = _block(vit, index).spec
            if (incl_mid and index < end and spec.mlp is not None and spec.kind != "parallel") or (
                mlp_input and index == end
            ):
                found.append((f"{index}_mid", f"blocks.{index}.hook_resid_mid"))
        if mlp_input:
            self._norm_before(end, mlp_input)
        if end == len(vit.blocks):
            found.append(("final_post", f"blocks.{end - 1}.hook_resid_post"))
        self._need([name for _, name in found])
        parts = [self._at(name, pos_slice) for _, name in found]
        return self._stacked(parts, [label for label, _ in found], layer, mlp_input, apply_ln, pos_slice, return_labels)

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Index | str | None = None,
        apply_ln: bool = False,
    ) -> Tensor | Labelled:
        """Return what each head of every block before a layer adds to the stream: ``L0H0``, ``L0H1``, ...

        Layer scale is applied; attention's output bias belongs to no head and is in the remainder.

        Args:
            layer, pos_slice, apply_ln, return_labels: as in ``decompose_resid``.
            incl_remainder: a last component, ``remainder``: the stream less all heads.

        Raises:
            UnknownName: the cache lacks activations; the message says which to ask for.
            NotApplicable: a norm stands between the heads and the stream, so it is no sum of heads.
        """
        vit = self._vit()
        end = self._end(layer)
        self._need([self._head_source(index) for index in range(end)])
        parts: list[Tensor] = []
        labels: list[str] = []
        for index in range(end):
            results = self._head_results(index, pos_slice)
            parts += results.unbind(-2)
            labels += [f"L{index}H{head}" for head in range(results.shape[-2])]
        if incl_remainder:
            self._remainder(parts, labels, end, pos_slice)
        if not parts:
            raise InputError(f"No heads before layer {layer} of {len(vit.blocks)}.")
        return self._stacked(parts, labels, layer, False, apply_ln, pos_slice, return_labels)

    def stack_neuron_results(
        self,
        layer: int | None = -1,
        pos_slice: Index | str | None = None,
        neuron_slice: Index | None = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
    ) -> Tensor | Labelled:
        """Return what each MLP neuron of every block before a layer adds to the stream: ``L0N0``, ``L0N1``, ...

        This is large: give ``pos_slice`` or ``neuron_slice``. Layer scale is applied; the output bias belongs to no
        neuron and is in the remainder.

        Args:
            layer, pos_slice, apply_ln, return_labels: as in ``decompose_resid``.
            neuron_slice: the neurons of every layer to keep.
            incl_remainder: a last component, ``remainder``: the stream less all neurons kept.

        Raises:
            UnknownName: the cache lacks activations; the message says which to ask for.
            NotApplicable: a norm stands between the neurons and the stream.
        """
        vit = self._vit()
        end = self._end(layer)
        layers = [index for index in range(end) if _block(vit, index).spec.mlp is not None]
        self._need([f"blocks.{index}.mlp.hook_post" for index in layers])
        parts: list[Tensor] = []
        labels: list[str] = []
        for index in layers:
            block = _block(vit, index)
            if block.spec.kind == "res_post" and block.spec.ln2 is not None:
                raise _after_norm(index, "neurons", "ln2", "mlp_out")
            kept = _positions(neuron_slice, block.mlp.W_out.shape[0])
            post = self._at(f"blocks.{index}.mlp.hook_post", pos_slice)[..., kept]
            written = _scaled(block.ls2, block.mlp.W_out[kept])
            parts += (post[..., None] * written).unbind(-2)
            labels += [f"L{index}N{neuron}" for neuron in kept]
        if incl_remainder:
            self._remainder(parts, labels, end, pos_slice)
        if not parts:
            raise InputError(f"No neurons before layer {layer} of {len(vit.blocks)}.")
        return self._stacked(parts, labels, layer, False, apply_ln, pos_slice, return_labels)

    # ---------------------------------------------------------------- norms and logits

    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Index | str | None = None,
    ) -> Tensor:
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
        norms = self._norm_before(self._end(layer), mlp_input)
        self._need([f"{path}.hook_scale" for path, _ in norms])
        for path, norm in norms:
            residual_stack = self._normed(path, norm, residual_stack, pos_slice)
        return residual_stack

    def logit_attrs(
        self,
        residual_stack: Tensor,
        classes: Classes,
        against: Classes | None = None,
        pos_slice: Index | str | None = None,
        per_token: bool = False,
    ) -> Tensor:
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
        normed = self.apply_ln_to_stack(residual_stack, pos_slice=pos_slice)
        direction = self._direction(classes, against)
        attrs = einsum(normed, direction, "... pos d_model, ... d_model -> ... pos")
        tokens = self._pooled_tokens(residual_stack, pos_slice)
        if tokens is None:
            return attrs
        return attrs * tokens if per_token else attrs @ tokens

    def logit_constant(self, classes: Classes, against: Classes | None = None) -> Tensor:
        """Return the part of a logit that is in no component: the biases of the final norms and the head, ``[batch]``.

        Args:
            classes, against: as in ``logit_attrs``.
        """
        vit = self._vit()
        norms = self._norm_before(len(vit.blocks), False)
        self._need([f"{path}.hook_scale" for path, _ in norms])
        outer = [next(iter(self.store.values())).shape[0]] if self.has_batch_dim else []
        x = vit.head.weight.new_zeros(*outer, 1, vit.spec.d_model)
        for path, norm in norms:
            x = _linear(norm, x, self._scale(path, None)) if path == "ln_pool" else x
            x = x if norm.bias is None else x + norm.bias
        constant = einsum(x, self._direction(classes, against), "... pos d_model, ... d_model -> ... pos")
        bias = vit.head.bias[self._classes(classes)]
        if against is not None:
            bias = bias - vit.head.bias[self._classes(against)]
        if vit.spec.pool.kind == "none":
            return constant + bias[..., None]
        return constant[..., 0] + bias

    # ---------------------------------------------------------------- inside

    def _vit(self) -> HookedViT:
        if self.model is None or not isinstance(getattr(self.model, "spec", None), ModelSpec):
            raise NotApplicable(
                "Decompositions need the weights of a canonical vision transformer, and this cache has "
                f"{'no model' if self.model is None else type(self.model).__name__}. "
                "Set cache.model, or give it to ActivationCache.load(path, model=model)."
            )
        return cast("HookedViT", self.model)

    def _end(self, layer: int | None) -> int:
        n = len(self._vit().blocks)
        if layer is None or layer == -1:
            return n
        if not 0 <= layer <= n:
            raise InputError(f"No layer {layer}: expected 0 to {n}, where {n}, -1 and None are the end of the stream.")
        return layer

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

    def _start(self) -> list[tuple[str, list[str]]]:
        """What starts the stream: label, and the activation, less another."""
        spec = self._vit().spec
        if spec.ln_pre is not None:
            return [("ln_pre", ["hook_ln_pre"])]
        if not spec.embed.pos:
            return [("embed", ["hook_full_embed"])]
        return [("embed", ["hook_full_embed", "hook_pos_embed"]), ("pos_embed", ["hook_pos_embed"])]

    def _at(self, name: str, pos_slice: Index | str | None) -> Tensor:
        x = self.store[name]
        if pos_slice is None:
            return x
        axis = 1 if self.has_batch_dim else 0
        return x.index_select(axis, torch.tensor(self._columns(pos_slice, x.shape[axis]), device=x.device))

    def _columns(self, pos_slice: Index | str | None, n: int) -> list[int]:
        """Indices along the cached token axis."""
        if not isinstance(pos_slice, str):
            return _positions(pos_slice, n)
        kept = self.positions()
        if kept is None or self.layout is None:
            raise NotApplicable(f"The cache has no token layout, so pos_slice={pos_slice!r} means nothing.")
        wanted = _positions(self.layout.slice(pos_slice), self.layout.n_tokens)
        return [index for index, token in enumerate(kept) if token in wanted]

    def positions(self) -> list[int] | None:
        """Return which tokens of the layout the cache holds along ``pos``, or None if it has no layout."""
        if self.layout is None:
            return None
        return _positions(self.layout.slice(self.pos) if isinstance(self.pos, str) else self.pos, self.layout.n_tokens)

    def _head_source(self, index: int) -> str:
        block = _block(self._vit(), index)
        if block.spec.kind == "res_post" and block.spec.ln1 is not None:
            raise _after_norm(index, "heads", "ln1", "attn_out")
        attn = f"blocks.{index}.attn"
        if f"{attn}.hook_result" in self.store:
            return f"{attn}.hook_result"
        return f"{attn}.hook_z" if block.spec.attn.inner_norm is None else f"{attn}.ln.hook_normalized"

    def _head_results(self, index: int, pos_slice: Index | str | None) -> Tensor:
        block = _block(self._vit(), index)
        name = self._head_source(index)
        x = self._at(name, pos_slice)
        if not name.endswith("hook_result"):
            if name.endswith("hook_normalized"):
                x = rearrange(x, "... (head d_head) -> ... head d_head", head=block.spec.attn.n_heads)
            if x.shape[-2] != block.spec.attn.n_heads:
                raise NotApplicable(f"{name} holds {x.shape[-2]} of {block.spec.attn.n_heads} heads: cache all heads.")
            x = einsum(x, block.attn.W_O, "... head d_head, head d_head d_model -> ... head d_model")
        return _scaled(block.ls1, x)

    def _remainder(self, parts: list[Tensor], labels: list[str], end: int, pos_slice: Index | str | None) -> None:
        name = f"blocks.{end}.hook_resid_pre" if end < len(self._vit().blocks) else f"blocks.{end - 1}.hook_resid_post"
        self._need([name])
        whole = self._at(name, pos_slice)
        parts.append(whole - torch.stack(parts).sum(0) if parts else whole)
        labels.append("remainder")

    def _stacked(
        self,
        parts: list[Tensor],
        labels: list[str],
        layer: int | None,
        mlp_input: bool,
        apply_ln: bool,
        pos_slice: Index | str | None,
        return_labels: bool,
    ) -> Tensor | Labelled:
        stack = torch.stack(parts)
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input, pos_slice)
        return (stack, labels) if return_labels else stack

    def _norm_before(self, end: int, mlp_input: bool) -> list[tuple[str, Norm]]:
        """The norms that read the stream there, in order."""
        vit = self._vit()
        if end == len(vit.blocks):
            if mlp_input:
                raise InputError("mlp_input speaks of a layer's MLP: give the layer.")
            found = [("ln_final", vit.ln_final)] if vit.spec.ln_final is not None else []
            return cast("list[tuple[str, Norm]]", [*found, *([("ln_pool", vit.ln_pool)] if vit.spec.ln_pool else [])])
        block = _block(vit, end)
        if mlp_input and (block.spec.mlp is None or block.spec.kind == "parallel"):
            raise NotApplicable(f"Layer {end} has no MLP that reads the stream after its attention.")
        if block.spec.kind == "res_post":
            return []
        name, spec = ("ln2", block.spec.ln2) if mlp_input else ("ln1", block.spec.ln1)
        return [] if spec is None else [(f"blocks.{end}.{name}", cast("Norm", getattr(block, name)))]

    def _scale(self, path: str, pos_slice: Index | str | None) -> Tensor:
        if path == "ln_pool" and self._vit().spec.pool.kind != "none":
            return self.store[f"{path}.hook_scale"][..., None, :]
        return self._at(f"{path}.hook_scale", pos_slice)

    def _normed(self, path: str, norm: Norm, stack: Tensor, pos_slice: Index | str | None) -> Tensor:
        if path == "ln_pool":
            self._pooled_tokens(stack, pos_slice)
        scale = self._scale(path, pos_slice)
        if stack.ndim < 2 or stack.shape[-1] != norm.width or scale.shape[-2] not in (1, stack.shape[-2]):
            raise InputError(
                f"Expected a stack [component {'batch ' if self.has_batch_dim else ''}{scale.shape[-2]} {norm.width}], "
                f"got shape {list(stack.shape)}. Was it cut to some tokens? Give the same pos_slice."
            )
        return _linear(norm, stack, scale)

    def _pooled_tokens(self, stack: Tensor, pos_slice: Index | str | None) -> Tensor | None:
        """The share of each token of a stack in the pooled vector ``[pos]``, or None where nothing is pooled."""
        spec = self._vit().spec
        if spec.pool.kind == "none":
            return None
        if spec.pool.kind == "attention":
            raise NotApplicable(
                "This model pools by attention, which weighs tokens by their content: logits are no sum over "
                "components of the stream. decompose_resid and accumulated_resid hold all the same."
            )
        kept = self.positions()
        if kept is None or self.layout is None:
            raise NotApplicable("The cache has no token layout, so what the model pools is not known.")
        shares = torch.zeros(self.layout.n_tokens, dtype=stack.dtype, device=stack.device)
        shares[_positions(_pooled(spec, self.layout), self.layout.n_tokens)] = 1
        shares = shares / shares.sum()
        found = shares[kept][self._columns(pos_slice, len(kept))]
        if found.shape[0] != stack.shape[-2] or found.count_nonzero() != shares.count_nonzero():
            raise InputError(
                f"The model pools {int(shares.count_nonzero())} of {self.layout.n_tokens} tokens; the stack's "
                f"{stack.shape[-2]} positions do not hold them all. Was it cut to some tokens? Give the same pos_slice."
            )
        return found

    def _direction(self, classes: Classes, against: Classes | None) -> Tensor:
        vit = self._vit()
        if vit.spec.n_classes is None or vit.spec.n_heads_out != 1:
            raise NotApplicable("This model has no single linear head, so there are no logits to attribute.")
        direction = vit.head.weight[self._classes(classes)]
        return direction if against is None else direction - vit.head.weight[self._classes(against)]

    def _classes(self, classes: Classes) -> Tensor:
        vit = self._vit()
        given = classes.tolist() if isinstance(classes, Tensor) else classes
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
            if given not in labels:
                raise UnknownName(f"No class {given!r} among the model's {len(labels)} labels.{suggest(given, labels)}")
            return labels.index(given)
        n = vit.spec.n_classes or 0
        if not 0 <= given < n:
            raise UnknownName(f"No class {given}: they run from 0 to {n - 1}.")
        return given


def _block(vit: HookedViT, index: int) -> Block:
    return cast("Block", vit.blocks[index])


def _positions(index: Index | None, n: int) -> list[int]:
    every = range(n)
    if index is None:
        return list(every)
    if isinstance(index, slice):
        return list(every[index])
    given = index.tolist() if isinstance(index, Tensor) else index
    wanted = [given] if isinstance(given, int) else list(cast("Sequence[int]", given))
    if any(not -n <= each < n for each in wanted):
        raise InputError(f"No position {wanted}: there are {n}.")
    return [every[each] for each in wanted]


def _pooled(spec: ModelSpec, layout: TokenLayout) -> int | slice:
    if spec.pool.kind == "token":
        return 0
    return layout.slice("all" if spec.pool.with_prefix else "patches")


def _linear(norm: Norm, x: Tensor, scale: Tensor) -> Tensor:
    if norm.spec.kind == "ln":
        x = x - x.mean(-1, keepdim=True)
    return x / scale * norm.weight


def _scaled(scale: object, x: Tensor) -> Tensor:
    gamma = getattr(scale, "gamma", None)
    return x * gamma if isinstance(gamma, Tensor) else x


def _after_norm(layer: int, what: str, norm: str, out: str) -> NotApplicable:
    return NotApplicable(
        f"Layer {layer} is a res_post block: {norm} normalises the sum of its {what} before it joins the stream, so "
        f"{out} is no sum over {what}. decompose_resid holds all the same."
    )
