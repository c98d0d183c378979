"""Mistakes planted in a preprocessing: the doctor names the fields."""

from __future__ import annotations

from typing import Any

import pytest
from prisma_conformance.doctor.advice import failures
from prisma_conformance.doctor.preprocessing import mended
from prisma_conformance.registry import select

from prisma_core.plugin import Preprocess

pytest.importorskip("timm", reason="timm is not installed: pip install 'prisma-interp[timm]'")

from .table import MUTANTS

RIGHT = Preprocess(size=(24, 32), crop=0.875, interpolation="bicubic", mean=(0.485, 0.456, 0.406), std=(0.3, 0.2, 0.1))
WRONG: list[dict[str, Any]] = [
    {"mean": (0.3, 0.2, 0.1), "std": (0.485, 0.456, 0.406)},  # exchanged
    {"mean": (0.406, 0.456, 0.485)},  # blue first
    {"std": (0.3 * 255, 0.2 * 255, 0.1 * 255)},  # of bytes
    {"interpolation": "bilinear"},
    {"crop": 1.0},
    {"resize": "squash"},
    {"order": "bgr"},
    {"resampling": "torch"},
    {"size": (32, 24)},
    {"interpolation": "lanczos", "crop": 0.95},
    {"resize": "longest", "std": (0.5, 0.5, 0.5)},
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: "-".join(wrong))
def test_the_fields_that_are_wrong_are_named(wrong: dict[str, Any]) -> None:
    said = mended(RIGHT.model_copy(update=wrong), RIGHT.prepared)
    expected = [f"{name}={getattr(RIGHT, name)!r} (it is {value!r})" for name, value in wrong.items()]
    assert said is not None
    assert sorted(said.split(", ")) == sorted(", ".join(expected).split(", "))


IMAGES = [
    ("another crop", "crop=0.9 (it is 1.0)"),
    ("another mean", "mean=(0.4, 0.5, 0.6) (it is (0.5, 0.5, 0.5))"),
]


@pytest.mark.parametrize(("name", "fields"), IMAGES)
def test_the_doctor_says_which_fields_agree(name: str, fields: str) -> None:
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == name)
    (said,) = failures(mutant.subject(), select("preprocess"))
    assert said.endswith(f"To do: it agrees with {fields}.")


def test_a_transform_that_no_field_says_is_left_to_its_author() -> None:
    assert mended(RIGHT, lambda image: RIGHT.prepared(image).square()) is None


def test_fields_are_solved_with_the_channels_in_another_order() -> None:
    bgr = RIGHT.model_copy(update={"order": "bgr"})
    said = mended(bgr.model_copy(update={"mean": (0.1, 0.2, 0.3)}), bgr.prepared)
    assert said == "mean=(0.485, 0.456, 0.406) (it is (0.1, 0.2, 0.3))"
