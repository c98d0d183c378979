"""The bundled toys of other kinds than classifiers of images: each does what its card says, on freshly drawn data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prisma_toy import (
    draw_motions,
    normalise,
    series,
    training_log,
)
from prisma_toy.checkpoints import CONFIG
from prisma_toy.config import Config
from prisma_toy.measure import held_out
from prisma_toy.source import bundled
from prisma_toy.tasks import task

import prisma_core as prisma
from prisma_core import HookedViT, UnknownName
from prisma_core.plugin import VideoPreprocess

CONFIGS = {name: Config.model_validate_json((folder / CONFIG).read_text()) for name, folder in bundled().items()}


def vision(name: str) -> HookedViT:
    model = prisma.load(f"toy:{name}")
    assert isinstance(model, HookedViT)
    return model


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


@pytest.mark.parametrize(("rest", "says"), [("motion@7", "2000"), ("scenes-cls@0", "none"), ("motions@0", "motion")])
def test_an_unknown_checkpoint_is_an_error_that_lists(rest: str, says: str):
    with pytest.raises(UnknownName, match=says):
        prisma.load(f"toy:{rest}")
