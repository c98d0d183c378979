"""Factored matrices agree with their products; circuits with the attention they come from."""

from __future__ import annotations

import pytest
import torch

from prisma_core import InputError, NotApplicable
from prisma_core.transformer.factored import FactoredMatrix

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


def test_products(pair):
    assert pair.shape == pair.AB.shape == (2, 3, 7, 5)
    torch.testing.assert_close(pair.T.AB, pair.AB.mT, **EXACT)
    left, right = torch.randn(6, 7), torch.randn(5, 2)
    torch.testing.assert_close((left @ pair).AB, left @ pair.AB, **EXACT)
    torch.testing.assert_close((pair @ right).AB, pair.AB @ right, **EXACT)
    for inner in (2, 9):
        other = FactoredMatrix(torch.randn(5, inner), torch.randn(inner, 8))
        torch.testing.assert_close((pair @ other).AB, pair.AB @ other.AB, **EXACT)
        assert (pair @ other).A.shape[-1] == min(4, inner)
    torch.testing.assert_close((2.5 * pair).AB, 2.5 * pair.AB, **EXACT)


def test_svd_and_norm(pair):
    u, s, vh = pair.svd()
    torch.testing.assert_close(u @ torch.diag_embed(s) @ vh, pair.AB, **EXACT)
    torch.testing.assert_close(s, torch.linalg.svdvals(pair.AB)[..., :4], **EXACT)
    torch.testing.assert_close(u.mT @ u, torch.eye(4).expand(2, 3, 4, 4), **EXACT)
    torch.testing.assert_close(pair.V, pair.Vh.mT)
    torch.testing.assert_close(pair.norm(), pair.AB.square().sum((-1, -2)).sqrt(), **EXACT)


def test_eigenvalues_and_trace(square):
    found = square.eigenvalues
    every = torch.linalg.eigvals(square.AB)
    largest = every.gather(-1, every.abs().argsort(descending=True))[..., :4]
    torch.testing.assert_close(found.abs().sort().values, largest.abs().sort().values, **EXACT)
    torch.testing.assert_close(found.sum(-1).real, square.trace(), **EXACT)
    torch.testing.assert_close(square.trace(), square.AB.diagonal(dim1=1, dim2=2).sum(-1), **EXACT)


@pytest.mark.parametrize(
    "index",
    [0, (1,), (1, 2), (slice(None), 1), ..., (..., slice(2, 5), slice(None)), (0, 0, slice(3), slice(1, 4))],
)
def test_indexing_is_as_of_the_product(pair, index):
    torch.testing.assert_close(pair[index].AB, pair.AB[index], **EXACT)


def test_what_does_not_fit(pair):
    with pytest.raises(InputError, match="rows and columns take slices only"):
        pair[0, 0, 1]
    with pytest.raises(InputError, match="needs a square product"):
        pair.eigenvalues  # noqa: B018
    with pytest.raises(InputError, match=r"got \[2, 3\], \[2, 3\]"):
        FactoredMatrix(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(InputError, match="do not broadcast"):
        FactoredMatrix(torch.ones(2, 5, 3), torch.ones(4, 3, 5))


@pytest.mark.parametrize("facts", [{}, {"kv_heads": 2}, {"n_parallel": 2, "kv_heads": 1}])
def test_circuits(make, image, facts):
    """Scores of zero-bias heads are x QK x^T; what a head writes is pattern x OV."""
    vit = make(**facts, attn_bias=False)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name.endswith("qkv.bias"):
                parameter.zero_()
    _, cache = vit.run_with_cache(image)
    result = vit.run_with_cache(image, names="result")[1]
    sides = facts.get("n_parallel", 1)
    for layer in range(2):
        for side in range(sides):
            number = f".{side}" if sides > 1 else ""
            x = cache[f"blocks.{layer}.ln1{number}.hook_normalized"]
            for head in range(4):
                at = (layer, 4 * side + head)
                scores = 0.3 * (x @ vit.QK[at].A) @ (vit.QK[at].B @ x.mT)
                attn = f"blocks.{layer}.attn{number}"
                torch.testing.assert_close(scores, cache[f"{attn}.hook_attn_scores"][:, head], **EXACT)
                written = cache[f"{attn}.hook_pattern"][:, head] @ x @ vit.OV[at].AB
                torch.testing.assert_close(written, result[f"{attn}.hook_result"][:, :, head], **EXACT)


def test_stacks(vit, make):
    assert vit.W_Q.shape == vit.W_K.shape == vit.W_V.shape == (2, 4, 18, 6)
    assert vit.W_O.shape == (2, 4, 6, 18)
    assert vit.b_Q.shape == vit.b_K.shape == vit.b_V.shape == (2, 4, 6)
    assert torch.equal(vit.W_K[1], vit.blocks[1].attn.W_K)
    assert torch.equal(vit.W_in[1], vit.blocks[1].mlp.W_in)
    assert torch.equal(vit.W_out[0], vit.blocks[0].mlp.W_out)
    assert vit.W_U.shape == (18, 7)
    assert vit.QK.shape == vit.OV.shape == (2, 4, 18, 18)
    with pytest.raises(NotApplicable, match="exactly one MLP"):
        make(mlp=False).W_in  # noqa: B018
    with pytest.raises(NotApplicable, match="no head"):
        make(n_classes=None).W_U  # noqa: B018
