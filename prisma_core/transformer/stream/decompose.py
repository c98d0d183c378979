"""Parts of which the residual stream is the sum, in transformers of images and of texts.

All stacks are ``[component batch pos d_model]``, without ``batch`` where the cache has none. Names and meaning are
TransformerLens'; ``layer`` is the block whose input is decomposed, and None or -1 the end of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from prisma_core.errors import InputError, NotApplicable
from prisma_core.errors.arguments import check_flags, choice, number, shown, tensor
from prisma_core.spec.layout import Index, positions_of
from prisma_core.transformer.attention import Attention
from prisma_core.transformer.block import Branch, attentions, end_of, mlps
from prisma_core.transformer.stream.attribution import LogitAttribution

Stack: TypeAlias = Float[Tensor, "component *batch pos d_model"]
Projected: TypeAlias = Float[Tensor, " component *batch"]
Labelled: TypeAlias = tuple[Projected, list[str]]


@dataclass(frozen=True)
class Reading:
    """The reading of components at one place of the stream, while they are computed.

    Attributes:
        layer, mlp_input: the place.
        apply_ln: after the norm that reads the stream there.
        pos_slice: at these tokens.
        onto: along these directions ``[d_model output]``; None for whole components.
        scale: what is divided by after that: ``[*batch pos 1]``.
        one_direction: there is one, so the last axis goes.
    """

    layer: int | None
    mlp_input: bool = False
    apply_ln: bool = False
    pos_slice: Index | str | None = None
    onto: Tensor | None = None
    scale: Tensor | None = None
    one_direction: bool = False

    def along(self, x: Tensor) -> Tensor:
        """Return vectors of the stream ``[... d_model]`` along the directions ``[... output]``, or as they are."""
        return x if self.onto is None else x @ self.onto.to(x)


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

        >>> logits, cache = model.run_with_cache(image)
        >>> parts, labels = cache.decompose_resid(return_labels=True)
        >>> torch.allclose(parts.sum(0), cache["resid_post", -1], atol=1e-4)
        True
        """
        choice(mode, ("all", "mlp", "attn"), "the mode")
        check_flags(mlp_input=mlp_input, apply_ln=apply_ln, incl_embeds=incl_embeds, return_labels=return_labels)
        blocks = self._before(layer, mlp_input)
        places = self._start() if incl_embeds else []
        for index, block in enumerate(blocks):
            if mode != "mlp":
                places.append((f"{index}_attn_out", [f"blocks.{index}.hook_attn_out"]))
            if mode != "attn" and block.spec.mlp is not None:
                places.append((f"{index}_mlp_out", [f"blocks.{index}.hook_mlp_out"]))
        if mlp_input and mode != "mlp":
            places.append((f"{len(blocks)}_attn_out", [f"blocks.{len(blocks)}.hook_attn_out"]))
        self._need([name for _, names in places for name in names])
        if not places:
            raise InputError(
                f"Nothing is added to the stream before layer {layer} with mode={mode!r}, incl_embeds=False."
            )
        parts: list[Tensor] = []
        for _, names in places:
            whole, *less = (self._at(name, pos_slice) for name in names)
            parts.append(whole - less[0] if less else whole)
        labels = [label for label, _ in places]
        read = Reading(layer, mlp_input, apply_ln, pos_slice)
        return self._finished(torch.stack(parts), labels, read, return_labels)

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
        check_flags(incl_mid=incl_mid, apply_ln=apply_ln, mlp_input=mlp_input, return_labels=return_labels)
        blocks = self._tower().layers()
        end = end_of(blocks, layer, mlp_input)
        places: list[tuple[str, str]] = []
        for index, block in enumerate(blocks[: end + 1]):
            places.append((f"{index}_pre", f"blocks.{index}.hook_resid_pre"))
            has_mid = block.spec.mlp is not None and block.spec.kind != "parallel"
            if (incl_mid and has_mid and index < end) or (mlp_input and index == end):
                places.append((f"{index}_mid", f"blocks.{index}.hook_resid_mid"))
        if end == len(blocks):
            places.append(("final_post", f"blocks.{end - 1}.hook_resid_post"))
        self._need([name for _, name in places])
        stack = torch.stack([self._at(name, pos_slice) for _, name in places])
        read = Reading(layer, mlp_input, apply_ln, pos_slice)
        return self._finished(stack, [label for label, _ in places], read, return_labels)

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Index | str | None = None,
        apply_ln: bool = False,
        source: int | None = None,
        *,
        project_output_onto: Float[Tensor, " d_model *output"] | None = None,
    ) -> Projected | Labelled:
        """Return what each head of every block before a layer adds to the stream: ``L0H0``, ``L0H1``, ...

        Layer scale is applied; attention's output bias belongs to no head and is in the remainder.

        Args:
            layer, pos_slice, apply_ln, return_labels: as in ``decompose_resid``.
            incl_remainder: a last component, ``remainder``: the stream less all heads.
            source: only what heads bring from this token, patterns frozen; over all tokens that sums to the whole.
            project_output_onto: a direction in the stream ``[d_model]``, or several ``[d_model output]``, after the
                norm with ``apply_ln``: components are read along it as they are made, ``[component batch pos]`` or
                ``[component batch pos output]``, so that whole components never stand in memory.

        Raises:
            UnknownName: the cache lacks activations; the message says which to ask for.
            NotApplicable: a norm stands between the heads and the stream, which is more than their sum then.
            InputError: there is no head before the layer, or the direction is of another width.
        """
        check_flags(return_labels=return_labels, incl_remainder=incl_remainder, apply_ln=apply_ln)
        read = self._reading(layer, apply_ln, pos_slice, project_output_onto)
        branches = [(i, one) for i, block in enumerate(self._before(layer)) for one in attentions(block)]
        if source is None:
            self._need([self._head_source(index, branch) for index, branch in branches])
        else:
            parts_read = ("hook_pattern", "hook_v")
            self._need([f"blocks.{i}.{branch.name}.{name}" for i, branch in branches for name in parts_read])
        parts: list[Tensor] = []
        labels: list[str] = []
        for index, branch in branches:
            make = self._head_results if source is None else self._brought
            parts.append(make(index, branch, read, source))
            first = branch.side * len(parts[-1])
            labels += [f"L{index}H{first + head}" for head in range(len(parts[-1]))]
        if not parts and not incl_remainder:
            raise InputError(f"No heads before layer {layer} of {len(self._tower().blocks)}.")
        return self._with_remainder(parts, labels, read, incl_remainder, return_labels)

    def stack_neuron_results(
        self,
        layer: int | None = -1,
        pos_slice: Index | str | None = None,
        neuron_slice: Index | None = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        *,
        project_output_onto: Float[Tensor, " d_model *output"] | None = None,
    ) -> Projected | Labelled:
        """Return what each MLP neuron of every block before a layer adds to the stream: ``L0N0``, ``L0N1``, ...

        This is large: give ``pos_slice``, ``neuron_slice`` or ``project_output_onto``. Layer scale is applied; the
        output bias belongs to no neuron and is in the remainder.

        Args:
            layer, pos_slice, apply_ln, return_labels: as in ``decompose_resid``.
            neuron_slice: the neurons of every layer to keep.
            incl_remainder: a last component, ``remainder``: the stream less all neurons kept.
            project_output_onto: as in ``stack_head_results``.

        Raises:
            UnknownName: the cache lacks activations; the message says which to ask for.
            NotApplicable: a norm stands between the neurons and the stream.
            InputError: there is no neuron before the layer, or the direction is of another width.

        >>> cat = model.W_U[:, 3]  # of a model that reads its class token
        >>> cache.stack_neuron_results(pos_slice="cls", apply_ln=True, project_output_onto=cat).shape
        torch.Size([768, 1, 1])
        """
        check_flags(return_labels=return_labels, incl_remainder=incl_remainder, apply_ln=apply_ln)
        read = self._reading(layer, apply_ln, pos_slice, project_output_onto)
        branches = [(i, block.spec, one) for i, block in enumerate(self._before(layer)) for one in mlps(block)]
        self._need([f"blocks.{index}.{branch.name}.hook_post" for index, _, branch in branches])
        parts: list[Tensor] = []
        labels: list[str] = []
        for index, spec, branch in branches:
            if spec.kind == "res_post" and spec.ln2 is not None:
                raise _after_norm(index, "neurons", "ln2", "mlp_out")
            w_out = branch.module.W_out
            neurons = positions_of(neuron_slice, len(w_out))
            post = self._at(f"blocks.{index}.{branch.name}.hook_post", pos_slice)[..., neurons]
            written = read.along(branch.scaled(w_out[neurons].to(post)))
            parts.append(einsum(post, written, "... neuron, neuron out -> neuron ... out"))
            labels += [f"L{index}N{branch.side * len(w_out) + neuron}" for neuron in neurons]
        if not parts and not incl_remainder:
            raise InputError(f"No neurons before layer {layer} of {len(self._tower().blocks)}.")
        return self._with_remainder(parts, labels, read, incl_remainder, return_labels)

    # ---------------------------------------------------------------- parts

    def _start(self) -> list[tuple[str, list[str]]]:
        """The start of the stream: label, and the activation, less another."""
        tower = self._tower()
        if self._spec().ln_pre is not None:
            return [("ln_pre", ["hook_ln_pre"])]
        if not hasattr(tower, "hook_pos_embed"):
            return [("embed", ["hook_full_embed"])]
        return [("embed", ["hook_full_embed", "hook_pos_embed"]), ("pos_embed", ["hook_pos_embed"])]

    def _head_source(self, layer: int, branch: Branch[Attention]) -> str:
        """The cached activation that heads' results are made of."""
        spec, at = self._tower().layers()[layer].spec, f"blocks.{layer}.{branch.name}"
        if spec.kind == "res_post" and spec.ln1 is not None:
            raise _after_norm(layer, "heads", "ln1", "attn_out")
        if f"{at}.hook_result" in self.store:
            return f"{at}.hook_result"
        return f"{at}.hook_z" if spec.attn.inner_norm is None else f"{at}.ln.hook_normalized"

    def _head_results(self, layer: int, branch: Branch[Attention], read: Reading, source: int | None) -> Tensor:
        """The addends of the heads to the stream: ``[head *batch pos output]``."""
        name, heads = self._head_source(layer, branch), branch.module.spec.n_heads
        x = self._at(name, read.pos_slice)
        if name.endswith("hook_normalized"):
            x = rearrange(x, "... (head d_head) -> ... head d_head", head=heads)
        if x.shape[-2] != heads:
            raise NotApplicable(f"{name} holds {x.shape[-2]} of {heads} heads: cache all of them.")
        if name.endswith("hook_result"):
            return read.along(branch.scaled(x.movedim(-2, 0)))
        w_o = read.along(branch.scaled(branch.module.W_O.to(x)))
        return einsum(x, w_o, "... head d_head, head d_head out -> head ... out")

    def _brought(self, layer: int, branch: Branch[Attention], read: Reading, source: int | None) -> Tensor:
        """The addends of the heads that come from one token: ``[head *batch pos output]``."""
        self._head_source(layer, branch)  # refuses a norm between the heads and the stream
        spec, at = branch.module.spec, f"blocks.{layer}.{branch.name}"
        if spec.inner_norm is not None:
            raise NotApplicable(f"Layer {layer} norms its heads' outputs, so they are no sum over what they read.")
        pattern, v = self.store[f"{at}.hook_pattern"], self.store[f"{at}.hook_v"]
        heads, keys = spec.n_heads, pattern.shape[-1]
        if v.shape[-3] != keys or pattern.shape[-3] != heads or v.shape[-2] != spec.n_kv_heads:
            raise NotApplicable(f"{at}.hook_v holds {v.shape[-3]} of {keys} tokens: cache all of them, whole.")
        token = number(source, "the token that heads read")
        if not -keys <= token < keys:
            raise InputError(f"No token {source}: there are {keys}.")
        if read.pos_slice is not None:
            pattern = self._cut(pattern, pattern.ndim - 2, read.pos_slice)
        values = v.select(-3, token).repeat_interleave(heads // spec.n_kv_heads, -2)
        w_o = read.along(branch.scaled(branch.module.W_O.to(values)))
        written = einsum(values, w_o, "... head d_head, head d_head out -> ... head out")
        attended = pattern[..., token].to(values)
        return einsum(attended, written, "... head pos, ... head out -> head ... pos out")

    def _reading(
        self, layer: int | None, apply_ln: bool, pos_slice: Index | str | None, onto: Tensor | None
    ) -> Reading:
        if onto is None:
            return Reading(layer, False, apply_ln, pos_slice)
        d_model = self._spec().d_model
        tensor(onto, "project_output_onto")
        if onto.ndim not in (1, 2) or len(onto) != d_model:
            raise InputError(
                f"Expected project_output_onto [{d_model}] or [{d_model} output], a direction in the stream; got "
                f"{shown(onto)}."
            )
        matrix, scale = onto[:, None] if onto.ndim == 1 else onto, None
        for path, norm in reversed(self._norms(layer, False) if apply_ln else []):
            # A norm of a given scale is linear: what is along u after it is along norm^T u before it.
            matrix = norm.centred((norm.weight.to(matrix)[:, None] * matrix).T).T
            divisor = norm.divisor(self._scale(path, pos_slice))
            if scale is not None and scale.shape[-2] != 1 and scale.shape[-2] != divisor.shape[-2]:
                divisor = self._without_prefix(divisor, pos_slice)
            scale = divisor if scale is None else scale * divisor
        return Reading(layer, False, apply_ln, pos_slice, matrix, scale, onto.ndim == 1)

    def _with_remainder(
        self, parts: list[Tensor], labels: list[str], read: Reading, incl_remainder: bool, return_labels: bool
    ) -> Tensor | Labelled:
        if incl_remainder:
            blocks = self._tower().layers()
            end = end_of(blocks, read.layer)
            name = f"blocks.{end}.hook_resid_pre" if end < len(blocks) else f"blocks.{end - 1}.hook_resid_post"
            self._need([name])
            whole = read.along(self._at(name, read.pos_slice))
            rest = whole - torch.stack([part.sum(0) for part in parts]).sum(0) if parts else whole
            parts, labels = [*parts, rest[None]], [*labels, "remainder"]
        return self._finished(torch.cat(parts), labels, read, return_labels)

    def _finished(self, stack: Tensor, labels: list[str], read: Reading, return_labels: bool) -> Tensor | Labelled:
        if read.onto is not None:
            if read.scale is not None and read.scale.shape[-2] not in (1, stack.shape[-2]):
                stack = self._without_prefix(stack, read.pos_slice)
            stack = stack if read.scale is None else (stack / read.scale).to(stack)
            stack = stack[..., 0] if read.one_direction else stack
        elif read.apply_ln:
            stack = self.apply_ln_to_stack(stack, read.layer, read.mlp_input, read.pos_slice)
        return (stack, labels) if return_labels else stack


def _after_norm(layer: int, what: str, norm: str, out: str) -> NotApplicable:
    return NotApplicable(
        f"Layer {layer} is a res_post block: {norm} normalises the sum of its {what} before it joins the stream, so "
        f"{out} is no sum over {what}. decompose_resid holds all the same."
    )
