"""Patterns and scores of some queries: their rows alone are computed, beside the fused kernel."""

from __future__ import annotations

import pytest
import torch
from models import EXACT, flops

from prisma_core import InputError
from prisma_core.toolbox.query_rows import Rows

NAMES = ("attn_scores", "pattern")
POSITIONS = ["cls", 0, -1, slice(1, 4), [5, -3], torch.tensor([2, 0])]


def rows_and_whole(model, image, pos, **how):
    """Return the output and cache of a pass that keeps rows, and the whole cache cut to these rows."""
    output, rows = model.run_with_cache(image, names=NAMES, pos=pos, **how)
    _, whole = model.run_with_cache(image, names=NAMES)
    places = rows.positions()
    return output, rows, {name: x if "pool" in name else x[:, :, places] for name, x in whole.items()}


@pytest.mark.parametrize("pos", POSITIONS, ids=str)
def test_rows_equal_those_of_the_whole_pattern_and_the_pass_is_a_plain_one(vit, image, pos):
    output, rows, whole = rows_and_whole(vit, image, pos)
    assert torch.equal(output, vit(image))  # the fused kernel's bits
    assert list(rows) == list(whole)
    for name in rows:
        torch.testing.assert_close(rows[name], whole[name], **EXACT)  # products of fewer rows sum in another order


def test_every_kind_of_attention(variant, image):
    output, rows, whole = rows_and_whole(variant, image, slice(1, 3))
    if not any("pool" in name for name in rows):  # its latents are no positions: that pattern is whole
        assert torch.equal(output, variant(image))
    for name in rows:
        torch.testing.assert_close(rows[name], whole[name], **EXACT)


def test_registers_and_heads(make, image):
    model = make(registers=2)
    _, rows, whole = rows_and_whole(model, image, "registers", heads=[3, 1])
    for name in rows:
        assert rows[name].shape == (3, 2, 2, 9)
        torch.testing.assert_close(rows[name], whole[name][:, [3, 1]], **EXACT)


def test_work_grows_with_the_rows_asked_for(vit, image):
    plain, (batch, heads, n, width, layers) = flops(vit, image), (3, 4, 9, 6, 2)
    one_row = layers * 2 * batch * heads * n * width
    for k in (1, 3):
        assert flops(vit, image, names="pattern", pos=slice(0, k)) - plain == k * one_row


def test_the_row_of_another_query_would_be_seen(vit, image, monkeypatch):
    monkeypatch.setattr(Rows, "of", lambda self, x: x[:, :, 1:2])
    _, rows, whole = rows_and_whole(vit, image, 0)
    for name in rows:
        assert (rows[name] - whole[name]).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_hook_that_edits_takes_the_whole_pattern(vit, image, name):
    def first_key(x, at):
        return x + 3 * torch.nn.functional.one_hot(torch.tensor(0), x.shape[-1])

    edited, cache = vit.run_with_cache(image, names=NAMES, pos="cls", hooks={(name, 0): first_key})
    assert torch.equal(edited, vit.run_with_hooks(image, hooks={(name, 0): first_key}))
    assert (edited - vit(image)).abs().max() > 1e-3
    assert cache["pattern", 0].shape == (3, 4, 1, 9)
    with vit.caching(names=NAMES) as whole, vit.hooks({(name, 0): first_key}):
        vit(image)
    for each in cache:
        torch.testing.assert_close(cache[each], whole[each][:, :, :1], **EXACT)


def test_scopes_that_ask_for_different_rows(vit, image):
    _, whole = vit.run_with_cache(image, names=NAMES)
    with vit.caching(NAMES, pos=2) as second, vit.caching(NAMES, pos=0) as first, vit.caching("pattern") as every:
        vit(image)
    for name in whole:
        torch.testing.assert_close(first[name], whole[name][:, :, :1], **EXACT)
        torch.testing.assert_close(second[name], whole[name][:, :, 2:3], **EXACT)
    assert torch.equal(every["pattern", 1], whole["pattern", 1])


def test_scopes_that_ask_for_the_same_rows(vit, image):
    with vit.caching("pattern", pos=2) as outer, vit.caching(NAMES, pos=2, heads=[1]) as inner:
        output = vit(image)
    assert torch.equal(output, vit(image))
    assert torch.equal(outer["pattern", 1][:, [1]], inner["pattern", 1])


def test_rows_carry_their_graph(vit, image):
    grads = []
    for names in ("pattern", ["pattern", "z"]):
        with vit.caching(names, pos=1, detach=False) as cache:
            vit(image)
        grads.append(torch.autograd.grad(cache["pattern", 1][..., 0].sum(), vit.blocks[0].attn.qkv.weight)[0])
    _, whole = vit.run_with_cache(image, names="pattern", detach=False)
    expected = torch.autograd.grad(whole["pattern", 1][:, :, 1, 0].sum(), vit.blocks[0].attn.qkv.weight)[0]
    for grad in grads:
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)


def test_a_pass_that_stops_at_the_last_row(vit, image):
    output, cache = vit.run_with_cache(image, names=("pattern", 0), pos=0, output=False)
    assert output is None
    assert cache["pattern", 0].shape == (3, 4, 1, 9)


def test_half_precision_rounds_rows_once(vit, image):
    _, rows, whole = rows_and_whole(vit.to(torch.bfloat16), image.to(torch.bfloat16), "cls")
    for name in rows:
        assert rows[name].dtype == torch.bfloat16
    for name in list(rows)[:2]:  # the kernels of the first block make other roundings in the second
        torch.testing.assert_close(rows[name], whole[name], rtol=2**-7, atol=0)  # one step of bfloat16


def test_a_row_that_is_not_there(vit, image):
    with pytest.raises(InputError, match=r"No index 9 on axis 2 of blocks.0.attn.hook_pattern, which has 9 there"):
        vit.run_with_cache(image, names="pattern", pos=[9])
