"""Factored matrices agree with their products."""

from __future__ import annotations

import doctest
import operator

import pytest
import torch

from prisma_core import InputError, NotApplicable
from prisma_core.transformer import factored
from prisma_core.transformer.factored import FactoredMatrix, composition_scores

pytestmark = pytest.mark.usefixtures("in_float64")
EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture
def pair():
    torch.manual_seed(3)
    return FactoredMatrix(torch.randn(2, 3, 7, 4), torch.randn(3, 4, 5))


@pytest.fixture
def square():
    torch.manual_seed(4)
    return FactoredMatrix(torch.randn(3, 7, 4), torch.randn(3, 4, 7))


def test_examples_in_docstrings_hold():
    result = doctest.testmod(factored, extraglobs={"torch": torch})
    assert result.attempted
    assert not result.failed


def test_shapes(pair):
    assert pair.shape == pair.AB.shape == (2, 3, 7, 5)
    assert (pair.ndim, pair.ldim, pair.mdim, pair.rdim, pair.has_leading_dims) == (4, 7, 4, 5, True)
    assert not pair[0, 0].has_leading_dims
    assert torch.equal(pair.pair[0] @ pair.pair[1], pair.AB)
    torch.testing.assert_close(pair.T.AB, pair.AB.mT, **EXACT)


def test_products(pair):
    left, right = torch.randn(6, 7), torch.randn(5, 2)
    torch.testing.assert_close((left @ pair).AB, left @ pair.AB, **EXACT)
    torch.testing.assert_close((pair @ right).AB, pair.AB @ right, **EXACT)
    for inner in (2, 9):
        other = FactoredMatrix(torch.randn(5, inner), torch.randn(inner, 8))
        torch.testing.assert_close((pair @ other).AB, pair.AB @ other.AB, **EXACT)
        assert (pair @ other).A.shape[-1] == min(4, inner)


@pytest.mark.parametrize("leading", [(), (3,), (4, 4)], ids=str)
def test_vectors_give_vectors(leading):
    """Also where a vector could pass for a matrix, as 4 layers of 4 heads and channels could."""
    both = FactoredMatrix(torch.randn(*leading, 4, 2), torch.randn(*leading, 2, 4))
    vector = torch.randn(4)
    torch.testing.assert_close(vector @ both, vector @ both.AB, **EXACT)
    torch.testing.assert_close(both @ vector, both.AB @ vector, **EXACT)
    assert (both @ vector).shape == (*leading, 4)


@pytest.mark.parametrize(("make", "same"), [(lambda s: s, lambda s: s), (lambda s: s[..., 0, 0], lambda s: s)])
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (3, 1, 1), (1, 3, 1, 1), (2, 1, 1, 1)])
@pytest.mark.parametrize("operation", [operator.mul, operator.truediv])
def test_one_factor_for_each_of_the_leading_axes(pair, operation, shape, make, same):
    factor = torch.rand(shape) + 0.5
    torch.testing.assert_close(operation(pair, make(factor)).AB, operation(pair.AB, same(factor)), **EXACT)


@pytest.mark.parametrize(
    "number", [2.5, -3, torch.tensor(0.4), torch.tensor([1.5]), torch.tensor([[[[2.0]]]])], ids=str
)
def test_numbers(pair, number):
    torch.testing.assert_close((number * pair).AB, pair.AB * number, **EXACT)
    torch.testing.assert_close((pair * number).AB, pair.AB * number, **EXACT)
    torch.testing.assert_close((pair / number).AB, pair.AB / number, **EXACT)
    torch.testing.assert_close((-pair).AB, -pair.AB, **EXACT)


@pytest.mark.parametrize("shape", [(5,), (7, 5), (7, 1), (2, 3, 7, 1), (4,), (2, 2, 3), (2, 2, 3, 1, 1)])
def test_factors_that_are_none_of_the_leading_axes(pair, shape):
    with pytest.raises(InputError, match=r"does not broadcast over the leading axes \[2, 3\]"):
        pair * torch.randn(shape)
    with pytest.raises(InputError, match="Expected a number or a tensor of numbers, got str"):
        pair * "2"


def test_the_inner_axis_is_no_place_for_a_factor():
    with pytest.raises(InputError, match="does not broadcast"):
        FactoredMatrix(torch.randn(5, 3), torch.randn(3, 3)) * torch.randn(3)


def test_svd_and_norm(pair):
    u, s, vh = pair.svd()
    torch.testing.assert_close(u @ torch.diag_embed(s) @ vh, pair.AB, **EXACT)
    torch.testing.assert_close(s, torch.linalg.svdvals(pair.AB)[..., :4], **EXACT)
    torch.testing.assert_close(u.mT @ u, torch.eye(4).expand(2, 3, 4, 4), **EXACT)
    torch.testing.assert_close(pair.V, pair.Vh.mT)
    torch.testing.assert_close(pair.norm(), pair.AB.square().sum((-1, -2)).sqrt(), **EXACT)


def test_collapsed_and_even(pair):
    torch.testing.assert_close(pair.U @ pair.collapse_l(), pair.AB, **EXACT)
    torch.testing.assert_close(pair.collapse_r() @ pair.Vh, pair.AB, **EXACT)
    even = pair.make_even()
    torch.testing.assert_close(even.AB, pair.AB, **EXACT)
    torch.testing.assert_close(even.A.mT @ even.A, torch.diag_embed(pair.S), **EXACT)
    torch.testing.assert_close(even.B @ even.B.mT, torch.diag_embed(pair.S), **EXACT)


@pytest.mark.parametrize("inner", [4, 7, 9])
def test_eigenvalues_and_trace(inner):
    square = FactoredMatrix(torch.randn(3, 7, inner), torch.randn(3, inner, 7))
    every = torch.linalg.eigvals(square.AB)
    largest = every.gather(-1, every.abs().argsort(descending=True))[..., : min(inner, 7)]
    torch.testing.assert_close(square.eigenvalues.abs().sort().values, largest.abs().sort().values, **EXACT)
    torch.testing.assert_close(square.eigenvalues.sum(-1).real, square.trace(), **EXACT)
    torch.testing.assert_close(square.trace(), square.AB.diagonal(dim1=1, dim2=2).sum(-1), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_dtypes_are_decomposed_in_float32(square, dtype):
    half = FactoredMatrix(square.A.to(dtype), square.B.to(dtype))
    wide = FactoredMatrix(half.A.float(), half.B.float())
    assert half.S.dtype == torch.float32
    torch.testing.assert_close(half.S, wide.S)
    torch.testing.assert_close(half.norm(), wide.norm())
    torch.testing.assert_close(half.U.abs(), wide.U.abs())
    found, expected = (each.eigenvalues.abs().sort().values for each in (half, wide))
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)  # B A is rounded to a half dtype
    assert half.make_even().A.dtype == dtype
    torch.testing.assert_close(half.make_even().AB.float(), wide.AB, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "index",
    [
        0,
        (1,),
        (1, 2),
        (slice(None), 1),
        ...,
        (..., slice(2, 5), slice(None)),
        (0, 0, slice(3), slice(1, 4)),
        (0, 0, 1),
        (0, 0, slice(None), 2),
        (..., -1),
        (1, ..., 3),
        (0, 1, 2, 3),
        (..., 6, slice(None)),
        (1, 1, [0, 3, 3]),
        (..., [4, 0]),
        (..., torch.tensor([1, 5]), slice(1, 3)),
        ([1, 0], 2),
        (slice(None), [2, 0], slice(None), 1),
        (None, 1),
        torch.tensor(1),
    ],
    ids=str,
)
def test_indexing_is_as_of_the_product(pair, index):
    part = pair[index]
    product = part.AB if isinstance(part, FactoredMatrix) else part
    torch.testing.assert_close(product, pair.AB[index], **EXACT)


def test_corners_and_new_axes(pair):
    torch.testing.assert_close(pair.get_corner(), pair.AB[..., :3, :3], **EXACT)
    torch.testing.assert_close(pair.get_corner(2), pair.AB[..., :2, :2], **EXACT)
    for k in (0, 1, 2, -3):
        torch.testing.assert_close(pair.unsqueeze(k).AB, pair.AB.unsqueeze(k), **EXACT)
    for k in (3, 4, -1, -6):
        with pytest.raises(InputError, match="expected 0 to 2"):
            pair.unsqueeze(k)


def test_composition(pair):
    right = FactoredMatrix(torch.randn(6, 5, 3), torch.randn(6, 3, 8))
    scores = composition_scores(pair, right)
    product = pair.AB[:, :, None] @ right.AB
    norms = [x.square().sum((-1, -2)).sqrt() for x in (product, pair.AB, right.AB)]
    torch.testing.assert_close(scores, norms[0] / norms[1][..., None] / norms[2], **EXACT)
    with pytest.raises(InputError, match=r"\[2, 3, 7, 5\] does not fit \[2, 3, 7, 5\]"):
        composition_scores(pair, pair)


def test_what_does_not_fit(pair):
    for index in ((0, 0, [1, 2], [0, 1]), ([0, 1], slice(None), [0, 1]), (0, 0, 1.5), (0, 0, "row")):
        with pytest.raises(InputError, match=r"does not index \[2, 3, 7, 5\]"):
            pair[index]
    with pytest.raises(NotApplicable, match="needs a square product"):
        pair.eigenvalues  # noqa: B018
    with pytest.raises(InputError, match=r"got \[2, 3\], \[2, 3\]"):
        FactoredMatrix(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(InputError, match="do not broadcast"):
        FactoredMatrix(torch.ones(2, 5, 3), torch.ones(4, 3, 5))
    for wrong in (torch.randn(4), torch.randn(4, 5), FactoredMatrix(torch.randn(4, 2), torch.randn(2, 4))):
        with pytest.raises(InputError, match=r"does not fit \[2, 3, 7, 5\]: expected 5"):
            pair @ wrong
    with pytest.raises(InputError, match="expected 7"):
        torch.randn(5) @ pair
