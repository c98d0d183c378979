"""What parts of the residual stream say about the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from prisma_core.errors import InputError, NotApplicable
from prisma_core.spec import TextSpec
from prisma_core.transformer.stream.readout import Readout, linear
from prisma_core.transformer.stream.stream import Stream, block_of
from prisma_core.transformer.tower import class_index

if TYPE_CHECKING:
    from prisma_core.hooks.capture import Index
    from prisma_core.hooks.tokens import TokenLayout
    from prisma_core.transformer.norm import Norm

Classes = int | str | Sequence["int | str"] | Tensor


class LogitAttribution(Stream):
    """The end of the stream, read as the model reads it.

    Scales of norms, and the pattern of attention that pools, are frozen as they were in the pass: from the stream to
    the output the model is then linear.
    """

    def apply_ln_to_stack(
        self,
        residual_stack: Float[Tensor, "component *batch pos d_model"],
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Index | str | None = None,
    ) -> Float[Tensor, "component *batch pos d_model"]:
        """Return a stack as the norm that reads the stream would leave it, its scale frozen at the cached one.

        The norm is then linear: components stay components, and the biases of the norm are left out (for the logits,
        ``logit_constant`` counts them). At the end of the stream that is ``ln_final`` and, where pooling leaves the
        width as it is, the norm behind it.

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

    def project_stack(
        self,
        residual_stack: Float[Tensor, "component *batch pos d_model"],
        pos_slice: Index | str | None = None,
        per_token: bool = False,
    ) -> Float[Tensor, " component *read"]:
        """Return what each component adds to the model's whole output: ``[component batch class]``.

        The output of a tower of a dual encoder is the vector that it compares: ``[component batch d_embed]``. Over a
        full decomposition the components and ``logit_constant()`` sum to the output.

        Args:
            residual_stack, pos_slice, per_token: as in ``logit_attrs``.

        Raises:
            UnknownName, NotApplicable: as there.
        """
        found = [
            pooled if read.head is None else einsum(pooled, read.head.weight.to(pooled), "... d, out d -> ... out")
            for read, pooled in self._read(residual_stack, pos_slice, per_token)
        ]
        return torch.stack(found).mean(0)

    def logit_attrs(
        self,
        residual_stack: Float[Tensor, "component *batch pos d_model"],
        classes: Classes,
        against: Classes | None = None,
        pos_slice: Index | str | None = None,
        per_token: bool = False,
    ) -> Float[Tensor, " component *read"]:
        """Return what each component adds to a logit: ``[component batch]``.

        The final norms are applied with their cached scales, the model's own pooling, then the head. Over a full
        decomposition the attributions and ``logit_constant`` sum to the logit.

        Args:
            residual_stack: components of the stream at its end, with no norm applied.
            classes: a class, as index or label, for all images, or one for each; or a direction in the output, as
                floating point numbers ``[class]``, or one for each image ``[batch class]``.
            against: classes whose logit is subtracted.
            pos_slice: the tokens the stack was cut to, if it was. All that the model pools must be there.
            per_token: keep the token axis, ``[component batch pos]``; the sum over it is what is returned otherwise.

        Raises:
            UnknownName: no such class, or the cache lacks a scale.
            NotApplicable: the model has no head to count classes of, or its output is no sum over components.
        """
        reads = self._read(residual_stack, pos_slice, per_token)
        attrs: list[Tensor] = []
        for read, pooled in reads:
            weight, _ = self._rows(read, pooled, classes, against)
            if weight.ndim > 1 and (per_token or not read.shares):
                weight = weight[:, None]  # one for each image, the same for all of its tokens
            attrs.append(einsum(pooled, weight, "... d, ... d -> ..."))
        return torch.stack(attrs).mean(0)

    def logit_constant(self, classes: Classes | None = None, against: Classes | None = None) -> Float[Tensor, " *read"]:
        """Return the part of a logit that is in no component: ``[batch]``, or of all logits ``[batch class]``.

        That is the biases of the final norms, of the pooling and of the head, and what an MLP in the pooling adds.

        Args:
            classes, against: as in ``logit_attrs``; None for all.
        """
        reads = self._readouts()
        tower = self._tower()
        scale = self._need_scales()
        like = scale if scale is not None else next(iter(self.store.values()))
        batch = [like.shape[0]] if self.has_batch_dim else []
        found: list[Tensor] = []
        for read in reads:
            lone = not read.shares  # each token is read by itself, so their axis stays
            x = like.new_zeros(*batch, *([1] if lone else []), tower.spec.d_model)
            if tower.spec.ln_final is not None and (bias := cast("Norm", tower.ln_final).bias) is not None:
                x = x + bias.to(x)
            x = read.pooled_constant(x)
            if tower.spec.ln_pool is not None:
                norm = cast("Norm", tower.ln_pool)
                x = linear(norm, x, self.store["ln_pool.hook_scale"])
                x = x if norm.bias is None else x + norm.bias.to(x)
            if classes is None:
                found.append(x if read.head is None else x @ read.head.weight.to(x).T + read.head.bias.to(x))
                continue
            weight, bias = self._rows(read, x, classes, against)
            weight = weight[:, None] if weight.ndim > 1 and lone else weight
            found.append(einsum(x, weight, "... d, ... d -> ...") + (bias[..., None] if bias.ndim and lone else bias))
        return torch.stack(found).mean(0)

    # ---------------------------------------------------------------- from the stream to what is pooled

    def _readouts(self) -> list[Readout]:
        tower = self._summed(len(self._tower().blocks))
        self._need(tower.readout_names())
        tokens = self.tokens if self.tokens is None or self.has_batch_dim else self.tokens[:1]
        reads = tower.readouts(self.store, n_tokens=self._n_tokens(), tokens=tokens)
        if self.has_batch_dim or tokens is None:
            return reads
        return [replace(read, shares=tuple(share[0] for share in read.shares)) for read in reads]

    def _need_scales(self) -> Tensor | None:
        """A scale of the norms behind the last block, once it is sure that all are there."""
        spec = self._tower().spec
        paths = [f"{name}.hook_scale" for name in ("ln_final", "ln_pool") if getattr(spec, name) is not None]
        self._need(paths)
        return self.store[paths[0]] if paths else None

    def _read(
        self, stack: Tensor, pos_slice: Index | str | None, per_token: bool
    ) -> list[tuple[Readout, Float[Tensor, "component *read d_pool"]]]:
        """What each component brings to what each head reads, behind all norms."""
        tower, reads = self._tower(), self._readouts()
        self._need_scales()
        if tower.spec.ln_final is not None:
            stack = self._normed("ln_final", cast("Norm", tower.ln_final), stack, pos_slice)
        found: list[tuple[Readout, Tensor]] = []
        for read in reads:
            if not read.shares and tower.spec.pool.kind == "patches":
                stack = self._without_prefix(stack, pos_slice)
            shares = tuple(self._share(share, stack, pos_slice) for share in read.shares)
            pooled = read.pooled(stack, shares, per_token=per_token)
            if tower.spec.ln_pool is not None:
                norm, scale = cast("Norm", tower.ln_pool), self.store["ln_pool.hook_scale"]
                if tower.spec.pool.kind == "none":
                    scale = self._at("ln_pool.hook_scale", pos_slice)
                pooled = linear(norm, pooled, scale[..., None, :] if read.shares and per_token else scale)
            found.append((read, pooled))
        return found

    def _share(self, share: Tensor, stack: Tensor, pos_slice: Index | str | None) -> Tensor:
        """The share of each of a stack's tokens in what is pooled: ``[... pos]``."""
        kept = self.positions()
        tokens = [] if kept is None else [kept[column] for column in self._columns(pos_slice, len(kept))]
        pooled = (share != 0).flatten(0, -2).any(0) if share.ndim > 1 else share != 0
        wanted = cast("list[int]", pooled.nonzero().flatten().tolist())
        if len(tokens) != stack.shape[-2] or not set(wanted) <= set(tokens):
            raise InputError(
                f"The model pools {len(wanted)} of {share.shape[-1]} tokens, and the stack's {stack.shape[-2]} "
                "positions do not hold them all. Was it cut to some tokens? Give the same pos_slice."
            )
        return share[..., tokens].to(stack)

    def _without_prefix(self, stack: Tensor, pos_slice: Index | str | None) -> Tensor:
        kept = self.positions()
        if kept is None or pos_slice is not None or self.pos is not None:
            raise NotApplicable("This model reads every patch by itself: take the stack and the cache whole.")
        return stack[..., cast("TokenLayout", self.layout).n_prefix :, :]

    def _norm_before(self, end: int, mlp_input: bool) -> list[tuple[str, Norm]]:
        """The norms that read the stream there, in order."""
        tower = self._summed(0)
        if end == len(tower.blocks):
            self._summed(end)
            found = [("ln_final", tower.ln_final)] if tower.spec.ln_final is not None else []
            if tower.spec.ln_pool is not None and tower.spec.pool.kind not in ("attention", "token_and_avg"):
                found.append(("ln_pool", tower.ln_pool))
            return cast("list[tuple[str, Norm]]", found)
        block = block_of(tower, end)
        if block.spec.kind in ("res_post", "post"):
            return []
        if block.spec.n_parallel > 1:
            raise NotApplicable(f"Layer {end} reads the stream through {block.spec.n_parallel} norms side by side.")
        name, spec = ("ln2", block.spec.ln2) if mlp_input else ("ln1", block.spec.ln1)
        return [] if spec is None else [(f"blocks.{end}.{name}", cast("Norm", getattr(block, name)))]

    def _normed(self, path: str, norm: Norm, stack: Tensor, pos_slice: Index | str | None) -> Tensor:
        if path == "ln_pool" and self._tower().spec.pool.kind != "none":
            scale = self.store[f"{path}.hook_scale"][..., None, :]
        else:
            scale = self._at(f"{path}.hook_scale", pos_slice)
        if stack.ndim < 2 or stack.shape[-1] != norm.width or scale.shape[-2] not in (1, stack.shape[-2]):
            raise InputError(
                f"Expected a stack [component {'batch ' if self.has_batch_dim else ''}{scale.shape[-2]} {norm.width}], "
                f"got shape {list(stack.shape)}. Was it cut to some tokens? Give the same pos_slice."
            )
        return linear(norm, stack, scale)

    # ---------------------------------------------------------------- classes and directions

    def _rows(
        self, read: Readout, like: Tensor, classes: Classes, against: Classes | None
    ) -> tuple[Float[Tensor, "*batch d_pool"], Float[Tensor, " *batch"]]:
        """What a head's weights and biases are along some classes or directions."""
        weight = torch.eye(like.shape[-1]) if read.head is None else read.head.weight
        bias = torch.zeros(like.shape[-1]) if read.head is None else read.head.bias
        return self._of(weight.to(like), classes, against), self._of(bias.to(like), classes, against)

    def _of(self, parameter: Tensor, classes: Classes, against: Classes | None) -> Tensor:
        """The rows of the classes, ``[...]`` or ``[batch ...]``, less those they are held against."""
        found = self._chosen(parameter, classes)
        return found if against is None else found - self._chosen(parameter, against)

    def _chosen(self, parameter: Tensor, classes: Classes) -> Tensor:
        if not isinstance(classes, Tensor) or not classes.is_floating_point():
            return parameter[self._classes(classes)]
        given, n = classes.to(parameter), len(parameter)
        batch = next(iter(self.store.values())).shape[0] if self.has_batch_dim else None
        if given.shape[-1:] != (n,) or given.ndim > 2 or (given.ndim == 2 and len(given) not in (1, batch)):
            raise InputError(
                f"Expected a direction [{n}] in the model's output, or one for each input [batch {n}]; "
                f"got shape {list(given.shape)}."
            )
        return given @ parameter

    def _classes(self, classes: Classes) -> Tensor:
        tower = self._tower()
        given = cast("int | list[int]", classes.tolist()) if isinstance(classes, Tensor) else classes
        if isinstance(given, int | str):
            return torch.tensor(class_index(tower, given))
        found = torch.tensor([class_index(tower, each) for each in cast("Sequence[int | str]", given)])
        batch = next(iter(self.store.values())).shape[0]
        if not self.has_batch_dim or len(found) not in (1, batch):
            what = "texts" if isinstance(tower.spec, TextSpec) else "images"
            raise InputError(f"Expected one class, or one for each of the {batch} {what}; got {len(found)}.")
        return found.to(tower.head.weight.device)
