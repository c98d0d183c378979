"""Broken twins of heads, saliency and probes: copies with one mistake, which the planted truths reject."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planted import RELAY, SOURCE, marked, planted
from prisma_lens import (
    grad_cam,
    gradient_x_activation,
    head_scores,
    integrated_gradients,
    logit_difference,
    probe,
    rollout,
)
from prisma_lens.heads import key_kinds
from torch import Tensor
from twins import rejects

from prisma_core import HookedViT, TokenLayout

BRIGHT = marked(1.0)
METRIC = ("a bright mark", "a dark mark")
GRID = {  # of patches in a grid of 3 x 3
    "row": lambda q, k: q // 3 == k // 3 and q != k,
    "column": lambda q, k: q % 3 == k % 3 and q != k,
    "local": lambda q, k: q != k and abs(q // 3 - k // 3) <= 1 and abs(q % 3 - k % 3) <= 1,
    "corner": lambda q, k: k in (0, 2, 6, 8),
}


@pytest.fixture(scope="module")
def model() -> HookedViT:
    return planted()


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("row", "(row[:, None] == row) & other", "(column[:, None] == column) & other"),
        ("column", "(column[:, None] == column) & other & same,", "(row[:, None] == row) & other & same,"),
        ("local", "near = torch.maximum(", "near = torch.minimum("),
        ("corner", '"corner": (top & side)', '"corner": (top ^ side)'),
    ],
)
def test_heads_that_attend_to_one_kind(model: HookedViT, kind: str, right: str, wrong: str) -> None:
    mask = torch.tensor([[GRID[kind](q, k) for k in range(9)] for q in range(9)], dtype=torch.float64)

    def attend(pattern: Tensor, at: object) -> None:
        pattern[:, 1, 1:] = 0
        pattern[:, 1, 1:, 1:] = mask / mask.sum(-1, keepdim=True)

    def truth(study: Any) -> None:
        with model.hooks({("pattern", 0): attend}):
            scores = study(model, BRIGHT)
        assert scores.sel(kind=kind, layer="L0", head="H1").values.item() == pytest.approx(1)
        share = (mask.sum(-1) / 10).mean().item()
        assert scores.tensors["baseline"][scores.index("kind", kind)].item() == pytest.approx(share)

    rejects(truth, head_scores, right, wrong)


def test_a_head_with_a_modulus(model: HookedViT) -> None:
    def attend(pattern: Tensor, at: object) -> None:
        pattern[:, 2] = 0
        for query in range(9):
            keys = [1 + key for key in range(9) if key != query and (key - query) % 4 == 0]
            pattern[:, 2, 1 + query, keys] = 1 / len(keys)

    def truth(study: Any) -> None:
        with model.hooks({("pattern", 1): attend}):
            assert study(model, BRIGHT).sel(layer=1, head=2, kind="modulus 4").values.item() == pytest.approx(1)

    rejects(truth, head_scores, "place) % m == 0", "place) % m == 1")


def test_a_head_that_attends_to_all_alike_stands_at_every_baseline(model: HookedViT) -> None:
    def attend(pattern: Tensor, at: object) -> None:
        pattern[:] = 1 / pattern.shape[-1]

    def truth(study: Any) -> None:
        with model.hooks({("pattern", 0): attend}):
            scores = study(model, BRIGHT)
        torch.testing.assert_close(scores.sel(layer=0, head=0).values, scores.tensors["baseline"], rtol=1e-6, atol=1e-6)

    rejects(truth, head_scores, "masks.mean((1, 2))", "masks.mean((0, 1)).mean(0).expand(len(masks))")


def test_a_head_of_earlier_frames() -> None:
    def truth(kinds: Any) -> None:
        video = kinds(TokenLayout(cls=1, frames=2, rows=1, columns=2))
        assert video["previous_frame"].nonzero().tolist() == [[2, 1], [3, 2]]

    rejects(truth, key_kinds, "(frame[:, None] == frame + 1)", "(frame[:, None] + 1 == frame)")


def test_rollout_goes_from_the_class_token_to_the_mark(model: HookedViT) -> None:
    def truth(study: Any) -> None:
        alone = study(model, BRIGHT, residual=0.0, heads=lambda pattern: pattern.amax(1)).sel(pos="cls")
        assert alone.values[0].argmax().item() == SOURCE

    rejects(truth, rollout, "mixed = step @ mixed", "mixed = mixed @ step")


def test_gradient_x_activation_is_exact_where_the_output_is_linear(model: HookedViT) -> None:
    def truth(study: Any) -> None:
        found = study(model, BRIGHT, METRIC, ("resid_post", 1))
        logits = model(BRIGHT)[0] - model.head.bias
        torch.testing.assert_close(found.values.sum(), logits[1] - logits[2])
        assert found.values[0].argmax().item() == 0
        assert study(model, BRIGHT, METRIC, ("resid_pre", 1)).values[0].argmax().item() == RELAY

    rejects(truth, gradient_x_activation, "weighted(cache[name], ", "weighted(cache[name].abs(), ")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("weighted(a - b, ", "weighted(a, "),
        ("mixed = between(b, a, ", "mixed = between(b, b, "),
    ],
)
def test_integrated_gradients_sum_to_the_change(model: HookedViT, right: str, wrong: str) -> None:
    metric = logit_difference(1, 2)

    def truth(study: Any) -> None:
        found = study(model, BRIGHT, metric, baseline="mean", steps=64)
        _, cache = model.run_with_cache(BRIGHT, names="hook_full_embed")
        start = cache["hook_full_embed"].mean(1, keepdim=True).expand(-1, 10, -1)
        change = metric(model(BRIGHT)) - metric(
            model.run_with_hooks(BRIGHT, hooks={"hook_full_embed": lambda x, at: start})
        )
        assert found.values.sum().item() == pytest.approx(change.item(), rel=0.05)

    rejects(truth, integrated_gradients, right, wrong)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("x * grad.mean(list(range(1, 1 + n_places)), keepdim=True)", "x * grad"),
        ("x, grad = cache.patches(name),", "x, grad = cache.patches(name).transpose(1, 2),"),
    ],
)  # fmt: skip
def test_grad_cam_is_its_equation(model: HookedViT, right: str, wrong: str) -> None:
    _, cache = model.run_with_cache(BRIGHT, names=[("resid_pre", 1)])
    stream = cache["resid_pre", 1].requires_grad_()
    logits = model(stream, start_at_layer=1)
    (grad,) = torch.autograd.grad(logits[0, 1] - logits[0, 2], stream)
    by_hand = (stream[0, 1:] @ grad[0, 1:].mean(0)).relu().unflatten(0, (3, 3)).detach()

    def truth(study: Any) -> None:
        found = study(model, BRIGHT, METRIC, ("resid_pre", 1)).values[0]
        torch.testing.assert_close(found, by_hand)
        assert found.flatten().argmax().item() == RELAY - 1

    rejects(truth, grad_cam, right, wrong)


def test_a_probe_never_sees_what_it_is_measured_on(model: HookedViT) -> None:
    """Few images of many dimensions: fitted on everything, shuffled labels would be learned by heart."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    data = [
        (torch.cat([marked(0.4, 2 * seed, 8), marked(-0.4, 2 * seed + 1, 8)]), torch.tensor([1] * 8 + [0] * 8))
        for seed in range(1)
    ]

    def truth(study: Any) -> None:
        found = study(model, data, names=[("resid_post", 1)], tokens="cls", held_out=0.5, seed=1, C=1e6, max_iter=5000)
        assert found.sel(task="probe").values.item() == 1
        assert found.sel(task="control").values.item() < 0.8

    rejects(truth, probe, "solver.fit(scaled[~test.numpy()], y[~test].numpy())", "solver.fit(scaled, y.numpy())")
