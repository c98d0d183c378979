"""What the residual stream is a sum of.

All stacks are ``[component batch pos d_model]``, without ``batch`` where the cache has none. Names and meaning are
TransformerLens'; ``layer`` is the block whose input is decomposed, and None or -1 the end of the stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from prisma_core.attribution import Branch, LogitAttribution, block_of, branches
from prisma_core.captures import positions_of
from prisma_core.errors import InputError, NotApplicable

if TYPE_CHECKING:
    from prisma_core.captures import Index
    from prisma_core.transformer.attention import Attention
    from prisma_core.transformer.mlp import MLP

Stack: TypeAlias = Float[Tensor, "component *batch pos d_model"]
Labelled: TypeAlias = tuple[Stack, list[str]]


class Decompositions(LogitAttribution):
    """The decompositions of an ``ActivationCache``."""

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Index | str | None = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Stack | Labelled:
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
        end = self._end(layer, mlp_input)
        found: list[tuple[str, str]] = []
        for index in range(end):
            if mode != "mlp":
                found.append((f"{index}_attn_out", f"blocks.{index}.hook_attn_out"))
            if mode != "attn" and block_of(vit, index).spec.mlp is not None:
                found.append((f"{index}_mlp_out", f"blocks.{index}.hook_mlp_out"))
        if mlp_input and mode != "mlp":
            found.append((f"{end}_attn_out", f"blocks.{end}.hook_attn_out"))
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
    ) -> Stack | Labelled:
        """Return the stream itself before every block up to a layer: ``0_pre``, ``0_mid``, ..., ``final_post``.

        Args:
            layer, apply_ln, pos_slice, mlp_input, return_labels: as in ``decompose_resid``.
            incl_mid: also the stream between attention and MLP, where a block has such a place.

        Raises:
            UnknownName: the cache lacks activations; the message says which to ask for.
        """
        vit = self._vit()
        end = self._end(layer, mlp_input)
        found: list[tuple[str, str]] = []
        for index in range(min(end + 1, len(vit.blocks))):
            found.append((f"{index}_pre", f"blocks.{index}.hook_resid_pre"))
            spec = block_of(vit, index).spec
            if (incl_mid and index < end and spec.mlp is not None and spec.kind != "parallel") or (
                mlp_input and index == end
            ):
                found.append((f"{index}_mid", f"blocks.{index}.hook_resid_mid"))
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
    ) -> Stack | Labelled:
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
        found = [(index, branch) for index in range(end) for branch in branches(vit, index, "attn")]
        self._need([self._head_source(index, branch) for index, branch in found])
        parts: list[Tensor] = []
        labels: list[str] = []
        for index, branch in found:
            results = self._head_results(index, branch, pos_slice)
            parts += results.unbind(-2)
            first = branch.side * results.shape[-2]
            labels += [f"L{index}H{first + head}" for head in range(results.shape[-2])]
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
    ) -> Stack | Labelled:
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
        found = [(index, branch) for index in range(end) for branch in branches(vit, index, "mlp")]
        self._need([f"{branch.path}.hook_post" for _, branch in found])
        parts: list[Tensor] = []
        labels: list[str] = []
        for index, branch in found:
            if block_of(vit, index).spec.kind == "res_post" and block_of(vit, index).spec.ln2 is not None:
                raise _after_norm(index, "neurons", "ln2", "mlp_out")
            w_out = cast("MLP", branch.module).W_out
            kept = positions_of(neuron_slice, len(w_out))
            post = self._at(f"{branch.path}.hook_post", pos_slice)[..., kept]
            parts += (post[..., None] * _scaled(branch.scale, w_out[kept].to(post))).unbind(-2)
            labels += [f"L{index}N{branch.side * len(w_out) + neuron}" for neuron in kept]
        if incl_remainder:
            self._remainder(parts, labels, end, pos_slice)
        if not parts:
            raise InputError(f"No neurons before layer {layer} of {len(vit.blocks)}.")
        return self._stacked(parts, labels, layer, False, apply_ln, pos_slice, return_labels)

    # ---------------------------------------------------------------- parts

    def _start(self) -> list[tuple[str, list[str]]]:
        """What starts the stream: label, and the activation, less another."""
        spec = self._vit().spec
        if spec.ln_pre is not None:
            return [("ln_pre", ["hook_ln_pre"])]
        if not spec.embed.pos:
            return [("embed", ["hook_full_embed"])]
        return [("embed", ["hook_full_embed", "hook_pos_embed"]), ("pos_embed", ["hook_pos_embed"])]

    def _head_source(self, index: int, branch: Branch) -> str:
        spec = block_of(self._vit(), index).spec
        if spec.kind == "res_post" and spec.ln1 is not None:
            raise _after_norm(index, "heads", "ln1", "attn_out")
        if f"{branch.path}.hook_result" in self.store:
            return f"{branch.path}.hook_result"
        return f"{branch.path}.hook_z" if spec.attn.inner_norm is None else f"{branch.path}.ln.hook_normalized"

    def _head_results(self, index: int, branch: Branch, pos_slice: Index | str | None) -> Tensor:
        heads = block_of(self._vit(), index).spec.attn.n_heads
        name = self._head_source(index, branch)
        x = self._at(name, pos_slice)
        if name.endswith("hook_normalized"):
            x = rearrange(x, "... (head d_head) -> ... head d_head", head=heads)
        if x.shape[-2] != heads:
            raise NotApplicable(f"{name} holds {x.shape[-2]} of {heads} heads: cache all of them.")
        if not name.endswith("hook_result"):
            w_o = cast("Attention", branch.module).W_O.to(x)
            x = einsum(x, w_o, "... head d_head, head d_head d_model -> ... head d_model")
        return _scaled(branch.scale, x)

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
    ) -> Stack | Labelled:
        stack = torch.stack(parts)
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input, pos_slice)
        return (stack, labels) if return_labels else stack


def _scaled(scale: object, x: Tensor) -> Tensor:
    gamma = getattr(scale, "gamma", None)
    return x * gamma.to(x) if isinstance(gamma, Tensor) else x


def _after_norm(layer: int, what: str, norm: str, out: str) -> NotApplicable:
    return NotApplicable(
        f"Layer {layer} is a res_post block: {norm} normalises the sum of its {what} before it joins the stream, so "
        f"{out} is no sum over {what}. decompose_resid holds all the same."
    )
