"""The engine's passes: from the last clean stream on, with the tokens that still matter, equal to whole passes."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from models import VARIANTS, build
from prisma_patch import Variant, ablate, activation_patch, logit_difference, passes, sweep
from torch import Tensor
from twins import twin

from prisma_core import HookedDual, HookedViT
from prisma_core.spec import DualSpec, TextSpec
from prisma_core.transformer.mlp import MLP

EXACT = {"rtol": 1e-10, "atol": 1e-10}
METRIC = logit_difference(4, 2)


@pytest.fixture(autouse=True)
def _float64(in_float64: None) -> None:
    """All models here are in float64."""


def image(seed: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 12, generator=torch.Generator().manual_seed(seed))


READS_TOKEN = {name: facts for name, facts in VARIANTS.items() if "pool" not in facts}
SWEEPS: dict[str, dict[str, Any]] = {
    "heads at the class token": {"at": "blocks.*attn*hook_z", "over": "layer head", "pos": "cls"},
    "heads at all tokens": {"at": "blocks.*attn*hook_z", "over": "layer head"},
    "stream by token": {"at": "resid_pre", "over": "layer pos"},
    "attention's output by token": {"at": "attn_out", "over": "layer pos", "pos": [0, 3]},
    "some tokens at once": {"at": "resid_post", "over": "layer", "pos": [0, 2]},
    "the last token": {"at": "attn_out", "over": "layer", "pos": [-1]},
    "patterns of the class token": {"at": "blocks.*attn*hook_pattern", "over": "layer head", "pos": "cls"},
    "the class token before the block": {"at": "resid_pre", "over": "layer", "pos": "cls"},
}


def swept(model: HookedViT, options: dict[str, Any]) -> Tensor:
    return activation_patch(model, image(1), image(2), METRIC, **options).values


@pytest.mark.parametrize("options", SWEEPS.values(), ids=SWEEPS)
@pytest.mark.parametrize("facts", READS_TOKEN.values(), ids=READS_TOKEN)
def test_passes_equal_whole_passes(
    facts: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(**facts)
    found = swept(model, options)
    monkeypatch.setattr(importlib.import_module("prisma_patch.sweeps"), "passes_of", passes.Passes)
    torch.testing.assert_close(found, swept(model, options), **EXACT)
    assert found.abs().max() > 1e-6


def rows_of(model: HookedViT, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> list[tuple[int, int]]:
    """Return how many (inputs, tokens) the MLP of each layer is given, one entry a call."""
    seen: list[tuple[int, int, int]] = []
    layers: dict[Any, int] = {block.mlp: layer for layer, block in enumerate(model.blocks)}
    right = MLP.forward

    def forward(mlp: MLP, x: Tensor) -> Tensor:  # a forward of an instance's own would be run on all tokens
        seen.append((layers[mlp], *x.shape[:2]))
        return right(mlp, x)

    monkeypatch.setattr(MLP, "forward", forward)
    activation_patch(model, image(1), image(2), METRIC, **options)
    return [(layer, tokens) for layer, inputs, tokens in seen if inputs > 2]  # the clean runs are of two


def test_only_the_tokens_that_matter_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(layers=3)
    n = model.spec.layout.n_tokens
    heads = {"at": "z", "over": "layer head"}
    assert rows_of(model, monkeypatch, heads) == [(0, n), (1, n), (2, 1), (1, n), (2, 1), (2, 1)]
    monkeypatch.undo()
    cls = rows_of(model, monkeypatch, heads | {"pos": "cls"})
    assert cls == [(0, 1), (1, n), (2, 1), (1, 1), (2, 1), (2, 1)]
    monkeypatch.undo()
    mean = rows_of(build(layers=2, pool="avg"), monkeypatch, heads)
    assert mean == [(0, n), (1, n), (1, n)]


def test_a_twin_that_goes_on_from_the_stream_before_the_block_is_caught() -> None:
    model, source = build(layers=3), image(2)
    _, theirs = model.run_with_cache(source, names="attn_out")
    part = (slice(None), [0, 2], slice(None))
    variants = [Variant(f"blocks.{layer}.hook_attn_out", part, theirs["attn_out", layer]) for layer in range(3)]
    whole = passes.Passes(model, (image(1),)).outputs(variants)
    broken = twin(passes, "self.streams[layer + 1][:, changed:]", "self.streams[layer][:, changed:]")
    for module, right in ((passes, True), (broken, False)):
        restarted = module.RestartedPasses(model, (image(1),))
        found = torch.stack([restarted.outputs([variant])[0] for variant in variants])
        assert torch.allclose(found, torch.stack(whole), rtol=0, atol=1e-10) is right


def test_a_sweep_inside_another_scope_sees_its_edits() -> None:
    model = build()
    _, theirs = model.run_with_cache(image(2), names=("z", 0))

    def swap(z: Tensor, at: object) -> None:
        z[:, 0, 1] = theirs["z", 0][:, 0, 1]

    with ablate(model, ("z", 1), pos=[3], heads=2), ablate(model, ("z", 1), pos=[0], heads=1):
        found = activation_patch(model, image(1), image(2), METRIC, at=("z", 0), over="head", pos="cls").sel(head=1)
        by_hand = METRIC(model.run_with_hooks(image(1), hooks={("z", 0): swap})) - METRIC(model(image(1)))
    torch.testing.assert_close(found.values, by_hand.detach(), **EXACT)


# -------------------------------------------------------------------- dual encoders


def dual() -> HookedDual:
    vision = build(n_classes=None).spec.model_copy(update={"n_classes": 5})
    blocks, norm = vision.blocks, vision.ln_final
    text = TextSpec.plain(d_model=18, n_vocab=11, n_ctx=6, blocks=blocks, ln_final=norm, n_classes=5)
    torch.manual_seed(0)
    model = HookedDual(DualSpec(vision=vision, text=text))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


TOKENS, OTHERS = torch.randint(1, 11, (3, 6)), torch.randint(1, 11, (3, 6))
PLACES = {
    "vision": [f"vision.blocks.{layer}.attn.hook_z" for layer in range(2)],
    "text": [f"text.blocks.{layer}.attn.hook_z" for layer in range(2)],
    "embeddings": ["hook_image_embed", "hook_text_embed"],
}


@pytest.mark.parametrize("names", PLACES.values(), ids=PLACES)
def test_each_tower_of_a_pair_is_patched_as_by_hand(names: list[str]) -> None:
    model = dual()
    clean, other = (image(1), TOKENS), (image(2), OTHERS)
    _, theirs = model.run_with_cache(*other)
    parts = [(slice(None), [0, 4]), (slice(None), 2)] if "embed" not in names[0] else [(slice(None), 1)]
    variants = [Variant(name, part, theirs[name]) for name in names for part in parts]
    found = sweep(model, clean, variants, lambda logits: logits)
    assert found.shape == (len(variants), 2, 3)
    for variant, values in zip(variants, found, strict=True):
        by_hand = model.run_with_hooks(*clean, hooks={variant.name: lambda x, at, each=variant: each.apply(x)})
        torch.testing.assert_close(values, by_hand.detach(), **EXACT)
    assert (found - model(*clean)).abs().flatten(1).amax(1).gt(1e-6).any()


def test_a_twin_that_mixes_up_texts_and_images_is_caught() -> None:
    model = dual()
    clean = (image(1, 3), TOKENS)
    _, theirs = model.run_with_cache(image(2, 3), OTHERS)
    variants = [
        Variant("text.blocks.0.attn.hook_z", (slice(None), at), theirs["text.blocks.0.attn.hook_z"]) for at in (0, 1, 2)
    ]
    whole = [
        model.run_with_hooks(*clean, hooks={each.name: lambda x, at, each=each: each.apply(x)}) for each in variants
    ]
    broken = twin(passes, "(n_texts, 1)", "(n_texts, 0)")
    for module, right in ((passes, True), (broken, False)):
        found = module.DualPasses(model, clean).outputs(variants)
        alike = [
            one.shape == two.shape and torch.allclose(one, two, rtol=0, atol=1e-10)
            for one, two in zip(found, whole, strict=right)
        ]
        assert (all(alike) and len(found) == 3) is right
