"""Training dynamics: a planted transition is found with its interval, and a broken twin is caught."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from planted import READS, marked, planted
from prisma_patch import change_points, over_checkpoints, patch_heads
from torch import Tensor
from twins import rejects, twin

import prisma_core as prisma
from prisma_core import HookedViT, InputError, LoadError

BRIGHT, DARK = marked(1.0), marked(-1.0, seed=1)
METRIC = ("a bright mark", "a dark mark")
CHANGE, STEPS = 6, range(0, 1200, 100)


def series(change: int = 12, n: int = 20, noise: float = 0.1, seed: int = 0) -> Tensor:
    """Return ones that become zeros at a checkpoint, with noise."""
    drawn = noise * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn + (torch.arange(n) < change)


def checkpoints() -> dict[int, HookedViT]:
    """Return a training in which the reading head appears all at once, the weights jittering throughout."""
    models = {}
    for at, step in enumerate(STEPS):
        model = planted(seed=at)
        if at < CHANGE:
            with torch.no_grad():
                model.blocks[READS[0]].attn.W_O[READS[1]] *= 0.01
        models[step] = model
    return models


def truth(dynamics: ModuleType) -> None:
    """The change is found where it is, and intervals hold it as often as they say."""
    inside, widths = 0, []
    for seed in range(20):
        found = dynamics.change_points(series(noise=0.45, seed=seed), 1, resamples=100)
        low, _, high = found.values[0].tolist()
        inside += low <= 12 <= high
        widths.append(high - low)
    assert inside >= 16
    assert 1 <= sum(widths) / len(widths) <= 8
    assert dynamics.change_points(series(), 1).values[0, 1] == 12
    assert dynamics.change_points(series()).shape["change"] == 1
    quiet = [dynamics.change_points(series(change=20, seed=seed), resamples=100).shape["change"] for seed in range(10)]
    assert sum(map(bool, quiet)) <= 2
    bump = (torch.arange(27) // 9 == 1).double()  # neither of its changes alone lowers the error much
    for each in (bump, bump + series(change=0, n=27)):
        assert dynamics.change_points(each, resamples=100).values[:, 1].tolist() == [9, 18]


TWINS = {
    "the last checkpoint of the old piece": (
        "torch.tensor(ends[:-1], ",
        "torch.tensor([end - 1 for end in ends[:-1]], ",
    ),
    "residuals that are not drawn": ("fitted + (x - fitted)[", "fitted + 0 * (x - fitted)["),
    "a change wherever the error falls": ("> gains.quantile(1 - significance / 2)", "> 1"),
    "one change at a time": ("for more in (1, 2) if", "for more in (1,) if"),
}


@pytest.mark.parametrize("name", TWINS)
def test_the_truth_is_found_and_the_twin_is_caught(name: str) -> None:
    dynamics = importlib.import_module("prisma_patch.dynamics")
    broken = twin(dynamics, *TWINS[name])
    truth(dynamics)
    with pytest.raises(AssertionError):
        truth(broken)


def test_the_step_at_which_a_head_appears(tmp_path: Path) -> None:
    def effect(model: Any) -> Tensor:
        return patch_heads(model, BRIGHT, DARK, METRIC).values[READS][0]

    found = over_checkpoints(checkpoints(), effect)
    assert found.axes == ("checkpoint",)
    assert found.labels["checkpoint"] == tuple(map(str, STEPS))
    changes = change_points(found)
    assert changes.facts["steps"] == [str(STEPS[CHANGE])]
    assert changes.values[0, 0] <= CHANGE <= changes.values[0, 2]


def test_a_twin_that_measures_one_checkpoint_for_all_finds_no_step() -> None:
    def truth(follow: Any) -> None:
        shuffled = dict(sorted(checkpoints().items(), key=lambda each: -each[0]))
        found = follow(shuffled, lambda model: model.blocks[READS[0]].attn.W_O[READS[1]].norm())
        assert found.labels["checkpoint"] == tuple(map(str, STEPS))
        assert change_points(found).facts["steps"] == [str(STEPS[CHANGE])]

    rejects(truth, over_checkpoints, "_loaded(checkpoints[step])", "_loaded(checkpoints[max(checkpoints)])")
    rejects(truth, over_checkpoints, "in bar(sorted(checkpoints),", "in bar(checkpoints,")


def test_results_of_a_technique_keep_their_axes() -> None:
    models = dict(list(checkpoints().items())[5:7])
    found = over_checkpoints(models, lambda model: patch_heads(model, BRIGHT, DARK, METRIC))
    assert found.axes == ("checkpoint", "layer", "head", "batch")
    before, after = (found.sel(layer="L1", head="H2").values[at, 0].abs().item() for at in (0, 1))
    assert after > 10 * before
    assert found.labels["layer"] == ("L0", "L1")


def test_folders_are_loaded_in_turn_and_a_series_goes_on(tmp_path: Path) -> None:
    folders: dict[int, Any] = {}
    for step, seed in ((10, 0), (20, 1), (30, 2)):
        prisma.save(planted(seed=seed), tmp_path / f"step{step}")
        folders[step] = tmp_path / f"step{step}"
    seen: list[float] = []

    def metric(model: Any) -> float:
        seen.append(float(model.blocks[0].attn.W_O.norm()))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return seen[-1]

    path = tmp_path / "series.safetensors"
    with pytest.raises(KeyboardInterrupt):
        over_checkpoints(folders, metric, resume=path)
    found = over_checkpoints(folders, metric, resume=path)
    assert len(seen) == 5  # two and the stop, then the first again and the one that was left
    expected = torch.tensor([seen[0], seen[1], seen[4]])
    torch.testing.assert_close(found.values.float(), expected)
    assert len(set(found.values.tolist())) == 3
    with pytest.raises(LoadError, match="another metric"):
        over_checkpoints(folders, lambda model: 0.5, resume=path)


def test_bad_input_names_what_there_is() -> None:
    sizes = iter((1, 2))
    with pytest.raises(InputError, match="no checkpoints"):
        over_checkpoints({}, lambda model: 0.0)
    with pytest.raises(InputError, match=r"\[1\] at the first .*\[2\] at step 2"):
        over_checkpoints({1: planted(), 2: planted(seed=1)}, lambda model: torch.zeros(next(sizes)))
    with pytest.raises(InputError, match=r"\[2, 2\]"):
        change_points(torch.zeros(2, 2))
    with pytest.raises(InputError, match="one finite number for each"):
        change_points(torch.tensor([0.0, 1.0, torch.nan, 1.0, 0.0, 1.0]))
    with pytest.raises(InputError, match="3 checkpoints are too few"):
        change_points(torch.zeros(3))
