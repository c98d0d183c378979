"""Techniques where a block has several attentions side by side, and attention techniques on text towers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import build
from planted_dual import planted_dual
from prisma_lens import attention_flow, head_scores, induction, relevance, rollout
from prisma_lens.heads import key_kinds, patterns_by_layer
from prisma_patch import activation_patch, attribution_patch, path_patch, switch
from torch import Tensor
from twins import rejects

from prisma_core import HookedText, HookedViT, HookPoint, InputError, NotApplicable
from prisma_core.plugin import TextSpec

EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture
def model(in_float64: None) -> HookedViT:
    return build(n_parallel=2, registers=1)


@pytest.fixture
def pair(image: Tensor) -> tuple[Tensor, Tensor]:
    return image[:1], image[1:2]


def test_heads_of_both_attentions_are_scored(model: HookedViT, image: Tensor) -> None:
    def truth(study: Any) -> None:
        scores, (_, cache) = study(model, image), model.run_with_cache(image, names="pattern")
        assert scores.shape == {"kind": len(scores.names("kind")), "layer": 2, "head": 8}
        for kind, mask in key_kinds(model.spec.layout).items():
            by_hand = (cache["blocks.1.attn.1.hook_pattern"][:, 2, 2:] * mask).sum(-1).mean()
            torch.testing.assert_close(
                scores.sel(kind=kind, layer="L1", head="H6").values.double(), by_hand, rtol=1e-5, atol=1e-6
            )

    rejects(truth, head_scores, "cache[name] for name in names", "cache[name] for name in names[:1] * 2")


def test_patterns_stand_side_by_side_only_where_attentions_do() -> None:
    class Named:
        def hook_points(self) -> dict[str, HookPoint]:
            names = ("blocks.0.hook_pattern", "blocks.1.hook_pattern", "blocks.2.attn.0", "blocks.2.attn.1")
            full = (name if name.endswith("pattern") else f"{name}.hook_pattern" for name in names)
            return {name: HookPoint("batch head query_pos key_pos", "softmax(scores)") for name in full}

    named: Any = Named()
    layers = patterns_by_layer(named, lambda axes: axes.startswith("batch head"))
    assert [len(each) for each in layers] == [1, 1, 2]


def test_rollout_and_relevance_take_all_heads_of_a_layer(model: HookedViT, image: Tensor) -> None:
    _, cache = model.run_with_cache(image, names="pattern", loss=lambda out: out[:, 2].sum())
    eye, mixed, support = torch.eye(8), torch.eye(8), torch.eye(8)
    for layer in range(2):
        names = [f"blocks.{layer}.attn.{side}.hook_pattern" for side in range(2)]
        mixed = (0.5 * eye + 0.25 * sum(cache[name].mean(1) for name in names)) @ mixed
        gradient = sum((cache[name] * cache.grad[name]).relu().mean(1) for name in names) / 2
        support = support + gradient @ support
    torch.testing.assert_close(rollout(model, image).values.double(), mixed, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(relevance(model, image, 2).values, support - eye, **EXACT)
    assert induction(model, image, pairs=1).shape == {"kind": 5, "layer": 2, "head": 8}
    assert attention_flow(model, image[:1], -1, progress=False).facts["pos"] == "r1c2"


def test_a_direct_path_goes_through_no_other_attention(model: HookedViT, pair: tuple[Tensor, Tensor]) -> None:
    """Against the model itself, with every attention behind the sender held at its clean output."""

    def truth(study: Any) -> None:
        clean, other = pair
        sender = ["blocks.0.attn.0.hook_z"]
        _, theirs = model.run_with_cache(other, names=sender)
        _, ours = model.run_with_cache(clean)
        held = [
            name for name in model.hook_points() if name.endswith(("hook_z", "hook_mlp_out")) and name not in sender
        ]
        hooks = {name: (lambda x, at: ours[at.name]) for name in held} | {sender[0]: lambda x, at: theirs[at.name]}
        by_hand = model.run_with_hooks(clean, hooks=hooks)[:, 3] - model(clean)[:, 3]
        found = study(model, clean, other, 3, sender)
        torch.testing.assert_close(found.values, by_hand, **EXACT)
        assert found.facts["frozen"] == held

    rejects(truth, path_patch, 'FROZEN = ("hook_z", ', 'FROZEN = ("attn.hook_z", ')


def test_first_order_effects_are_the_derivative_head_by_head(model: HookedViT, pair: tuple[Tensor, Tensor]) -> None:
    clean, other = pair
    found = attribution_patch(model, clean, other, 3)
    assert found.labels == activation_patch(model, clean, other, 3).labels
    _, cache = model.run_with_cache(other, names="z")

    def mixed(z: Tensor, at: Any) -> None:
        z[:, :, 1] += 1e-6 * (cache[at.name][:, :, 1] - z[:, :, 1])

    moved = model.run_with_hooks(clean, hooks={"blocks.0.attn.1.hook_z": mixed})[:, 3] - model(clean)[:, 3]
    torch.testing.assert_close(found.sel(layer="L0", head="H5").values, moved / 1e-6, rtol=1e-4, atol=1e-6)


def test_the_switch_is_of_the_heads_it_names(in_float64: None) -> None:
    """Of eight heads side by side the one that flips is found by hand, among models with random weights."""

    def truth(study: Any) -> None:
        flips = 0
        for seed in range(12):
            model, images = build(n_parallel=2, seed=seed), torch.randn(2, 1, 3, 8, 12).double()
            clean, other = images
            a, b = (int(model(each).argmax()) for each in (clean, other))
            if a == b:
                continue
            found = study(model, clean, other, a, b)
            _, cache = model.run_with_cache(other, names="z")

            def put(z: Tensor, at: Any) -> None:
                layer, _, side = at.name.split(".")[1:4]
                for one, head in found.heads:  # noqa: B023
                    if (one, head // 4) == (int(layer), int(side)):
                        z[:, :, head % 4] = cache[at.name][:, :, head % 4]  # noqa: B023

            after = model.run_with_hooks(clean, hooks={"z": put})[0]
            assert (int(after.argmax()) == b) == found.flipped
            assert found.margin == pytest.approx(float(after[b] - after[a]))
            flips += found.flipped
        assert flips > 1

    torch.manual_seed(3)
    rejects(
        truth, switch, "variants_of(places, names, theirs, theirs)", "variants_of(places, names[::-1], theirs, theirs)"
    )


def test_a_class_is_not_switched_to_itself(model: HookedViT, pair: tuple[Tensor, Tensor]) -> None:
    best = int(model(pair[0]).argmax())
    with pytest.raises(InputError, match="nothing to flip"):
        switch(model, *pair, best, best)


def test_patterns_are_switched_as_outputs_are(in_float64: None, pair: tuple[Tensor, Tensor]) -> None:
    model = build(registers=1)
    clean, other = pair
    a, b = int(model(clean).argmax()), int(model(clean).argsort()[0, -2])
    found = switch(model, clean, other, a, b, at="pattern")
    alone = activation_patch(model, clean, other, (b, a), at="pattern")
    torch.testing.assert_close(found.effects.values, alone.values, **EXACT)
    _, cache = model.run_with_cache(other, names="pattern")

    def put(pattern: Tensor, at: Any) -> None:
        for layer, head in found.heads:
            if at.layer() == layer:
                pattern[:, head] = cache[at.name][:, head]

    after = model.run_with_hooks(clean, hooks={"pattern": put})[0]
    assert found.margin == pytest.approx(float(after[b] - after[a]))


# -------------------------------------------------------------------- text towers


def test_a_causal_text_tower_rolls_out_to_earlier_tokens_alone(in_float64: None) -> None:
    model = HookedText(TextSpec.plain(n_ctx=5, n_classes=2, d_model=12, heads=2, d_mlp=16, causal=True)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    tokens = torch.randint(1, 20, (2, 5), generator=torch.Generator().manual_seed(0))
    mixed = rollout(model, tokens)
    torch.testing.assert_close(mixed.values.sum(-1), torch.ones(2, 5), rtol=1e-5, atol=1e-6, check_dtype=False)
    assert mixed.values.triu(1).eq(0).all()
    assert mixed.values.tril().gt(0).sum() == 2 * 15
    flow = attention_flow(model, tokens[:1], 2, progress=False).values[0]
    assert flow.gt(0).tolist() == [True, True, True, False, False]
    assert relevance(model, tokens, 1).values.triu(1).eq(0).all()
    with pytest.raises(NotApplicable, match="no token layout"):
        head_scores(model, tokens)
    with pytest.raises(InputError, match="no token 'cls'"):
        attention_flow(model, tokens, "cls")


def test_relevance_of_a_dual_encoders_text_is_by_the_gradient_of_its_patterns() -> None:
    clip = planted_dual()
    images, tokens = torch.randn(3, 3, 6, 6).double(), clip.tokens(["a bright mark", "a cat"])
    found = relevance(clip, (images, tokens), 1, tower="text")
    names = [name for name in clip.hook_points() if name.startswith("text.blocks") and name.endswith("hook_pattern")]
    _, cache = clip.run_with_cache(images, tokens, names=names, loss=lambda out: out[:, 1].sum())
    eye = torch.eye(tokens.shape[1]).double()
    support = eye.expand(2, -1, -1)
    for name in names:
        support = support + (cache[name] * cache.grad[name]).relu().mean(1) @ support
    torch.testing.assert_close(found.values, support - eye, **EXACT)
    assert found.values[0].eq(0).all()  # the other text has no part in this class
    assert found.values[1].gt(0).any()
