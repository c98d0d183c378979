"""The toy models that come with the package: they load, and are as good as their cards say."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from prisma_toy import normalise, sample_scene
from prisma_toy.card import CARD, command
from prisma_toy.checkpoints import CONFIG
from prisma_toy.config import Config
from prisma_toy.measure import held_out, patch_logits, two_shape_lens
from prisma_toy.source import WEIGHTS, bundled, card_title
from prisma_toy.tasks import task

import prisma_core as prisma
from prisma_core import HookedViT, InputError, UnknownName
from prisma_core.host import installed

BUNDLED = bundled()
CONFIGS = {name: Config.model_validate_json((folder / CONFIG).read_text()) for name, folder in BUNDLED.items()}
# What each model is held to on freshly drawn images: the floor of its kind, not what its card says.
FLOORS = {
    "clip-scenes": 0.95,
    "counting": 0.97,
    "digits": 0.97,
    "dsprites-attn-1l": 0.6,
    "dsprites-attn-2l": 0.93,
    "mae-scenes": 0.75,
    "motion": 0.97,
    "scenes-3l": 0.97,
    "scenes-cls": 0.97,
    "scenes-reg": 0.97,
}


def loaded(name: str) -> HookedViT:
    model = prisma.load(f"toy:{name}")
    assert isinstance(model, HookedViT)
    return model


def test_what_is_bundled():
    assert set(BUNDLED) == set(FLOORS)
    listed = {info.reference: info for info in installed().source("toy").models()}
    assert set(listed) == {f"toy:{name}" for name in BUNDLED}
    assert all(info.pretrained and info.note for info in listed.values())


def test_weights_are_small_enough_to_ship():
    sizes = {name: sum(file.stat().st_size for file in folder.rglob("*")) for name, folder in BUNDLED.items()}
    assert max(sizes.values()) < 3_000_000
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) < 15_000_000


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_model_is_hooked_and_labelled(name: str):
    config, model = CONFIGS[name], prisma.load(f"toy:{name}")
    one = task(config.data)
    assert not model.training
    assert model.labels == (one.labels or None)
    batch = one.batch(2, "held-out", 3, 0)
    image = normalise(batch.image)
    prepared = model.preprocess(in_eight_bits(batch.image))
    torch.testing.assert_close(prepared, image, rtol=0, atol=1.01 / 255)
    logits, cache = model.run_with_cache(image, *([] if batch.tokens is None else [batch.tokens]))
    expected = one.objective.model(one, config)(image, *([] if batch.tokens is None else [batch.tokens])).shape
    assert logits.shape == expected
    for prefix, tower in model.towers().items():
        assert tower.spec.n_layers == config.layers
        assert f"{prefix}blocks.{config.layers - 1}.attn.hook_pattern" in cache
        assert (f"{prefix}blocks.0.mlp.hook_post" in cache) == bool(config.mlp_ratio)


def in_eight_bits(image: torch.Tensor) -> list[Any]:
    """Images, or videos as lists of frames, as a file would hold them."""
    if image.ndim == 5:
        return [in_eight_bits(video) for video in image]
    return [(each.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy() for each in image]


@pytest.mark.parametrize("name", BUNDLED)
def test_a_sample_is_an_image_or_a_video_that_the_model_takes(name: str):
    model, sample = prisma.load(f"toy:{name}"), installed().source("toy").sample(name, seed=3)
    assert isinstance(sample, list) == (task(CONFIGS[name].data).tubelet is not None)
    assert model.preprocess(sample).shape[1:] == task(CONFIGS[name].data).shape


def test_a_source_names_the_checkpoints_of_a_model() -> None:
    source = installed().source("toy")
    steps = source.checkpoints("mae-scenes@16")
    assert list(steps) == sorted(steps)
    assert steps[16] == "toy:mae-scenes@16"
    last, model = (prisma.load(each).state_dict() for each in (steps[max(steps)], "toy:mae-scenes"))
    assert all(torch.equal(last[name], model[name]) for name in model)
    assert source.checkpoints("scenes-3l") == source.checkpoints("no such model") == {}


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_model_is_as_good_as_its_card_says(name: str):
    config, card = CONFIGS[name], (BUNDLED[name] / CARD).read_text(encoding="utf-8")
    one = task(config.data)
    stated = re.search(rf"Held-out {one.objective.measure}: ([\d.]+) % of (\d+) \(95 % interval", card)
    assert stated, card
    assert int(stated[2]) == (4096 if one.held_out is None else len(one.held_out().image))
    fresh = held_out(prisma.load(f"toy:{name}"), one, n=320, seed=17)
    low, high = fresh.interval
    assert low - 0.005 <= float(stated[1]) / 100 <= high + 0.005
    assert fresh.accuracy >= FLOORS[name]
    assert f"`{command(config, name)}`" in card
    assert re.search(rf"Seed: {config.seed}; .*\b{config.steps} steps", card)
    assert re.search(r"Made 20\d\d-\d\d-\d\d with torch \d", card)
    assert card_title(BUNDLED[name]).startswith(f"{config.layers} layer")


@torch.no_grad()
def swapped(name: str, token: int) -> float:
    """The share of scenes whose label becomes another scene's when one token of the last stream becomes its."""
    model, batch = loaded(name), task("scenes").batch(64, "held-out", 5, 0)
    last = model(normalise(batch.image), stop_at_layer=3)
    label = model(last, start_at_layer=3).argmax(1)
    differ = label != label.roll(1)
    last[:, token] = last[:, token].roll(1, 0)
    return float((model(last, start_at_layer=3).argmax(1) == label.roll(1))[differ].float().mean())


@pytest.mark.parametrize("name", ["scenes-cls", "scenes-reg"])
def test_a_class_token_carries_the_label_where_it_is_read(name: str):
    assert swapped(name, token=0) == 1
    assert swapped(name, token=1) == 0
    assert swapped("scenes-3l", token=0) < 0.1, "the mean of all tokens is read there"


@torch.no_grad()
def test_the_class_token_looks_at_the_registers():
    model = loaded("scenes-reg")
    assert model.layout.registers == 4
    image = normalise(task("scenes").batch(16, "held-out", 5, 0).image)
    logits, cache = model.run_with_cache(image)
    of_heads = cache["pattern", 0][:, :, 0, model.layout.cls : model.layout.cls + 4].sum(-1).mean(0)
    assert of_heads.max() > 0.4, "a head of the first layer spends most of its attention on 4 of 149 tokens"
    model.embed.prefix[model.layout.cls :] = 0
    assert (model(image) - logits).abs().mean() > 0.05


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
