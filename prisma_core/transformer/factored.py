"""Products of two matrices, kept as two."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from prisma_core.errors import InputError


class Svd(NamedTuple):
    """Singular value decomposition ``U diag(S) Vh``, with as many values as the product has inner channels."""

    U: Float[Tensor, "*outer left inner"]
    S: Float[Tensor, "*outer inner"]
    Vh: Float[Tensor, "*outer inner right"]


class FactoredMatrix:
    """The product ``A @ B`` of ``A [... left inner]`` and ``B [... inner right]``, never formed unless asked for.

    The product of a head's factors has ``d_model`` rows and columns but rank ``d_head``: norms, singular values and
    eigenvalues are found from the small side. Leading axes are broadcast.

    Raises:
        InputError: the inner axes differ, or the leading ones do not broadcast.
    """

    def __init__(self, A: Float[Tensor, "*a left inner"], B: Float[Tensor, "*b other right"]):
        if A.ndim < 2 or B.ndim < 2 or A.shape[-1] != B.shape[-2]:
            raise InputError(f"Expected [... left inner] and [... inner right], got {list(A.shape)}, {list(B.shape)}.")
        try:
            leading = list(cast("torch.Size", torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])))
        except RuntimeError as error:
            raise InputError(f"Leading axes of {list(A.shape)} and {list(B.shape)} do not broadcast.") from error
        self.A = A.expand(*leading, *A.shape[-2:])
        self.B = B.expand(*leading, *B.shape[-2:])

    @property
    def shape(self) -> torch.Size:
        """The shape of the product."""
        return torch.Size([*self.A.shape[:-1], self.B.shape[-1]])

    @property
    def ndim(self) -> int:
        return self.A.ndim

    @property
    def AB(self) -> Float[Tensor, "*outer left right"]:
        """The product itself: ``[... left right]``."""
        return self.A @ self.B

    @property
    def BA(self) -> Float[Tensor, "*outer inner inner"]:
        """The product the other way round, ``[... inner inner]``, which has the same eigenvalues but zeros.

        Raises:
            InputError: the product is not square.
        """
        if self.shape[-1] != self.shape[-2]:
            raise InputError(f"B @ A needs a square product; this one is {list(self.shape)}.")
        return self.B @ self.A

    @property
    def T(self) -> FactoredMatrix:
        """The transpose."""
        return FactoredMatrix(self.B.mT, self.A.mT)

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
        return cast(Tensor, torch.linalg.eigvals(self.BA))

    def norm(self) -> Float[Tensor, " *outer"]:
        """Return the Frobenius norm: ``[...]``."""
        return self.S.square().sum(-1).sqrt()

    def trace(self) -> Float[Tensor, " *outer"]:
        """Return the trace of a square product: ``[...]``."""
        return self.BA.diagonal(dim1=-2, dim2=-1).sum(-1)

    def __getitem__(self, index: Any) -> FactoredMatrix:
        """Index the leading axes, or rows and columns by slices, as of a tensor of the product's shape.

        Raises:
            InputError: an index would drop the row or column axis.
        """
        given = cast("tuple[Any, ...]", index if isinstance(index, tuple) else (index,))
        if Ellipsis in given:
            at = given.index(Ellipsis)
            given = (*given[:at], *[slice(None)] * (self.ndim - len(given) + 1), *given[at + 1 :])
        leading, inner = given[: self.ndim - 2], given[self.ndim - 2 :]
        if len(inner) > 2 or not all(isinstance(each, slice) for each in inner):
            raise InputError(f"{index!r} does not index {list(self.shape)}: rows and columns take slices only.")
        rows, columns = (*inner, *[slice(None)] * (2 - len(inner)))
        return FactoredMatrix(self.A[leading][..., rows, :], self.B[leading][..., columns])

    def __matmul__(self, other: Tensor | FactoredMatrix) -> FactoredMatrix:
        if isinstance(other, FactoredMatrix):
            inner = self.B @ other.A
            small = self.A.shape[-1] <= other.B.shape[-2]
            return FactoredMatrix(self.A, inner @ other.B) if small else FactoredMatrix(self.A @ inner, other.B)
        return FactoredMatrix(self.A, self.B @ other)

    def __rmatmul__(self, other: Tensor) -> FactoredMatrix:
        return FactoredMatrix(other @ self.A, self.B)

    def __mul__(self, factor: float | Tensor) -> FactoredMatrix:
        return FactoredMatrix(self.A * factor, self.B)

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return f"FactoredMatrix({list(self.shape)}, rank <= {self.A.shape[-1]})"


def _qr(x: Tensor) -> tuple[Tensor, Tensor]:
    return cast("tuple[Tensor, Tensor]", torch.linalg.qr(x))
