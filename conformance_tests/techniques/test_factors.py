"""Which factor lives where: the planted mark is found by both measures, and what is only readable by one."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from planted import marked, planted
from planted_dual import planted_dual
from torch import Tensor
from twins import twin

from prisma_core import InputError


def drawn(n: int = 80) -> tuple[Tensor, dict[str, Tensor]]:
    """Return images of a mark that the model reads, and of a blot in the last patch, which it does not."""
    generator = torch.Generator().manual_seed(0)
    mark, blot = torch.randn(2, n, generator=generator, dtype=torch.float64)
    images = marked(0.0, batch=n)
    images[:, :, :2, :2] += mark[:, None, None, None]
    images[:, :, 4:, 4:] += blot[:, None, None, None]
    return images, {"mark": mark, "blot": blot}


def truth(factors: ModuleType) -> None:
    """The mark lives in the copying and in the reading head; the blot can be read in its patch, which moves no mark."""
    images, values = drawn()
    found = factors.factors_by_place(planted(), images, values, at="z")
    share = found.sel(measure="intervention", factor="mark").values
    assert found.names("place") == ("L0H0", "L0H1", "L0H2", "L1H0", "L1H1", "L1H2")
    assert (share[[1, 5]] - 1).abs().max() < 0.05
    assert share[[0, 2, 3, 4]].abs().max() < 0.05
    probe = found.sel(measure="probe")
    assert probe.sel(factor="mark").values[[1, 5]].min() > 0.85
    stream = factors.factors_by_place(planted(), images, values, at=("resid_pre", 0))
    last = factors.factors_by_place(planted(), images, values, at=("resid_pre", 0), pos=[9])
    assert last.sel(measure="probe", factor="blot").values.item() > 0.9
    assert abs(last.sel(measure="intervention", factor="mark").values.item()) < 0.05
    at_relay = factors.factors_by_place(planted(), images, values, at=("resid_pre", 1), pos=[5])
    assert abs(at_relay.sel(measure="intervention", factor="mark").values.item() - 1) < 0.05
    assert stream.sel(measure="intervention", factor="mark").values.item() > 0.999
    assert found.facts["train"] + found.facts["held_out"] == 80


TWINS = {
    "swapped with itself": ("theirs = cache[place.name][partner]", "theirs = cache[place.name][test]"),
    "every head at once": ('"head": head}', '"head": None}'),
    "probes fitted to the labels of others": ("y[train].numpy())", "y[train.roll(1)].numpy())"),
}


@pytest.mark.parametrize("name", TWINS)
def test_the_truth_is_found_and_the_twin_is_caught(name: str) -> None:
    factors = importlib.import_module("prisma_patch.factors")
    broken = twin(factors, *TWINS[name])
    truth(factors)
    with pytest.raises(AssertionError):
        truth(broken)


def test_of_a_dual_encoder_the_vision_tower_is_taken() -> None:
    factors, images = importlib.import_module("prisma_patch.factors"), drawn(40)
    clip = planted_dual()
    found = factors.factors_by_place(clip, *images, at="z")
    assert torch.equal(found.values, factors.factors_by_place(clip.vision, *images, at="z").values)
    share = found.sel(measure="intervention", factor="mark").values
    assert (share[[1, 5]] - 1).abs().max() < 0.1
    assert share[[0, 2, 3, 4]].abs().max() < 0.1


def test_bad_input_names_the_factor() -> None:
    factors = importlib.import_module("prisma_patch.factors")
    images, values = drawn(10)
    with pytest.raises(InputError, match=r"'mark' of each of 10 images, .* got a Tensor \[9\]"):
        factors.factors_by_place(planted(), images, {"mark": values["mark"][:9]})
    with pytest.raises(InputError, match="'still' is the same in all 10"):
        factors.factors_by_place(planted(), images, {"still": torch.ones(10)})
    with pytest.raises(InputError, match="leave 1 to fit"):
        factors.factors_by_place(planted(), images, values, held_out=0.9)
    with pytest.raises(InputError, match="'rare' is the same in all images that are"):
        factors.factors_by_place(planted(), images, {"rare": torch.eye(10)[0]})
    with pytest.raises(InputError, match="no factors"):
        factors.factors_by_place(planted(), images, {})
