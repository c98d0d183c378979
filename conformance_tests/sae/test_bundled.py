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

Scenes = tuple[HookedViT, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    """The model, held-out images, their features at patches, and what each patch shows."""
    model = prisma.load("toy:scenes-3l")
    drawn = task("scenes").batch(48, "held-out", 7, 0)
    mean, std = (torch.tensor(each)[:, None, None] for each in (model.preprocess.mean, model.preprocess.std))
    images = (drawn.image - mean) / std
    with torch.no_grad(), splice(model, load("scenes-3l")):
        _, cache = model.run_with_cache(images, names="sae.features", output=False)
    assert drawn.patches is not None
    return model, images, cache["sae.features", 1].flatten(0, 1), drawn.patches.flatten(0, 1)


def test_it_is_bound_to_the_weights_of_its_model(scenes: Scenes) -> None:
    model, _, _, _ = scenes
    coder = load("scenes-3l")
    assert coder.facts.weights == model_digest(model)
    other = prisma.load("toy:scenes-3l", pretrained=False)
    with pytest.raises(InputError, match="other weights"):
        splice(other, coder)


def test_named_features_fire_for_their_shapes_on_images_never_seen(scenes: Scenes) -> None:
    _, _, features, shares = scenes
    labels = load("scenes-3l").facts.labels
    names = task("scenes").labels
    assert len(set(labels.values())) >= 10
    table = precision(features, shares)
    often = [index for index in labels if (features[:, index] > 0).sum() >= 10]
    own = torch.stack([table[index, names.index(labels[index])] for index in often])
    assert len(often) > 50
    assert own.mean() > 0.75
    # The broken twin: the same names, each at another feature.
    moved = [labels[index] for index in [*often[11:], *often[:11]]]
    wrong = torch.stack([table[index, names.index(name)] for index, name in zip(often, moved, strict=True)])
    assert wrong.mean() < 0.5


def test_removing_a_shapes_features_takes_its_logit_away(scenes: Scenes) -> None:
    model, images, _, _ = scenes
    coder, names = load("scenes-3l"), task("scenes").labels
    circle = names.index("💚 green heart")
    own = [index for index, name in coder.facts.labels.items() if name == names[circle]]
    logits = model(images)
    shown = images[logits.argmax(1) == circle]
    assert own
    assert len(shown) > 0

    def remove(x: Tensor, at: object) -> None:
        x[..., own] = 0

    with torch.no_grad(), splice(model, coder, error_term=True):
        before = model(shown)[:, circle]
        after = model.run_with_hooks(shown, hooks={"sae.features": remove})[:, circle]
    assert (before - after).min() > 0
    assert (before - after).mean() > 1


def test_names_need_a_class_a_share_and_enough_tokens() -> None:
    activations = torch.zeros(20, 3)
    activations[:12, 0], activations[:, 1], activations[:5, 2] = 1.0, 1.0, 1.0
    shares = torch.zeros(20, 2)
    shares[:12, 0] = shares[12:, 1] = 1
    assert name_features(activations, shares, ("a", "b")) == {0: "a"}
    assert name_features(activations, shares, ("a", "b"), threshold=0.55) == {0: "a", 1: "a"}
    assert name_features(activations, shares, ("a", "b"), least=5) == {0: "a", 2: "a"}
    with pytest.raises(InputError, match="2 classes, got 1"):
        name_features(activations, shares, ("a",))
    with pytest.raises(InputError, match="20 tokens, got 3"):
        name_features(activations, shares[:3], ("a", "b"))
