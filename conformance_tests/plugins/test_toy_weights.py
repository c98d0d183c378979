"""The toy models that come with the package: they load, and are as good as their cards say."""

from __future__ import annotations

import re

import pytest
import torch
from prisma_toy import sample_scene
from prisma_toy.card import CARD, command
from prisma_toy.checkpoints import CONFIG
from prisma_toy.measure import held_out, patch_logits, two_shape_lens
from prisma_toy.source import bundled, card_title
from prisma_toy.tasks import task
from prisma_toy.training import Config

import prisma_core as prisma
from prisma_core import HookedViT, InputError, UnknownName
from prisma_core.plugin.host import installed

BUNDLED = bundled()
CONFIGS = {name: Config.model_validate_json((folder / CONFIG).read_text()) for name, folder in BUNDLED.items()}


def loaded(name: str) -> HookedViT:
    model = prisma.load(f"toy:{name}")
    assert isinstance(model, HookedViT)
    return model


def test_what_is_bundled():
    assert {"scenes-3l", "dsprites-attn-1l", "dsprites-attn-2l"} <= set(BUNDLED)
    listed = {info.reference: info for info in installed().source("toy").models()}
    assert set(listed) == {f"toy:{name}" for name in BUNDLED}
    assert all(info.pretrained and info.note for info in listed.values())


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_model_is_small_hooked_and_labelled(name: str):
    folder, config, model = BUNDLED[name], CONFIGS[name], loaded(name)
    assert (folder / "model.safetensors").stat().st_size < 3_000_000
    one = task(config.data)
    assert model.labels == one.labels
    assert len(model.labels) == model.spec.n_classes
    assert model.spec.n_layers == config.layers
    assert not model.training
    assert model.preprocess is not None
    sample = installed().source("toy").sample(name, seed=3)
    assert sample is not None
    logits, cache = model.run_with_cache(model.preprocess(sample))
    assert logits.shape == (1, len(one.labels))
    assert f"blocks.{config.layers - 1}.attn.hook_pattern" in cache
    assert ("blocks.0.mlp.hook_post" in model.hook_points()) == bool(config.mlp_ratio)


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_model_is_as_good_as_its_card_says(name: str):
    config, card = CONFIGS[name], (BUNDLED[name] / CARD).read_text(encoding="utf-8")
    stated = re.search(r"Held-out accuracy: ([\d.]+) % of (\d+) \(95 % interval", card)
    assert stated, card
    assert int(stated[2]) >= 4096
    fresh = held_out(loaded(name), task(config.data), n=512, seed=17)
    low, high = fresh.interval
    assert low - 0.005 <= float(stated[1]) / 100 <= high + 0.005
    assert fresh.accuracy >= (0.95 if config.data == "scenes" else 0.5)
    assert f"`{command(config, name)}`" in card
    assert re.search(rf"Seed: {config.seed}; .*\b{config.steps} steps", card)
    assert re.search(r"Made 20\d\d-\d\d-\d\d with torch \d", card)
    assert card_title(BUNDLED[name]).startswith(f"{config.layers} layer")


def test_the_last_lens_separates_the_shapes_of_a_scene_with_two():
    shape, ground = two_shape_lens(loaded("scenes-3l"), n=50, seed=99)
    assert shape.accuracy >= 0.8
    assert ground.accuracy >= 0.9


def test_the_lens_reads_a_sample_scene_through_preprocess():
    model = loaded("scenes-3l")
    rows, right, both = model.layout.rows, 0, 0
    for seed in range(12):
        scene = sample_scene(seed)
        assert model.preprocess is not None
        with torch.no_grad():
            votes = patch_logits(model, model.preprocess(scene.image))[0, model.layout.n_prefix :].argmax(-1)
        truth = scene.patch_classes(rows).flatten()
        assert scene.classes == tuple(prisma_index(model, label) for label in scene.labels)
        both += set(scene.classes) <= set(votes.tolist())
        right += int((votes == truth).sum())
    assert both >= 11, "the lens names both shapes of nearly every scene"
    assert right / (12 * rows * rows) >= 0.85


def prisma_index(model: HookedViT, label: str) -> int:
    assert model.labels is not None
    return model.labels.index(label)


def test_patch_votes_average_to_the_logits():
    model = loaded("scenes-3l")
    image = task("scenes").batch(3, "held-out", 4, 0).image * 2 - 1
    torch.testing.assert_close(patch_logits(model, image).mean(1), model(image), rtol=1e-4, atol=1e-4)


def test_unknown_models_and_options_are_said():
    with pytest.raises(UnknownName, match="Did you mean scenes-3l"):
        prisma.load("toy:scenes")
    with pytest.raises(InputError, match="pretrained"):
        prisma.load("toy:scenes-3l", depth=4)


def test_weights_drawn_at_random_on_request():
    trained, drawn = loaded("scenes-3l"), prisma.load("toy:scenes-3l", pretrained=False)
    assert drawn.labels == trained.labels
    assert not torch.equal(drawn.head.weight, trained.head.weight)
    assert held_out(drawn, task("scenes"), n=64).accuracy < 0.5
