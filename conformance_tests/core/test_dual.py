"""Text towers and dual encoders: masks, pooling, two towers in one cache, texts in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import prisma_core as prisma
from prisma_core.conformance.randomise import randomise
from prisma_core.spec import (
    AttentionSpec,
    BlockSpec,
    DualSpec,
    EmbedSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
    PoolSpec,
    TextPoolSpec,
    TextSpec,
)
from prisma_core.transformer import HookedDual, HookedText, build

LN = NormSpec(eps=1e-3)


def block(width: int) -> BlockSpec:
    attn = AttentionSpec(n_heads=2, n_kv_heads=2, d_head=width // 2, scale=0.4)
    return BlockSpec(attn=attn, mlp=MlpSpec(d_mlp=20, act="quick_gelu"), ln1=LN, ln2=LN)


def text_spec(**facts: object) -> TextSpec:
    given = {"causal": True, "pool": TextPoolSpec(kind="argmax"), "n_classes": 10, **facts}
    return TextSpec(d_model=12, n_vocab=50, n_ctx=9, blocks=(block(12),) * 2, ln_final=LN, **given)


def drawn(spec: TextSpec | DualSpec, seed: int = 0):
    return randomise(build(spec).double(), torch.Generator().manual_seed(seed)).eval()


@pytest.fixture(scope="module")
def dual() -> HookedDual:
    vision = ModelSpec(
        d_model=16,
        image_size=(16, 16),
        embed=EmbedSpec(patch=(4, 4)),
        layout=prisma.TokenLayout(cls=1, rows=4, columns=4),
        blocks=(block(16),) * 3,
        ln_pre=LN,
        ln_final=LN,
        pool=PoolSpec(kind="token"),
        d_pool=16,
        n_classes=10,
    )
    return drawn(DualSpec(vision=vision, text=text_spec(), logit_bias=True))


def inputs_of(model: HookedDual | HookedText, batch: int = 2) -> list[Tensor]:
    given = model.sample_inputs(batch, generator=torch.Generator().manual_seed(3))
    return [x.double() if x.is_floating_point() else x for x in given]


@torch.no_grad()
def test_a_causal_tower_does_not_look_ahead() -> None:
    model = drawn(text_spec(pool=TextPoolSpec(kind="none"), n_classes=None))
    (tokens,) = inputs_of(model)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).all(-1).any()
    both = drawn(text_spec(pool=TextPoolSpec(kind="none"), causal=False))
    assert not torch.isclose(both(tokens), both(changed)).all(-1).any()


@torch.no_grad()
def test_the_explicit_kernel_masks_as_the_fused_one_does() -> None:
    model = drawn(text_spec(pad_id=7))
    (tokens,) = inputs_of(model)
    tokens[:, -3:] = 7
    fused = model(tokens)
    explicit, cache = model.run_with_cache(tokens, names=["pattern", "attn_scores"])
    assert torch.allclose(fused, explicit, atol=1e-12)
    pattern = cache["pattern", 0]
    assert not pattern[..., -3:].any()
    assert not pattern.triu(1).any()
    assert torch.isneginf(cache["attn_scores", 1][..., -1]).all()


@torch.no_grad()
def test_padding_is_not_read() -> None:
    model = drawn(text_spec(pad_id=7, causal=False, pool=TextPoolSpec(kind="first")))
    (tokens,) = inputs_of(model)
    tokens[:, -3:] = 7
    assert torch.allclose(model(tokens), model(tokens[:, :-3]), atol=1e-12)


@pytest.mark.parametrize(
    ("pool", "at"),
    [
        (TextPoolSpec(kind="argmax"), 2),
        (TextPoolSpec(kind="eos", eos_id=5), 1),
        (TextPoolSpec(kind="first"), 0),
        (TextPoolSpec(kind="last"), 3),
    ],
)
@torch.no_grad()
def test_pooling_takes_the_position_it_names(pool: TextPoolSpec, at: int) -> None:
    model = drawn(text_spec(pool=pool))
    tokens = torch.tensor([[3, 5, 49, 5]])
    _, cache = model.run_with_cache(tokens, names=["hook_ln_final", "hook_pooled"])
    assert torch.equal(cache["hook_pooled"], cache["hook_ln_final"][:, at])


@torch.no_grad()
def test_two_towers_in_one_cache(dual: HookedDual) -> None:
    image, tokens = inputs_of(dual)
    logits, cache = dual.run_with_cache(image, tokens)
    assert logits.shape == (2, 3)
    assert torch.equal(cache["vision.blocks.2.attn.hook_z"], dual.vision.run_with_cache(image)[1]["z", 2])
    assert torch.equal(cache["text.blocks.1.attn.hook_z"], dual.text.run_with_cache(tokens)[1]["z", 1])
    assert dual.resolve(("resid_post", -1)) == ["vision.blocks.2.hook_resid_post", "text.blocks.1.hook_resid_post"]
    assert dual.resolve("text.z") == ["text.blocks.0.attn.hook_z", "text.blocks.1.attn.hook_z"]
    alike = dual.encode_image(image) @ dual.encode_text(tokens).T
    assert torch.allclose(logits, alike * dual.logit_scale.exp() + dual.logit_bias, atol=1e-12)
    edited = dual.run_with_hooks(image, tokens, hooks={"vision.blocks.0.hook_resid_post": lambda x, at: x * 0.5})
    assert not torch.isclose(edited, logits).any()


@torch.no_grad()
def test_a_tower_by_itself_leaves_hooks_on_the_other_alone(dual: HookedDual) -> None:
    image, tokens = inputs_of(dual)
    seen: list[str] = []
    with dual.hooks({"*": lambda x, at: seen.append(at.name)}), dual.caching(["resid_post", "hook_image_embed"]):
        dual.encode_image(image)
    assert {name.split(".")[0] for name in seen} == {"vision", "hook_image_embed"}
    late = {("resid_post", -1): lambda x, at: None}  # of both towers
    with (
        pytest.raises(prisma.HookError, match=r"text\.blocks\.1\.hook_resid_post was not reached in this pass\. Ask"),
        dual.hooks(late),
    ):
        dual.text(tokens, stop_at_layer=1)
    with dual.vision.hooks(late):
        dual(image, tokens)


@torch.no_grad()
def test_zero_shot_with_texts(dual: HookedDual) -> None:
    image, _ = inputs_of(dual)
    dual.tokenizer = lambda texts: torch.tensor([[len(t) % 50, 49, *[0] * 5] for t in texts])
    try:
        chances = dual.classify(image, ["cat", "giraffe", "ox"])
        assert chances.shape == (2, 3)
        assert torch.allclose(chances.sum(-1), torch.ones(2).double())
        assert torch.allclose(
            chances,
            dual(image, dual.tokens(["a photo of a cat.", "a photo of a giraffe.", "a photo of a ox."])).softmax(-1),
        )
    finally:
        dual.tokenizer = None
    with pytest.raises(prisma.InputError, match="without a tokenizer"):
        dual.encode_text("a cat")


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (torch.zeros(2, 10, dtype=torch.long), "at most 9 tokens, got 10"),
        (torch.zeros(2, 3), "whole numbers"),
        (torch.full((1, 3), 50), "from 0 to 49, got 50"),
        (["a cat"], "got list"),
    ],
)
def test_tokens_that_are_none(dual: HookedDual, tokens: object, said: str) -> None:
    with pytest.raises(prisma.InputError, match=said):
        dual.text(tokens)


@torch.no_grad()
def test_saved_and_loaded(dual: HookedDual, tmp_path) -> None:
    inputs = inputs_of(dual)
    prisma.save(dual, tmp_path)
    back = prisma.load(f"file:{tmp_path}")
    assert isinstance(back, HookedDual)
    assert back.spec == dual.spec
    assert torch.allclose(back(*inputs), dual(*inputs), atol=1e-12)
