"""Products of two matrices, kept as two."""

from __future__ import annotations

from functools import cached_property
from numbers import Number
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from prisma_core.errors import InputError, MissingPart
from prisma_core.errors.arguments import expect, number, shown, tensor, whole
from prisma_core.toolbox.precision import widened


class Svd(NamedTuple):
    """Singular value decomposition ``U diag(S) Vh``, with as many values as the product has inner channels."""

    U: Float[Tensor, "*outer left inner"]
    S: Float[Tensor, "*outer inner"]
    Vh: Float[Tensor, "*outer inner right"]


class FactoredMatrix:
    """The product ``A @ B`` of ``A [... left inner]`` and ``B [... inner right]``, never formed unless asked for.

    The product of a head's factors has ``d_model`` rows and columns but rank ``d_head``: norms, singular values and
    eigenvalues are found from the small side, those of half dtypes in float32. Leading axes are broadcast.

    Raises:
        InputError: the inner axes differ, or the leading ones do not broadcast.

    >>> OV = FactoredMatrix(torch.ones(12, 768, 64), torch.ones(12, 64, 768))
    >>> OV.shape, OV[3, :5].shape, (torch.ones(768) @ OV).shape
    (torch.Size([12, 768, 768]), torch.Size([5, 768]), torch.Size([12, 768]))
    """

    def __init__(self, A: Float[Tensor, "*a left inner"], B: Float[Tensor, "*b other right"]):
        for x in (A, B):
            tensor(x, "a factor [... row column]")
        if A.ndim < 2 or B.ndim < 2 or A.shape[-1] != B.shape[-2]:
            raise InputError(f"Expected [... left inner] and [... inner right], got {list(A.shape)}, {list(B.shape)}.")
        try:
            leading = list(cast("torch.Size", torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])))
        except RuntimeError as error:
            raise InputError(f"Leading axes of {list(A.shape)} and {list(B.shape)} do not broadcast.") from error
        self.A = A.expand(*leading, *A.shape[-2:])
        self.B = B.expand(*leading, *B.shape[-2:])

    # ---------------------------------------------------------------- shapes

    @property
    def shape(self) -> torch.Size:
        """The shape of the product."""
        return torch.Size([*self.A.shape[:-1], self.B.shape[-1]])

    @property
    def ndim(self) -> int:
        """Number of axes of the product."""
        return self.A.ndim

    @property
    def ldim(self) -> int:
        """Rows of the product."""
        return self.A.shape[-2]

    @property
    def mdim(self) -> int:
        """Inner channels: the largest rank there can be."""
        return self.A.shape[-1]

    @property
    def rdim(self) -> int:
        """Columns of the product."""
        return self.B.shape[-1]

    @property
    def has_leading_dims(self) -> bool:
        """Whether there are axes before rows and columns."""
        return self.ndim > 2

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """Both factors."""
        return self.A, self.B

    # ---------------------------------------------------------------- products

    @property
    def AB(self) -> Float[Tensor, "*outer left right"]:
        """The product itself: ``[... left right]``."""
        return self.A @ self.B

    @property
    def BA(self) -> Float[Tensor, "*outer inner inner"]:
        """The product the other way round, ``[... inner inner]``, which has the same eigenvalues but zeros.

        Raises:
            MissingPart: the product is not square.
        """
        if self.ldim != self.rdim:
            raise MissingPart(f"B @ A needs a square product; this one is {list(self.shape)}.")
        return self.B @ self.A

    @property
    def T(self) -> FactoredMatrix:
        """The transpose: rows and columns exchanged."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    def __matmul__(self, other: Tensor | FactoredMatrix) -> Any:
        """Multiply by a vector ``[right]``, which gives vectors ``[... left]``, or by a matrix, factored or not."""
        if isinstance(other, FactoredMatrix):
            inner = self.B @ self._fitting(other.A, self.rdim, -2)
            small = self.mdim <= other.mdim
            return FactoredMatrix(self.A, inner @ other.B) if small else FactoredMatrix(self.A @ inner, other.B)
        self._fitting(other, self.rdim, -2 if tensor(other, "a vector or matrix").ndim > 1 else -1)
        if other.ndim == 1:
            return (self.A @ (self.B @ other[:, None]))[..., 0]
        return FactoredMatrix(self.A, self.B @ other)

    def __rmatmul__(self, other: Tensor) -> Any:
        """Multiply a vector ``[left]``, which gives vectors ``[... right]``, or a matrix."""
        self._fitting(other, self.ldim, -1)
        if other.ndim == 1:
            return ((other[None] @ self.A) @ self.B)[..., 0, :]
        return FactoredMatrix(other @ self.A, self.B)

    def __mul__(self, factor: float | Tensor) -> FactoredMatrix:
        """Multiply by a number, or by one number for each of the leading axes: ``[...]`` or ``[... 1 1]``.

        Raises:
            InputError: a tensor that does not broadcast over the leading axes.
        """
        return FactoredMatrix(self.A * self._numbers(factor), self.B)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor) -> FactoredMatrix:
        """Divide by a number, or by one number for each of the leading axes."""
        return FactoredMatrix(self.A / self._numbers(divisor), self.B)

    def __neg__(self) -> FactoredMatrix:
        return FactoredMatrix(-self.A, self.B)

    def _fitting(self, other: Tensor, n: int, axis: int) -> Tensor:
        if tensor(other, "a vector or matrix").ndim == 0 or other.shape[axis] != n:
            raise InputError(f"{list(other.shape)} does not fit {list(self.shape)}: expected {n} on its axis {axis}.")
        return other

    def _numbers(self, factor: float | Tensor) -> float | Tensor:
        leading = self.shape[:-2]
        if not isinstance(factor, Tensor):
            if isinstance(factor, Number) and factor is not True and factor is not False:
                return float(factor) if isinstance(factor, int) and abs(factor) >= 1 << 63 else factor
            raise InputError(f"Expected a number or a tensor of numbers, got {type(factor).__name__}.")
        if factor.numel() == 1:
            return factor.reshape(())
        each = factor if factor.ndim > 1 and factor.shape[-2:] == (1, 1) else factor[..., None, None]
        sizes = list(each.shape[:-2])
        pairs = zip(reversed(sizes), reversed(leading), strict=False)
        if len(sizes) > len(leading) or any(n not in (1, there) for n, there in pairs):
            raise InputError(
                f"A factor of shape {list(factor.shape)} does not broadcast over the leading axes {list(leading)} of "
                f"{list(self.shape)}. Rows are scaled by a diagonal matrix: torch.diag(factor) @ matrix."
            )
        return each

    # ---------------------------------------------------------------- singular values and eigenvalues

    def svd(self) -> Svd:
        """Return the singular value decomposition, through QR of the factors; computed once."""
        return self._svd

    @cached_property
    def _svd(self) -> Svd:
        (q_a, r_a), (q_b, r_b) = _qr(self.A), _qr(self.B.mT)
        small = Svd(*cast("tuple[Tensor, Tensor, Tensor]", torch.linalg.svd(r_a @ r_b.mT, full_matrices=False)))
        return Svd(q_a @ small.U, small.S, small.Vh @ q_b.mT)

    @property
    def U(self) -> Float[Tensor, "*outer left inner"]:
        """Left singular vectors: ``[... left inner]``."""
        return self.svd().U

    @property
    def S(self) -> Float[Tensor, "*outer inner"]:
        """Singular values: ``[... inner]``."""
        return self.svd().S

    @property
    def Vh(self) -> Float[Tensor, "*outer inner right"]:
        """Right singular vectors: ``[... inner right]``."""
        return self.svd().Vh

    @property
    def V(self) -> Float[Tensor, "*outer right inner"]:
        """Right singular vectors as columns: ``[... right inner]``."""
        return self.svd().Vh.mT

    @property
    def eigenvalues(self) -> Complex[Tensor, "*outer inner"]:
        """Eigenvalues of a square product, those that must be zero left out: ``[... inner]``, complex."""
        small = self.BA if self.mdim <= self.ldim else self.AB
        return cast(Tensor, torch.linalg.eigvals(widened(small)))

    def norm(self) -> Float[Tensor, " *outer"]:
        """Return the Frobenius norm: ``[...]``."""
        return self.S.square().sum(-1).sqrt()

    def trace(self) -> Float[Tensor, " *outer"]:
        """Return the trace of a square product: ``[...]``."""
        return self.BA.diagonal(dim1=-2, dim2=-1).sum(-1)

    def collapse_l(self) -> Float[Tensor, "*outer inner right"]:
        """Return ``diag(S) Vh [... inner right]``: the product but for a rotation on the left."""
        return self.S[..., :, None] * self.Vh

    def collapse_r(self) -> Float[Tensor, "*outer left inner"]:
        """Return ``U diag(S) [... left inner]``: the product but for a rotation on the right."""
        return self.U * self.S[..., None, :]

    def make_even(self) -> FactoredMatrix:
        """Return the same product with orthogonal factors of the same size: ``U sqrt(S)`` and ``sqrt(S) Vh``."""
        root, dtype = self.S.sqrt(), self.A.dtype
        return FactoredMatrix((self.U * root[..., None, :]).to(dtype), (root[..., :, None] * self.Vh).to(dtype))

    # ---------------------------------------------------------------- parts

    def get_corner(self, k: int = 3) -> Float[Tensor, "*outer row column"]:
        """Return the first ``k`` rows and columns of the product: ``[... k k]``."""
        k = number(k, "how many rows and columns", 1)
        return self.A[..., :k, :] @ self.B[..., :k]

    def unsqueeze(self, k: int) -> FactoredMatrix:
        """Insert an axis of length 1 at ``k``, before rows and columns.

        Raises:
            InputError: ``k`` is not before them.
        """
        k = number(k, "an axis")
        at = k if k >= 0 else self.ndim + 1 + k
        if not 0 <= at <= self.ndim - 2:
            raise InputError(f"No axis can be inserted at {k}: expected 0 to {self.ndim - 2}, before rows and columns.")
        return FactoredMatrix(self.A.unsqueeze(at), self.B.unsqueeze(at))

    def __getitem__(self, index: Any) -> Any:
        """Index the product: leading axes as of a tensor, then rows and columns.

        Returns:
            The factored matrix; a tensor where a number takes rows or columns away.

        Raises:
            InputError: rows or columns are indexed by something else than a number, a slice or a list of numbers.
        """
        items = cast("tuple[Any, ...]", index if isinstance(index, tuple) else (index,))
        if not all(_is_index(each) for each in items):
            raise InputError(f"{shown(index)} does not index {list(self.shape)}: expected numbers, slices and lists.")
        count = sum(1 for each in items if each is not None and each is not Ellipsis)
        if any(each is Ellipsis for each in items):
            at = next(place for place, each in enumerate(items) if each is Ellipsis)
            items = (*items[:at], *[slice(None)] * (self.ndim - count), *items[at + 1 :])
        elif count < self.ndim:
            items = (*items, *[slice(None)] * (self.ndim - count))
        *leading, rows, columns = items
        lists = [isinstance(each, list) or (isinstance(each, Tensor) and each.ndim > 0) for each in items]
        numbers = [not isinstance(each, slice) and not several for each, several in zip(items, lists, strict=True)]
        if any(lists[-2:]) and sum(lists) > 1:
            raise InputError(f"{index!r} does not index {list(self.shape)}: a list of rows or columns goes by itself.")
        for each, alone in ((rows, numbers[-2]), (columns, numbers[-1])):
            if alone and not hasattr(each, "__index__"):
                raise InputError(f"{index!r} does not index {list(self.shape)}: {each!r} is no row or column.")
        a, b = self.A[tuple(leading)], self.B[tuple(leading)]
        a = a[..., rows, :][..., None, :] if numbers[-2] else a[..., rows, :]
        b = b[..., columns][..., None] if numbers[-1] else b[..., columns]
        if not any(numbers[-2:]):
            return FactoredMatrix(a, b)
        product = (a @ b)[..., 0] if numbers[-1] else a @ b
        return product.select(-1 if numbers[-1] else -2, 0) if numbers[-2] else product

    def __repr__(self) -> str:
        return f"FactoredMatrix({list(self.shape)}, rank <= {self.mdim})"


def _is_index(item: object) -> bool:
    """Return whether torch takes an item of an index for what it is: it would round numbers and count truths."""
    if item is None or item is Ellipsis or isinstance(item, slice):
        return True
    if (n := whole(item)) is not None:
        return abs(n) < 1 << 63
    try:
        numbers = torch.as_tensor(item) if isinstance(item, list | Tensor | np.ndarray) else torch.empty(())
    except (TypeError, ValueError):  # texts, lists of unequal length, numbers of more than 64 bits
        return False
    return numbers.ndim > 0 and not numbers.is_floating_point()


def composition_scores(left: FactoredMatrix, right: FactoredMatrix) -> Float[Tensor, "*scores"]:
    """Return how much of what ``left`` writes ``right`` reads, for each pair of their leading axes: ``[*left *right]``.

    The norm of ``left @ right`` over the product of both norms: from 0 to 1.

    Raises:
        InputError: the columns of ``left`` are not as many as the rows of ``right``.
    """
    for each in (left, right):
        expect(each, FactoredMatrix, "a FactoredMatrix")
    if left.rdim != right.ldim:
        raise InputError(f"{list(left.shape)} does not fit {list(right.shape)}: its columns are not the other's rows.")
    written, read = left.collapse_l(), right.collapse_r()
    written = written.reshape(*left.shape[:-2], *[1] * (right.ndim - 2), *written.shape[-2:])
    norms = [cast(Tensor, torch.linalg.matrix_norm(x)) for x in (written @ read, written, read)]
    return norms[0] / (norms[1] * norms[2])


def _qr(x: Tensor) -> tuple[Tensor, Tensor]:
    return cast("tuple[Tensor, Tensor]", torch.linalg.qr(widened(x)))
