"""The bundled toys of other kinds than classifiers of images: each does what its card says, on freshly drawn data."""

from __future__ import annotations

from typing import Any

import pytest
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
    reconstructions,
    series,
    training_log,
)
from prisma_toy.checkpoints import CONFIG
from prisma_toy.config import Config
from prisma_toy.counting import HELD_OUT_SUMS, TOTALS
from prisma_toy.measure import held_out
from prisma_toy.reports import named, related
from prisma_toy.source import bundled
from prisma_toy.tasks import task

import prisma_core as prisma
from prisma_core import HookedDual, HookedViT, InputError, NotApplicable, UnknownName
from prisma_core.plugin import VideoPreprocess

CONFIGS = {name: Config.model_validate_json((folder / CONFIG).read_text()) for name, folder in bundled().items()}


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
    right = chances.argmax(1) == drawn.things[:, 0]
    assert right.float().mean() >= 0.95
    wrong = model.classify(normalise(drawn.image.roll(1, 0)), captions.THINGS, template="a {}").argmax(1)
    assert (wrong == drawn.things[:, 0]).float().mean() < 0.15


def test_both_towers_are_drawn_anew_on_request():
    trained, drawn = dual(), prisma.load("toy:clip-scenes", pretrained=False)
    assert isinstance(drawn, HookedDual)
    assert named(drawn, 100, unseen=False).accuracy < 0.2
    assert not torch.equal(drawn.text.W_E, trained.text.W_E)
    assert not torch.equal(drawn.vision.blocks[0].attn.W_Q, trained.vision.blocks[0].attn.W_Q)


def test_relations_are_read_and_unseen_things_are_better_than_chance():
    model = dual()
    assert related(model, 200, unseen=False, seed=5).accuracy >= 0.97
    assert related(model, 200, unseen=True, seed=5).accuracy >= 0.95
    assert named(model, 200, unseen=True, seed=5).accuracy >= 0.7, "1 of 6 knows the colour alone"


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
    assert right.float().mean() >= 0.97
    for pair in HELD_OUT_SUMS:
        assert right[(drawn.numbers == torch.tensor(pair)).all(1)].float().mean() >= 0.95, pair


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
    assert (made - image)[where].pow(2).mean() < 0.65 * plain


def test_reconstructions_come_nearer_along_the_training_and_touch_nothing_that_is_visible():
    image = draw_scenes(40, seed=62, size=48).image
    found = reconstructions(image, seed=1)
    assert found.names("checkpoint") == tuple(map(str, series("mae-scenes")))
    where = found.tensors["hidden"].bool()
    assert where.float().mean().item() == pytest.approx(38 / 64)
    visible = ~where[:, None].expand_as(image)
    assert all(torch.equal(made[visible], image[visible]) for made in found.values)
    assert torch.equal(found.tensors["masked"][visible], image[visible])
    assert bool((found.tensors["masked"][~visible] == 0.5).all())
    by_hand = torch.stack([(made - image)[~visible].square().mean() for made in found.values])
    torch.testing.assert_close(found.tensors["error"], by_hand)
    assert found.tensors["error"].argmin() == len(by_hand) - 1
    assert by_hand[-1] < 0.5 * by_hand[0]
    hidden = draw_hidden(40, 64, 0.6, torch.Generator().manual_seed(1))
    assert torch.equal(found.values[-1], reconstruct(vision("mae-scenes"), image, hidden))
    with pytest.raises(NotApplicable, match="toy:motion"):
        reconstructions(image, name="motion")
    with pytest.raises(InputError, match="40 64"):
        reconstructions(image, hidden[:3])


# -------------------------------------------------------------------- checkpoints along training


@pytest.mark.parametrize("name", [name for name in bundled() if series(name)])
def test_a_series_leads_from_chance_to_the_model(name: str):
    steps, one = list(series(name)), task(CONFIGS[name].data)
    assert len(steps) >= 5
    assert steps[0] == 0
    assert steps[-1] == CONFIGS[name].steps
    scores = [held_out(prisma.load(f"toy:{name}@{step}"), one, n=128, seed=23).accuracy for step in steps]
    last = prisma.load(f"toy:{name}")
    assert held_out(last, one, n=128, seed=23).accuracy == scores[-1] == max(scores)
    assert scores[0] < 0.5 * scores[-1]
    assert prisma.load(f"toy:{name}@0").labels == last.labels
    log = training_log(name)
    assert log[-1]["step"] == steps[-1]
    assert log[-1]["loss"] < log[0]["loss"]


def fall(losses: torch.Tensor) -> tuple[int, float]:
    """Where two constants fit a curve best, and the share of the variance about one constant that they leave."""
    cuts = range(1, len(losses))
    errors = [sum(float((part - part.mean()).square().sum()) for part in (losses[:cut], losses[cut:])) for cut in cuts]
    best = min(cuts, key=lambda cut: errors[cut - 1])
    return best, errors[best - 1] / float((losses - losses.mean()).square().sum())


def test_the_loss_of_motions_falls_all_at_once_and_the_series_spans_it():
    log = [row for row in training_log("motion") if row["step"] <= 500]
    losses = torch.tensor([row["loss"] for row in log])
    cut, left = fall(losses)
    assert left < 0.15
    mixed = losses[torch.randperm(len(losses), generator=torch.Generator().manual_seed(0))]
    assert fall(mixed)[1] > 0.6, "the same losses in another order have no such place"
    before, after = log[cut - 1]["step"], log[cut]["step"]
    inside = [step for step in series("motion") if before - 100 <= step <= after + 100]
    assert len(inside) >= 4
    assert losses[: cut - 8].mean() > 1.9, "an even guess of eight directions: ln 8 = 2.08"


def test_the_loss_of_hidden_patches_falls_first_to_the_grounds_colour():
    losses = torch.tensor([row["loss"] for row in training_log("mae-scenes") if row["step"] <= 300])
    cut, left = fall(losses)
    assert cut <= 8, "within the first eighty steps"
    assert left < 0.4
    mixed = losses[torch.randperm(len(losses), generator=torch.Generator().manual_seed(0))]
    assert fall(mixed)[1] > 0.6
    assert {0, 16, 32, 64, 256} < set(series("mae-scenes"))


@pytest.mark.parametrize(("rest", "says"), [("motion@7", "2000"), ("scenes-cls@0", "none"), ("motions@0", "motion")])
def test_an_unknown_checkpoint_is_an_error_that_lists(rest: str, says: str):
    with pytest.raises(UnknownName, match=says):
        prisma.load(f"toy:{rest}")
