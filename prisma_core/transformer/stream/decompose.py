"""What the residual stream is a sum of, in transformers of pictures and of texts.

All stacks are ``[component batch pos d_model]``, without ``batch`` where the cache has none. Names and meaning are
TransformerLens'; ``layer`` is the block whose input is decomposed, and None or -1 the end of the stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from prisma_core.errors import InputError, NotApplicable
from prisma_core.hooks.capture import positions_of
from prisma_core.transformer.stream.attribution import LogitAttribution
from prisma_core.transformer.stream.stream import Branch, block_of, branches

if TYPE_CHECKING:
    from prisma_core.hooks.capture import Index
    from prisma_core.transformer.attention import Attention
    from prisma_core.transformer.mlp import MLP

Stack: TypeAlias = Float[Tensor, "component *batch pos d_model"]
Labelled: TypeAlias = tuple[Stack, list[str]]


class StreamCache(LogitAttribution):
    """A cache of one canonical transformer, with the decompositions of its residual stream."""

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
        end = self._end(layer, mlp_input)
        tower = self._summed(end)
        found: list[tuple[str, str]] = []
        for index in range(end):
            if mode != "mlp":
                found.append((f"{index}_attn_out", f"blocks.{index}.hook_attn_out"))
            if mode != "attn" and block_of(tower, index).spec.mlp is not None:
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
        end = self._end(layer, mlp_input)
        tower = self._tower()
        found: list[tuple[str, str]] = []
        for index in range(min(end + 1, len(tower.blocks))):
            found.append((f"{index}_pre", f"blocks.{index}.hook_resid_pre"))
            spec = block_of(tower, index).spec
            if (incl_mid and index < end and spec.mlp is not None and spec.kind != "parallel") or (
                mlp_input and index == end
            ):
                found.append((f"{index}_mid", f"blocks.{index}.hook_resid_mid"))
        if end == len(tower.blocks):
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
        source: int | None = None,
    ) -> Stack | Labelled:
        """Return what each head of every block before a layer adds to the stream: ``L0H0``, ``L0H1``, ...

        Layer scale is applied; attention's output bias belongs to no head and is in the remainder.

        Args:
            layer, pos_slice, apply_ln, return_labels: as in ``decompose_resid``.
            incl_remainder: a last component, ``remainder``: the stream less all heads.
            source: only what heads bring from this token, patterns frozen; over all tokens that sums to the whole.

        Raises:
            UnknownName: the cache lacks activations; the message says which to ask for.
            NotApplicable: a norm stands between the heads and the stream, so it is no sum of heads.
        """
        end = self._end(layer)
        tower = self._summed(end)
        found = [(index, branch) for index in range(end) for branch in branches(tower, index, "attn")]
        if source is None:
            self._need([self._head_source(index, branch) for index, branch in found])
        else:
            self._need([f"{branch.path}.hook_{name}" for _, branch in found for name in ("pattern", "v")])
        parts: list[Tensor] = []
        labels: list[str] = []
        for index, branch in found:
            results = (
                self._head_results(index, branch, pos_slice)
                if source is None
                else self._brought(index, branch, pos_slice, source)
            )
            parts += results.unbind(-2)
            first = branch.side * results.shape[-2]
            labels += [f"L{index}H{first + head}" for head in range(results.shape[-2])]
        if incl_remainder:
            self._remainder(parts, labels, end, pos_slice)
        if not parts:
            raise InputError(f"No heads before layer {layer} of {len(tower.blocks)}.")
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
        end = self._end(layer)
        tower = self._summed(end)
        found = [(index, branch) for index in range(end) for branch in branches(tower, index, "mlp")]
        self._need([f"{branch.path}.hook_post" for _, branch in found])
        parts: list[Tensor] = []
        labels: list[str] = []
        for index, branch in found:
            if block_of(tower, index).spec.kind == "res_post" and block_of(tower, index).spec.ln2 is not None:
                raise _after_norm(index, "neurons", "ln2", "mlp_out")
            w_out = cast("MLP", branch.module).W_out
            kept = positions_of(neuron_slice, len(w_out))
            post = self._at(f"{branch.path}.hook_post", pos_slice)[..., kept]
            parts += (post[..., None] * _scaled(branch.scale, w_out[kept].to(post))).unbind(-2)
            labels += [f"L{index}N{branch.side * len(w_out) + neuron}" for neuron in kept]
        if incl_remainder:
            self._remainder(parts, labels, end, pos_slice)
        if not parts:
            raise InputError(f"No neurons before layer {layer} of {len(tower.blocks)}.")
        return self._stacked(parts, labels, layer, False, apply_ln, pos_slice, return_labels)

    # ---------------------------------------------------------------- parts

    def _start(self) -> list[tuple[str, list[str]]]:
        """What starts the stream: label, and the activation, less another."""
        tower = self._tower()
        if tower.spec.ln_pre is not None:
            return [("ln_pre", ["hook_ln_pre"])]
        if not hasattr(tower, "hook_pos_embed"):
            return [("embed", ["hook_full_embed"])]
        return [("embed", ["hook_full_embed", "hook_pos_embed"]), ("pos_embed", ["hook_pos_embed"])]

    def _head_source(self, index: int, branch: Branch) -> str:
        spec = block_of(self._tower(), index).spec
        if spec.kind == "res_post" and spec.ln1 is not None:
            raise _after_norm(index, "heads", "ln1", "attn_out")
        if f"{branch.path}.hook_result" in self.store:
            return f"{branch.path}.hook_result"
        return f"{branch.path}.hook_z" if spec.attn.inner_norm is None else f"{branch.path}.ln.hook_normalized"

    def _head_results(self, index: int, branch: Branch, pos_slice: Index | str | None) -> Tensor:
        heads = block_of(self._tower(), index).spec.attn.n_heads
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

    def _brought(self, index: int, branch: Branch, pos_slice: Index | str | None, source: int) -> Tensor:
        """What each head brings from one token to every other: ``[*batch pos head d_model]``."""
        spec = block_of(self._tower(), index).spec
        self._head_source(index, branch)  # refuses a norm between the heads and the stream
        if spec.attn.inner_norm is not None:
            raise NotApplicable(f"Layer {index} norms its heads' outputs, so they are no sum over what they read.")
        pattern, v = self.store[f"{branch.path}.hook_pattern"], self.store[f"{branch.path}.hook_v"]
        heads, keys = spec.attn.n_heads, pattern.shape[-1]
        if v.shape[-3] != keys or pattern.shape[-3] != heads or v.shape[-2] != spec.attn.n_kv_heads:
            raise NotApplicable(f"{branch.path}.hook_v holds {v.shape[-3]} of {keys} tokens: cache all of them, whole.")
        if not -keys <= source < keys:
            raise InputError(f"No token {source}: there are {keys}.")
        if pos_slice is not None:
            columns = torch.tensor(self._columns(pos_slice, pattern.shape[-2]), device=pattern.device)
            pattern = pattern.index_select(-2, columns)
        own = v.select(-3, source).repeat_interleave(heads // spec.attn.n_kv_heads, -2)
        w_o = cast("Attention", branch.module).W_O.to(own)
        written = einsum(own, w_o, "... head d_head, head d_head d_model -> ... head d_model")
        read = pattern[..., source].to(own)
        return _scaled(branch.scale, einsum(read, written, "... head pos, ... head d_model -> ... pos head d_model"))

    def _remainder(self, parts: list[Tensor], labels: list[str], end: int, pos_slice: Index | str | None) -> None:
        name = (
            f"blocks.{end}.hook_resid_pre" if end < len(self._tower().blocks) else f"blocks.{end - 1}.hook_resid_post"
        )
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
