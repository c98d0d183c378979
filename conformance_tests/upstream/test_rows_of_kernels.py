"""Rows of some queries in hooked upstreams: computed alone, beside upstream's own fused kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import EXACT, flops
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from windows import HEADS, WIDTH, WINDOW, Adapter, Upstream

from prisma_core.maps.places import FUSED, HookMap
from prisma_core.spec import MapSpec
from prisma_core.toolbox.query_rows import Rows
from prisma_core.upstream.model import HookedUpstream
from prisma_core.zoo import adapt_with

pytestmark = pytest.mark.usefixtures("in_float64")
NAMES = ("attn_scores", "pattern")
ROWS = [0, -1, slice(1, 3), [2, 0]]


@pytest.mark.parametrize("pos", ROWS, ids=str)
def test_rows_equal_those_of_the_whole_pattern_and_the_pass_is_a_plain_one(model, x, pos):
    output, rows = model.run_with_cache(x, names=NAMES, pos=pos, heads=[1])
    _, whole = model.run_with_cache(x, names=NAMES)
    assert torch.equal(output, model(x))  # the kernel's bits
    places = [pos] if isinstance(pos, int) else pos
    for name in whole:
        torch.testing.assert_close(rows[name], whole[name][:, :, [1]][:, :, :, places], **EXACT)


def test_work_grows_with_the_rows_asked_for(x):
    model = adapt_with(Adapter(), Upstream().eval())
    windows, width = x.shape[0] * x.shape[1] // WINDOW, WIDTH // HEADS
    one_row = 2 * windows * HEADS * WINDOW * width
    for k in (1, 2):
        assert flops(model, x, names=("pattern", 0), pos=slice(0, k)) - flops(model, x) == k * one_row


def test_the_row_of_another_query_would_be_seen(model, x, monkeypatch):
    monkeypatch.setattr(Rows, "of", lambda self, x: x[..., 1:2, :])
    _, rows = model.run_with_cache(x, names=("pattern", 0), pos=0)
    _, whole = model.run_with_cache(x, names=("pattern", 0))
    assert (rows["pattern", 0] - whole["pattern", 0][:, :, :, :1]).abs().max() > 1e-3


def test_an_edit_takes_the_whole_pattern(model, x):
    hooks = {("pattern", 0): lambda x, at: x.roll(1, -1)}
    output, rows = model.run_with_cache(x, names=NAMES, pos=0, hooks=hooks)
    assert torch.equal(output, model.run_with_hooks(x, hooks=hooks))
    assert (output - model(x)).abs().max() > 1e-3
    with model.caching(NAMES) as whole, model.hooks(hooks):
        model(x)
    for name in rows:
        torch.testing.assert_close(rows[name], whole[name][:, :, :, :1], **EXACT)


def test_scopes_that_ask_for_other_rows(model, x):
    _, whole = model.run_with_cache(x, names=NAMES)
    with model.caching("pattern", pos=2) as second, model.caching(NAMES, pos=0) as first:
        model(x)
    for name, places, cache in ((name, each, one) for each, one in ((2, second), (0, first)) for name in one):
        torch.testing.assert_close(cache[name], whole[name][:, :, :, places : places + 1], **EXACT)


def test_rows_carry_their_graph(model, x):
    grads = []
    for pos in (0, None):
        _, cache = model.run_with_cache(x, names="pattern", pos=pos, detach=False)
        grads.append(torch.autograd.grad(cache["pattern", 0][..., 0, 0].sum(), model.upstream.blocks[0].attn.bias)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True], ids=["no reentry", "reentry"])
def test_checkpointed_passes_are_computed_again_with_their_rows(model, x, reentrant):
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        leaf = x.clone().requires_grad_()
        with model.caching("pattern", pos=0):
            y = run(leaf)
        y.square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, **EXACT)


def test_a_pass_that_stops_at_the_last_row(model, x):
    output, cache = model.run_with_cache(x, names=("pattern", 0), pos=0, output=False)
    assert output is None
    assert cache["pattern", 0].shape == (2, 2, HEADS, 1, WINDOW)


class Masked(nn.Module):
    """Attention whose kernel is called with what it may be called with."""

    def __init__(self, **how):
        super().__init__()
        self.how, self.k_heads = how, 1 if how.get("enable_gqa") else 2

    def forward(self, x: Tensor) -> Tensor:
        q, k = x.unflatten(-1, (2, 3)).transpose(1, 2), x.sin().unflatten(-1, (2, 3)).transpose(1, 2)
        k = k[:, : self.k_heads]
        return F.scaled_dot_product_attention(query=q, key=k, value=k.cos(), **self.how).transpose(1, 2).flatten(2)


MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
KERNELS = {
    "plain": {},
    "causal": {"is_causal": True},
    "boolean mask": {"attn_mask": MASK.bool()},
    "added mask": {"attn_mask": MASK.double().log()},
    "mask of keys": {"attn_mask": MASK[0].bool().expand(2, 1, 1, 4)},
    "scaled": {"scale": 0.3},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("how", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("moved", [False, True], ids=["as it is", "queries before heads"])
def test_every_call_of_the_kernel(how, moved):
    square = "batch head query_pos key_pos" + (" -> batch query_pos head key_pos" if moved else "")
    table = f"@ {FUSED} : scores -> hook_attn_scores : {square}\n@ {FUSED} : pattern -> hook_pattern : {square}"
    model = HookedUpstream(Masked(**how).eval(), HookMap.parse(table), MapSpec(shape=(4, 6)), lambda y: y)
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    _, whole = model.run_with_cache(x)
    for places in (1, 2, 3):
        output, rows = model.run_with_cache(x, pos=places)
        assert torch.equal(output, model(x))
        for name in whole:
            expected = whole[name].narrow(1 if moved else 2, places, 1)
            torch.testing.assert_close(rows[name], expected, rtol=1e-12, atol=1e-12)
    expected = model.upstream(x)
    v = x.sin().cos().unflatten(-1, (2, 3)).transpose(1, 2)[:, : model.upstream.k_heads]
    pattern = whole["hook_pattern"].transpose(1, 2) if moved else whole["hook_pattern"]
    torch.testing.assert_close((pattern @ v).transpose(1, 2).flatten(2), expected)
