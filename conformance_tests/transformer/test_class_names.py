"""Classes by their labels: whole, without the pictogram, by one of several synonyms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prisma_core import HookedViT, UnknownName


def test_a_class_by_its_words(vit: HookedViT, image: Tensor) -> None:
    _, cache = vit.run_with_cache(image)
    vit.labels = ("🔴 red circle", "🟥 red square", "Emu, large", "fox", "⭐ star", "🌟 star", "hen")
    for name, index in (("red circle", 0), ("Red Square", 1), ("emu large", 2), ("🔴 red circle", 0), ("⭐ star", 4)):
        assert torch.equal(cache.logit_constant(name), cache.logit_constant(index)), name
    for name in ("star", "circle"):  # two of them, none of them
        with pytest.raises(UnknownName, match=f"'{name}'"):
            cache.logit_constant(name)
