"""A last block that computes its first tokens alone, of all keys and values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prisma_core import HookedViT, InputError


@torch.no_grad()
@pytest.mark.parametrize("leading", [1, 3])
def test_leading_tokens_are_those_of_the_whole_stream(variant: HookedViT, image: Tensor, leading: int) -> None:
    whole = variant(image, stop_at_layer=2)
    cut = variant(image, stop_at_layer=2, leading=leading)
    torch.testing.assert_close(cut, whole[:, :leading], rtol=1e-10, atol=1e-10)
    other = variant(image.roll(1, -1), stop_at_layer=2, leading=leading)
    assert (other - cut).abs().max() > 1e-3  # whatever the image, they would be alike otherwise


@torch.no_grad()
def test_the_output_needs_the_tokens_it_is_made_of(variant: HookedViT, image: Tensor) -> None:
    if variant.spec.pool.kind != "token":
        assert variant.leading_read is None
        with pytest.raises(InputError, match=r"leading=4 .* all tokens"):
            variant(image, leading=4)
        return
    assert variant.leading_read == variant.spec.n_heads_out  # one class token, and a distillation token behind it
    torch.testing.assert_close(variant(image, leading=variant.leading_read), variant(image), rtol=1e-10, atol=1e-10)
    with pytest.raises(InputError, match="leading=0"):
        variant(image, leading=0)


@torch.no_grad()
def test_hook_points_behind_keys_and_values_hold_the_leading_tokens(vit: HookedViT, image: Tensor) -> None:
    names = ["resid_pre", "k", "q", "pattern", "z", "mlp.hook_post", "resid_post", "hook_ln_final"]
    _, cache = vit.run_with_cache(image, names=names, leading=1)
    n = vit.spec.layout.n_tokens
    for name, tokens in (("resid_pre", n), ("k", n), ("q", 1), ("z", 1), ("mlp.hook_post", 1), ("resid_post", 1)):
        assert cache[name, 0].shape[1] == n
        assert cache[name, 1].shape[1] == tokens
    assert cache["pattern", 1].shape[2:] == (1, n)
    assert cache["hook_ln_final"].shape[1] == 1


class Adapted(torch.nn.Linear):
    """A projection with an adapter beside its weight, as fine-tuning libraries put in its place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5 * x.sum(-1, keepdim=True)


@torch.no_grad()
@pytest.mark.parametrize("way", ["adapter", "hook of torch's", "forward of its own"])
def test_a_projection_that_is_more_than_its_weight_is_run_whole(vit: HookedViT, image: Tensor, way: str) -> None:
    before, qkv = vit(image, leading=1), vit.blocks[1].attn.qkv
    if way == "adapter":
        vit.blocks[1].attn.qkv = Adapted(qkv.in_features, qkv.out_features)
        vit.blocks[1].attn.qkv.load_state_dict(qkv.state_dict())
    elif way == "forward of its own":
        qkv.forward = lambda x, right=qkv.forward: 2 * right(x)
    else:
        qkv.register_forward_hook(lambda module, args, out: 2 * out)
    torch.testing.assert_close(vit(image, leading=1), vit(image), rtol=1e-10, atol=1e-10)
    assert (vit(image) - before).abs().max() > 1e-3
