"""The coder that comes with the package: its features fire for the shapes that they are named by."""

from __future__ import annotations

import pytest
import torch
from prisma_sae import load, name_features, splice
from prisma_sae.binding import model_digest
from prisma_sae.naming import precision
from prisma_toy.tasks import task
from torch import Tensor

import prisma_core as prisma
from prisma_core import HookedViT, InputError

LABELS = task("scenes").labels
Scenes = tuple[HookedViT, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    """The model, held-out images, their features at patches, and the class that each patch shows most of."""
    model = prisma.load("toy:scenes-3l")
    drawn = task("scenes").batch(96, "held-out", 7, 0)
    mean, std = (torch.tensor(each)[:, None, None] for each in (model.preprocess.mean, model.preprocess.std))
    images = (drawn.image - mean) / std
    with torch.no_grad(), splice(model, load("scenes-3l")):
        _, cache = model.run_with_cache(images, names="sae.features", output=False)
    assert drawn.patches is not None
    shown = torch.nn.functional.one_hot(drawn.patches.flatten(0, 1).argmax(-1), len(LABELS))
    return model, images, cache["sae.features", 1].flatten(0, 1), shown


def test_it_is_bound_to_the_weights_of_its_model(scenes: Scenes) -> None:
    model, _, _, _ = scenes
    coder = load("scenes-3l")
    assert coder.facts.weights == model_digest(model)
    other = prisma.load("toy:scenes-3l", pretrained=False)
    with pytest.raises(InputError, match="other weights"):
        splice(other, coder)


def test_named_features_fire_for_their_shapes_on_images_never_seen(scenes: Scenes) -> None:
    _, _, features, shown = scenes
    named = {index: LABELS.index(name) for index, name in load("scenes-3l").facts.labels.items()}
    shapes = {index: which for index, which in named.items() if which > 0}
    assert (len(shapes), len(set(shapes.values()))) == (10, 6)  # of eleven shapes
    assert len(named) - len(shapes) == 88  # empty ground, which most patches are
    table = precision(features, shown)
    often = [index for index in shapes if (features[:, index] > 0).sum() >= 10]
    assert len(often) >= 8
    own = torch.stack([table[index, shapes[index]] for index in often])
    assert own.mean() > 0.6
    # The broken twin: the same names, each at another feature.
    moved = sorted(often, key=lambda index: shapes[index])
    twin = [*moved[len(moved) // 2 :], *moved[: len(moved) // 2]]
    wrong = torch.stack([table[index, shapes[other]] for index, other in zip(moved, twin, strict=True)])
    assert wrong.mean() < 0.2


def test_removing_a_shapes_features_takes_its_logit_away(scenes: Scenes) -> None:
    model, images, _, _ = scenes
    coder, square = load("scenes-3l"), LABELS.index("🟦 blue square")
    own = [index for index, name in coder.facts.labels.items() if name == LABELS[square]]
    shown = images[model(images).argmax(1) == square]
    assert len(own) == 4
    assert len(shown) > 0

    def remove(x: Tensor, at: object) -> None:
        x[..., own] = 0

    with torch.no_grad(), splice(model, coder, error_term=True):
        change = model.run_with_hooks(shown, hooks={"sae.features": remove}) - model(shown)
    assert change[:, square].mean() < -1
    assert change[:, square].mean() == change.mean(0).min()  # no other class loses as much


def test_names_need_a_class_a_share_and_enough_tokens() -> None:
    activations = torch.zeros(20, 3)
    activations[:12, 0], activations[:, 1], activations[:5, 2] = 1.0, 1.0, 1.0
    shares = torch.zeros(20, 2)
    shares[:12, 0] = shares[12:, 1] = 1
    assert name_features(activations, shares, ("a", "b")) == {0: "a"}
    assert name_features(activations, shares, ("a", "b"), threshold=0.55) == {0: "a", 1: "a"}
    assert name_features(activations, shares, ("a", "b"), least=5) == {0: "a", 2: "a"}
    with pytest.raises(InputError, match="2 classes, got"):
        name_features(activations, shares, ("a",))
    with pytest.raises(InputError, match=r"of the same tokens, got a Tensor \[20, 3\]"):
        name_features(activations, shares[:3], ("a", "b"))
