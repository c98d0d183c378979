"""Classes by their labels: whole, without the pictogram, by one of several synonyms."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from prisma_core import HookedViT, InputError, UnknownName


def test_a_class_by_its_words(vit: HookedViT, image: Tensor) -> None:
    _, cache = vit.run_with_cache(image)
    vit.labels = ("🔴 red circle", "🟥 red square", "Emu, large", "fox", "⭐ star", "🌟 star", "hen")
    for name, index in (("red circle", 0), ("Red Square", 1), ("emu large", 2), ("🔴 red circle", 0), ("⭐ star", 4)):
        assert torch.equal(cache.logit_constant(name), cache.logit_constant(index)), name
    for name in ("star", "circle"):  # two of them, none of them
        with pytest.raises(UnknownName, match=f"'{name}'"):
            cache.logit_constant(name)


def test_labels_are_a_text_for_each_class(vit: HookedViT) -> None:
    names = ("cat", "dog", "emu", "fox", "gnu", "hen", "ibex")
    for value in (names, list(names), np.array(names), iter(names)):
        vit.labels = value  # type: ignore[assignment]
        assert vit.labels == names
    for wrong in ("cat", 3, names[:6], (*names[:6], 7), set(names), dict(enumerate(names)), torch.arange(7), object()):
        with pytest.raises(InputError, match="labels"):
            vit.labels = wrong  # type: ignore[assignment]
        assert vit.labels == names
    vit.labels = None
    assert vit.labels is None


def test_a_preprocess_is_a_function_and_a_module_is_no_part_of_the_model(vit: HookedViT) -> None:
    for wrong in ("resize", 3, {"size": 8}, torch.zeros(3)):
        with pytest.raises(InputError, match=r"model\.preprocess as a function, or None, got"):
            vit.preprocess = wrong
    parameters = len(list(vit.parameters()))
    for module in (torch.nn.Linear(3, 3), torch.nn.Identity()):  # torchvision's transforms are modules
        vit.preprocess = module
        assert vit.preprocess is module
        assert len(list(vit.parameters())) == parameters
    assert copy.deepcopy(vit).preprocess is not vit.preprocess
