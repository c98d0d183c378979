"""Parts of the residual stream, read as the model reads the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from prisma_core.errors import InputError
from prisma_core.errors.arguments import check_flags, several, shown, tensor, whole
from prisma_core.spec import TextSpec
from prisma_core.spec.layout import Index
from prisma_core.transformer.norm import Norm
from prisma_core.transformer.stream.readout import Readout
from prisma_core.transformer.stream.stream import Stream
from prisma_core.transformer.tower import class_index
from prisma_core.transformer.weights import held

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
        batch_slice: Index | None = None,
        *,
        recompute_ln: bool = False,
    ) -> Float[Tensor, "component *batch pos d_model"]:
        """Return a stack after the norm that reads the stream, its scale frozen at the cached one.

        The norm is then linear: components stay components, and the biases of the norm are left out (for the logits,
        ``logit_constant`` counts them). At the end of the stream that is ``ln_final`` and, where pooling takes single
        tokens or their mean, the norm after it; where that is a norm of patches alone, prefix tokens are left out.

        Args:
            residual_stack: components of the stream, or streams: ``[component batch pos d_model]``.
            layer, mlp_input: which norm: ``ln1`` of the layer, its ``ln2``, or (None, -1) the final ones.
            pos_slice: the tokens the stack was cut to, if it was.
            batch_slice: the images, or texts, the stack was cut to, if it was.
            recompute_ln: norm each component by a scale of its own, bias included, as the norm does with a stream: for
                ``accumulated_resid``, not for components.

        Raises:
            UnknownName: the cache lacks a scale; the message says which to ask for.
            InputError: the stack has other tokens than the cache or ``pos_slice``.
        """
        if batch_slice is not None:
            part = self.apply_slice_to_batch_dim(batch_slice)
            return part.apply_ln_to_stack(residual_stack, layer, mlp_input, pos_slice, recompute_ln=recompute_ln)
        check_flags(mlp_input=mlp_input, recompute_ln=recompute_ln)
        norms = self._norms(layer, mlp_input)
        self._check_stack(residual_stack)
        if not recompute_ln:
            self._need([f"{path}.hook_scale" for path, _ in norms])
        for path, norm in norms:
            if self._reads_patches(path):
                residual_stack = self._without_prefix(residual_stack, pos_slice)
            if recompute_ln:
                residual_stack = norm.fused(residual_stack)
            else:
                residual_stack = self._normed(path, norm, residual_stack, pos_slice)
        return residual_stack

    def project_stack(
        self,
        residual_stack: Float[Tensor, "component *batch pos d_model"],
        pos_slice: Index | str | None = None,
        per_token: bool = False,
        batch_slice: Index | None = None,
    ) -> Float[Tensor, " component *read"]:
        """Return what each component adds to the model's whole output: ``[component batch class]``.

        The output of a tower of a dual encoder is the vector that it compares: ``[component batch d_embed]``. Over a
        full decomposition the components and ``logit_constant()`` sum to the output. For several classes this is one
        product: ``project_stack(stack) @ directions([3, 5]).T``.

        Args:
            residual_stack, pos_slice, per_token, batch_slice: as in ``logit_attrs``.

        Raises:
            UnknownName, NotApplicable: as there.
        """
        if batch_slice is not None:
            return self.apply_slice_to_batch_dim(batch_slice).project_stack(residual_stack, pos_slice, per_token)
        outputs = [
            pooled
            if read.head is None
            else einsum(pooled, held(read.head, "weight").to(pooled), "... d, out d -> ... out")
            for read, pooled in self._read(residual_stack, pos_slice, per_token)
        ]
        return torch.stack(outputs).mean(0)

    def logit_attrs(
        self,
        residual_stack: Float[Tensor, "component *batch pos d_model"],
        classes: Classes | None = None,
        against: Classes | None = None,
        pos_slice: Index | str | None = None,
        per_token: bool = False,
        batch_slice: Index | None = None,
        *,
        tokens: Classes | None = None,
        incorrect_tokens: Classes | None = None,
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
            batch_slice: the images, or texts, the stack was cut to, if it was.
            tokens, incorrect_tokens: TransformerLens' names of ``classes`` and ``against``.

        Raises:
            UnknownName: no such class, or the cache lacks a scale.
            InputError: the stack has other tokens than ``pos_slice``, or lacks some that the model pools.
            NotApplicable: the model has no head to count classes of, or its output is no sum over components.

        >>> parts, labels = cache.decompose_resid(return_labels=True)
        >>> cache.logit_attrs(parts, 3, against=5).shape  # [component batch]; classes by number or label
        torch.Size([8, 1])
        """
        classes, against = _either(classes, tokens, "classes", "tokens"), _either(against, incorrect_tokens)
        if classes is None:
            raise InputError("Expected the classes whose logits are read: logit_attrs(stack, 3) or a label.")
        if batch_slice is not None:
            part = self.apply_slice_to_batch_dim(batch_slice)
            return part.logit_attrs(residual_stack, classes, against, pos_slice, per_token)
        direction = self._direction(classes, against)
        attrs: list[Tensor] = []
        for read, pooled in self._read(residual_stack, pos_slice, per_token):
            weight = direction.to(pooled)
            if read.head is not None:
                weight = einsum(weight, held(read.head, "weight").to(pooled), "... out, out d -> ... d")
            if weight.ndim > 1 and (per_token or not read.shares):
                weight = weight[:, None]  # one for each image, the same for all of its tokens
            attrs.append(einsum(pooled, weight, "... d, ... d -> ..."))
        return torch.stack(attrs).mean(0)

    def logit_constant(
        self,
        classes: Classes | None = None,
        against: Classes | None = None,
        pos_slice: Index | str | None = None,
    ) -> Float[Tensor, " *read"]:
        """Return the part of a logit that is in no component: ``[batch]``, or of all logits ``[batch class]``.

        That is the biases of the final norms, of the pooling and of the head, and what an MLP in the pooling adds.

        Args:
            classes, against: as in ``logit_attrs``; None for all.
            pos_slice: as there, for models that read every token by itself.
        """
        tower, reads = self._tower(), self._readouts()
        scales = self._need_scales()
        like = self.store[scales[0]] if scales else self._first()
        batch = [like.shape[0]] if self.has_batch_dim else []
        outputs: list[Tensor] = []
        for read in reads:
            by_token = not read.shares  # their axis stays
            x = like.new_zeros(*batch, *([1] if by_token else []), self._spec().d_model)
            if isinstance(norm := getattr(tower, "ln_final", None), Norm) and norm.bias is not None:
                x = x + norm.bias.to(x)
            x = read.pooled_constant(x)
            if isinstance(norm := tower.ln_pool, Norm):
                scale = self.store["ln_pool.hook_scale"] if not by_token else self._at("ln_pool.hook_scale", pos_slice)
                x = norm.linear(x, scale)
                x = x if norm.bias is None else x + norm.bias.to(x)
            outputs.append(
                x if read.head is None else x @ held(read.head, "weight").to(x).T + held(read.head, "bias").to(x)
            )
        output = torch.stack(outputs).mean(0)
        if classes is None:
            return output
        direction = self._direction(classes, against).to(output)
        if direction.ndim > 1 and output.ndim > direction.ndim:
            direction = direction[:, None]
        return einsum(output, direction, "... out, ... out -> ...")

    def directions(self, classes: Classes, against: Classes | None = None) -> Float[Tensor, "class out"]:
        """Return the directions in the model's output along which classes lie, one row each: ``[class out]``.

        Args:
            classes: a class, as index or label, or several; directions, as floating point numbers ``[class out]``, come
                back as they are.
            against: a class, or one for each, whose direction is subtracted.

        Raises:
            UnknownName: no such class.
            InputError: directions of another width than the output.
        """
        rows = self._rows(classes)
        return rows if against is None else rows - self._rows(against)

    # ---------------------------------------------------------------- from the stream to what is pooled

    def _readouts(self) -> list[Readout]:
        self._before(None)
        tower = self._tower()
        self._need(tower.readout_names())
        tokens = self.tokens if self.tokens is None or self.has_batch_dim else self.tokens[:1]
        reads = tower.readouts(self.store, n_tokens=self._n_tokens(), tokens=tokens)
        if self.has_batch_dim or tokens is None:
            return reads
        return [replace(read, shares=tuple(share[0] for share in read.shares)) for read in reads]

    def _need_scales(self) -> list[str]:
        """The scales of the norms after the last block, once it is sure that all are there."""
        spec = self._spec()
        names = [f"{name}.hook_scale" for name in ("ln_final", "ln_pool") if getattr(spec, name) is not None]
        self._need(names)
        return names

    def _read(
        self, stack: Tensor, pos_slice: Index | str | None, per_token: bool
    ) -> list[tuple[Readout, Float[Tensor, "component *read d_pool"]]]:
        """Contributions of each component to the input of each head, after all norms."""
        check_flags(per_token=per_token)
        tower, reads = self._tower(), self._readouts()
        self._need_scales()
        self._check_stack(stack)
        if isinstance(norm := getattr(tower, "ln_final", None), Norm):
            stack = self._normed("ln_final", norm, stack, pos_slice)
        outputs: list[tuple[Readout, Tensor]] = []
        for read in reads:
            if not read.shares and self._spec().pool.kind == "patches":
                stack = self._without_prefix(stack, pos_slice)
            shares = tuple(self._share(share, stack, pos_slice) for share in read.shares)
            pooled = read.pooled(stack, shares, per_token=per_token)
            if isinstance(norm := tower.ln_pool, Norm):
                if read.shares:
                    scale = self.store["ln_pool.hook_scale"]
                    pooled = norm.linear(pooled, scale[..., None, :] if per_token else scale)
                else:
                    pooled = self._normed("ln_pool", norm, pooled, pos_slice)
            outputs.append((read, pooled))
        return outputs

    def _share(self, share: Tensor, stack: Tensor, pos_slice: Index | str | None) -> Tensor:
        """The share of each of a stack's tokens in what is pooled: ``[... pos]``."""
        cached = self.positions()
        tokens = [] if cached is None else [cached[column] for column in self._columns(pos_slice, len(cached))]
        pooled = (share != 0).flatten(0, -2).any(0) if share.ndim > 1 else share != 0
        needed = cast("list[int]", pooled.nonzero().flatten().tolist())
        if len(tokens) != stack.shape[-2] or not set(needed) <= set(tokens):
            raise InputError(
                f"The model pools {len(needed)} of {share.shape[-1]} tokens, and the stack's {stack.shape[-2]} "
                "positions do not hold them all. Was it cut to some tokens? Give the same pos_slice here and where the "
                "stack was made, one that holds all that is pooled, or none."
            )
        return share[..., tokens].to(stack)

    def _check_stack(self, stack: Tensor) -> None:
        """Refuse what is no stack of this cache's images, or texts (``InputError``)."""
        width, batch = self._spec().d_model, self._n_batch() if self.has_batch_dim else None
        axes = f"component {'pos' if batch is None else f'batch={batch} pos'} d_model={width}"
        x = tensor(stack, f"a stack [{axes}]")
        few = x.ndim < (2 if batch is None else 3) or x.shape[-1] != width
        if few or not x.is_floating_point() or (batch is not None and x.shape[-3] not in (1, batch)):
            raise InputError(f"Expected a stack [{axes}] of floating point numbers, got {shown(x)}.")

    def _normed(self, path: str, norm: Norm, stack: Tensor, pos_slice: Index | str | None) -> Tensor:
        scale = self._scale(path, pos_slice)
        whole_pool = path == "ln_pool" and scale.shape[-2] == 1  # of what all tokens are pooled to
        if stack.ndim < 2 or stack.shape[-1] != norm.width or not (whole_pool or scale.shape[-2] == stack.shape[-2]):
            raise InputError(
                f"Expected a stack [component {'batch ' if self.has_batch_dim else ''}{scale.shape[-2]} {norm.width}], "
                f"with pos_slice={pos_slice!r}, got {shown(stack)}. Was it cut to some tokens? Give the same pos_slice."
            )
        return norm.linear(stack, scale)

    # ---------------------------------------------------------------- classes and directions

    def _direction(self, classes: Classes, against: Classes | None) -> Tensor:
        """One direction in the output for all inputs ``[out]``, or one for each ``[batch out]``."""
        rows = self._for_inputs(classes)
        return rows if against is None else rows - self._for_inputs(against)

    def _for_inputs(self, classes: Classes) -> Tensor:
        rows = self._rows(classes)
        axes = classes.ndim - int(classes.is_floating_point()) if isinstance(classes, Tensor) else 1
        if isinstance(classes, str) or whole(classes) is not None or axes == 0:
            return rows[0]
        batch = self._n_batch() if self.has_batch_dim else None
        if len(rows) in (1, batch) and (self.has_batch_dim or isinstance(classes, Tensor)):
            return rows
        if isinstance(classes, Tensor) and classes.is_floating_point():
            raise InputError(
                f"Expected a direction [{rows.shape[-1]}] in the model's output, or one for each input "
                f"[batch {rows.shape[-1]}]; got shape {list(classes.shape)}."
            )
        what = "texts" if isinstance(self._spec(), TextSpec) else "images"
        raise InputError(f"Expected one class, or one for each of the {self._n_batch()} {what}; got {len(rows)}.")

    def _rows(self, classes: Classes) -> Tensor:
        """A direction in the output for each class: ``[class out]``."""
        tower = self._tower()
        like = self._first()
        n = self._spec().n_classes or self._spec().d_pool
        if isinstance(classes, Tensor) and classes.is_floating_point():
            rows = classes[None] if classes.ndim == 1 else classes
            if rows.ndim != 2 or rows.shape[-1] != n:
                raise InputError(
                    f"Expected a direction [{n}] in the model's output, or one for each input [batch {n}]; "
                    f"got {shown(classes)}."
                )
            return rows.to(like)
        one = isinstance(classes, str) or whole(classes) is not None
        expected = "a class as index or label, several, or a direction as a tensor"
        keys: list[Any] = [classes] if one else several(classes, expected)
        index = torch.tensor([[class_index(tower, each)] for each in keys], device=like.device)
        return like.new_zeros(len(keys), n).scatter(1, index, 1)


def _either(ours: Classes | None, theirs: Classes | None, *names: str) -> Classes | None:
    if ours is not None and theirs is not None:
        raise InputError(f"Expected one of {' and '.join(names or ('against', 'incorrect_tokens'))}, got both.")
    return ours if theirs is None else theirs
