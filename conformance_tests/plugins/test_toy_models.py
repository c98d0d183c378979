"""The bundled toys of other kinds than classifiers of images: each does what its card says, on freshly drawn data."""

from __future__ import annotations

from typing import Any

import torch
from prisma_toy import (
    captions,
    draw_captions,
    draw_hidden,
    draw_motions,
    draw_scenes,
    draw_sums,
    normalise,
    reconstruct,
)
from prisma_toy.counting import HELD_OUT_SUMS, TOTALS
from prisma_toy.reports import named, related

import prisma_core as prisma
from prisma_core import HookedDual, HookedViT
from prisma_core.plugin import VideoPreprocess


def dual() -> HookedDual:
    model = prisma.load("toy:clip-scenes")
    assert isinstance(model, HookedDual)
    return model


def vision(name: str) -> HookedViT:
    model = prisma.load(f"toy:{name}")
    assert isinstance(model, HookedViT)
    return model


# -------------------------------------------------------------------- captions


@torch.no_grad()
def test_a_dual_encoder_names_held_out_images_zero_shot():
    model, drawn = dual(), captions.draw(300, torch.Generator().manual_seed(31), shapes=(1,))
    chances = model.classify(normalise(drawn.image), captions.THINGS, template="a {}")
    torch.testing.assert_close(chances.sum(1), torch.ones(300))
    assert (chances.argmax(1) == drawn.things[:, 0]).float().mean() >= 0.95
    wrong = model.classify(normalise(drawn.image.roll(1, 0)), captions.THINGS, template="a {}").argmax(1)
    assert (wrong == drawn.things[:, 0]).float().mean() < 0.15


def test_relations_are_read_and_unseen_things_are_no_lottery():
    model = dual()
    assert related(model, 200, unseen=False, seed=5).accuracy >= 0.9
    assert named(model, 200, unseen=True, seed=5).accuracy >= 0.5, "an even chance is 1 of 36"


@torch.no_grad()
def test_the_captions_of_one_relation_mean_the_same_either_way_round():
    model = dual()
    one, same, other = model.encode_text(
        ["a red circle left of a blue star", "a blue star right of a red circle", "a blue star left of a red circle"]
    )
    assert one @ same > one @ other + 0.1


def test_its_tokenizer_came_along():
    model = dual()
    tokens = model.tokens(["a red circle left of a blue star"])
    assert tokens.shape == (1, model.spec.text.n_ctx)
    assert model.tokenizer.decode(tokens) == ["a red circle left of a blue star"]
    logits, cache = model.run_with_cache(normalise(draw_captions(2).image), tokens)
    assert logits.shape == (2, 1)
    assert "text.blocks.0.attn.hook_pattern" in cache
    assert cache.tower("vision")["resid_post", -1].shape[:2] == (2, 65)


# -------------------------------------------------------------------- motions


@torch.no_grad()
def test_a_video_run_backwards_moves_the_other_way():
    model, drawn = vision("motion"), draw_motions(200, seed=41)
    said = model(normalise(drawn.video)).argmax(1)
    assert (said == drawn.direction).float().mean() >= 0.97
    back = model(normalise(drawn.video.flip(1))).argmax(1)
    assert (back == (drawn.direction + 4) % 8).float().mean() >= 0.95
    still = model(normalise(drawn.video[:, :1].expand(-1, 8, -1, -1, -1))).argmax(1)
    assert (still == drawn.direction).float().mean() < 0.5, "one frame does not tell"


def test_a_video_is_prepared_from_its_frames():
    model, drawn = vision("motion"), draw_motions(1, seed=1)
    assert isinstance(model.preprocess, VideoPreprocess)
    assert model.spec.n_frames == 8
    assert model.layout.frames == 4
    frames: Any = [(frame[0] * 255).round().to(torch.uint8).numpy() for frame in drawn.video[0]]
    torch.testing.assert_close(model.preprocess(frames), normalise(drawn.video), rtol=0, atol=1.01 / 255)


# -------------------------------------------------------------------- sums


@torch.no_grad()
def test_sums_that_were_never_trained_on_are_counted():
    model, drawn = vision("counting"), draw_sums(300, seed=51, split="held-out")
    right = model(normalise(drawn.image)).argmax(1) + TOTALS[0] == drawn.total
    assert right.float().mean() >= 0.9
    for pair in HELD_OUT_SUMS:
        assert right[(drawn.numbers == torch.tensor(pair)).all(1)].float().mean() >= 0.7, pair


# -------------------------------------------------------------------- hidden patches


def test_a_reconstruction_is_nearer_than_the_mean_of_what_is_visible():
    model, image = vision("mae-scenes"), draw_scenes(100, seed=61, size=48).image
    hidden = draw_hidden(100, 64, 0.6, torch.Generator().manual_seed(1))
    made = reconstruct(model, image, hidden)
    where = hidden.view(100, 1, 8, 8).repeat_interleave(6, 2).repeat_interleave(6, 3).expand_as(image)
    assert torch.equal(made[~where], image[~where]), "what is visible is not touched"
    unseen = image.clone()
    unseen[where] = torch.rand(int(where.sum()), generator=torch.Generator().manual_seed(2))
    assert torch.equal(reconstruct(model, unseen, hidden), made), "what is hidden is not seen"
    mean = (image * ~where).sum((2, 3), keepdim=True) / (~where).sum((2, 3), keepdim=True)
    plain = (mean.expand_as(image) - image)[where].pow(2).mean()
    assert (made - image)[where].pow(2).mean() < 0.6 * plain
