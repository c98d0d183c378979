"""Gradients at hook points of every kind: baselines that fit, one number an image, completeness within the gap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import build
from prisma_lens import grad_cam, gradient_x_activation, integrated_gradients, probe, relevance
from prisma_patch import attribution_patch
from torch import Tensor
from twins import rejects

from prisma_core import HookedViT, InputError


@pytest.fixture
def model(in_float64: None) -> HookedViT:
    return build(registers=1)


@pytest.mark.parametrize("at", ["hook_full_embed", ("z", 1), ("pattern", 1), ("resid_post", 0), "hook_embed"])
@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_they_are_complete_within_the_gap_they_state(model: HookedViT, image: Tensor, at: Any, baseline: Any) -> None:
    gaps = list[float]()
    for steps in (20, 200):
        found = integrated_gradients(model, image, 3, at, baseline=baseline, steps=steps)
        gaps.append((found.values.flatten(1).sum(1) - found.tensors["total"]).abs().max().item())
        assert gaps[-1] == pytest.approx(found.facts["gap"], abs=1e-9)
    assert gaps[1] < max(0.1 * gaps[0], 1e-9)  # the midpoint rule's error falls with the square of the steps


def test_the_mean_is_over_tokens_whatever_stands_between(model: HookedViT, image: Tensor) -> None:
    """Heads stand before the tokens of a pattern, and behind those of an output."""

    def truth(study: Any) -> None:
        for at, axis in ((("z", 1), 1), (("pattern", 1), 2), (("resid_pre", 1), 1)):
            _, cache = model.run_with_cache(image, names=at)
            mean = cache[at].mean(axis, keepdim=True).expand_as(cache[at])
            by_hand = integrated_gradients(model, image, 3, at, baseline=mean, steps=3)
            torch.testing.assert_close(study(model, image, 3, at, baseline="mean", steps=3).values, by_hand.values)

    rejects(truth, integrated_gradients, "a.mean(over, keepdim=True)", "a.mean(1, keepdim=True)")


def test_baselines_that_do_not_fit_are_said(model: HookedViT, image: Tensor) -> None:
    with pytest.raises(InputError, match=r"\[3, 8, 18\]"):
        integrated_gradients(model, image, 3, baseline=torch.zeros(2, 8, 18))
    with pytest.raises(InputError, match="no two tokens"):
        integrated_gradients(model, image, 3, "hook_pooled", baseline="mean")
    assert integrated_gradients(model, image, 3, "hook_pooled").axes == ("batch",)


def test_grad_cam_of_heads_is_summed_over_them(model: HookedViT, image: Tensor) -> None:
    def truth(study: Any) -> None:
        _, cache = model.run_with_cache(image, names=("z", 0), loss=lambda out: out[:, 3].sum())
        z, gradient = (each["z", 0][:, 2:].flatten(2) for each in (cache, cache.grad))
        by_hand = (z * gradient.mean(1, keepdim=True)).sum(-1).view(3, 2, 3)
        found = study(model, image, 3, ("z", 0), relu=False)
        assert found.axes == ("batch", "row", "column")
        torch.testing.assert_close(found.values, by_hand)

    rejects(truth, grad_cam, "cam.flatten(1 + n_places).sum(-1)", "cam.flatten(1 + n_places)[..., 0]")


def test_probes_read_vectors_and_tokens_and_no_heads_by_mistake(model: HookedViT) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    images = torch.randn(60, 3, 8, 12, generator=generator).double() + 3 * labels[:, None, None, None]
    found = probe(model, [(images, labels)], ["hook_pooled", ("resid_post", 1)])
    assert found.sel(task="probe").values.gt(0.8).all()
    weight, bias = (found.tensors[f"hook_pooled/{part}"].double() for part in ("weight", "bias"))
    _, cache = model.run_with_cache(images, names="hook_pooled")
    assert ((cache["hook_pooled"] @ weight.T + bias).flatten().gt(0) == labels).float().mean() > 0.8
    for name in ("z", "pattern"):
        with pytest.raises(InputError, match=r"batch .*head"):
            probe(model, [(images, labels)], name)
    with pytest.raises(InputError, match="1 images leave none"):
        probe(model, [(images[:1], labels[:1])])
    with pytest.raises(InputError, match="whole numbers from 0"):
        probe(model, [(images, labels - 1)])


GRADIENTS: dict[str, Callable[..., Any]] = {
    "gradient x activation": gradient_x_activation,
    "integrated gradients": integrated_gradients,
    "Grad-CAM": lambda *given: grad_cam(*given, ("resid_pre", 1)),
    "relevance": relevance,
    "attribution patching": lambda model, image, metric: attribution_patch(model, image, image.flip(0), metric),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_gradient_is_of_one_number_for_each_image(model: HookedViT, image: Tensor, name: str) -> None:
    with pytest.raises(InputError, match=r"one number for each image.*\[3, 7\]"):
        GRADIENTS[name](model, image, lambda logits: logits)
    assert GRADIENTS[name](model, image, lambda logits: logits.sum(1)).values.isfinite().all()
