"""Arguments and attributes that do not exist here: errors with the nearest name, or TransformerLens' counterpart."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import prisma_core as prisma
from prisma_core import HookedViT, HookError, InputError


@pytest.mark.parametrize("device", ["cudda", "cuda:99", "gpu"])
def test_a_cache_on_an_unknown_device(vit: HookedViT, image: Tensor, device: str) -> None:
    with pytest.raises(InputError, match=f"'{device}'.*cpu"):
        vit.run_with_cache(image, device=device)
    with pytest.raises(InputError, match=device), vit.caching(device=device):
        pass


def test_gradients_without_a_loss(vit: HookedViT, image: Tensor) -> None:
    _, cache = vit.run_with_cache(image, names="z")
    assert cache.gradients is None
    with pytest.raises(prisma.errors.NotApplicable, match=r"gradients.*run_with_cache.*loss="):
        _ = cache.grad["z", 0]


@pytest.mark.parametrize(
    ("keyword", "answer"),
    [
        ({"names_filter": "z"}, "'names_filter'.*names="),
        ({"incl_bwd": True}, "'incl_bwd'.*loss="),
        ({"stop_at_leyer": 1}, "'stop_at_leyer'.*stop_at_layer"),
        ({"nams": "z"}, "'nams'.*names"),
        ({"layers": 2}, "'layers'.*names, hooks, .*start_at_layer"),
        ({"return_type": "logits"}, "'return_type'.*output=False"),
        ({"reset_hooks_end": True}, "'reset_hooks_end'.*scope"),
    ],
)
def test_unknown_keywords_are_answered(vit: HookedViT, image: Tensor, keyword: dict[str, Any], answer: str) -> None:
    for output in (True, False):
        with pytest.raises(InputError, match=answer):
            vit.run_with_cache(image, output=output, **keyword)
    with pytest.raises(InputError, match=r"run_with_hooks.*'fwd_hooks'.*hooks=\{name: hook\}"):
        vit.run_with_hooks(image, fwd_hooks=[])
    with pytest.raises(InputError, match=r"HookedViT.*'stop_layer'.*stop_at_layer"):
        vit(image, stop_layer=1)


def test_scopes_answer_keywords_of_transformer_lens(vit: HookedViT) -> None:
    with pytest.raises(InputError, match=r"'fwd_hooks'.*hooks=\{name: hook\}"):
        vit.hooks(fwd_hooks=[("hook_embed", lambda x, hook: x)])
    with pytest.raises(InputError, match=r"'bwd_hooks'.*backward=\{name: hook\}"):
        vit.hooks(bwd_hooks=[])
    with pytest.raises(InputError, match=r"'bakward'.*backward"):
        vit.hooks(bakward={})
    with (
        pytest.raises(InputError, match=r"caching.*'names_filter'.*names="),
        vit.caching(names_filter="z"),
    ):
        pass
    with pytest.raises(HookError, match=r"list.*dict\(pairs\)"):
        vit.hooks([("hook_embed", lambda x, hook: x)])


def test_attributes_of_transformer_lens_are_answered(vit: HookedViT, image: Tensor) -> None:
    _, cache = vit.run_with_cache(image)
    for owner, name, answer in (
        (vit, "to_tokens", r"HookedViT.*'to_tokens'.*model\.tokens\(text\)"),
        (vit, "add_hook", r"with model\.hooks\("),
        (vit, "cfg", r"model\.spec"),
        (vit, "nothing", r"'nothing'$"),
        (cache, "stack_activation", r"Cache.*'stack_activation'.*torch\.stack"),
        (cache, "nothing", r"'nothing'\.$"),
    ):
        with pytest.raises(AttributeError, match=answer):
            getattr(owner, name)
        assert not hasattr(owner, name)
