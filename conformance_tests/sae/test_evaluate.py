"""Measures of coders, against numbers worked out by hand and coders whose measures are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from coders import standard
from models import build
from prisma_sae import CoderFacts, SparseCoder, evaluate, monosemanticity, splice
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from prisma_core import HookedViT, InputError

HOOK, D = "blocks.0.hook_resid_post", 18
LABELS = torch.tensor([0, 3, 6, 2, 1])


def coder(scale: float = 0.2, **about: Any) -> SparseCoder:
    tensors = {name: scale * tensor for name, tensor in standard(0, D, 40).items()}
    facts = CoderFacts(**({"kind": "standard", "d_in": D, "d_sae": 40, "d_out": D, "hook": HOOK} | about))
    return SparseCoder(facts, tensors).double()


def perfect() -> SparseCoder:
    eye = torch.eye(D, dtype=torch.float64)
    tensors = {"W_enc": torch.cat([eye, -eye], 1), "b_enc": torch.zeros(2 * D), "W_dec": torch.cat([eye, -eye])}
    return SparseCoder(CoderFacts(kind="standard", d_in=D, d_sae=2 * D, d_out=D, hook=HOOK), tensors).double()


@pytest.fixture(scope="module")
def model() -> HookedViT:
    return build(registers=1).double()


@pytest.fixture(scope="module")
def images(model: HookedViT) -> Tensor:
    return model.sample_inputs(5, generator=torch.Generator().manual_seed(0))[0].double()


def value(result: Any, name: str) -> float:
    return result.sel(measure=name).values.item()


def test_measures_are_what_they_are_by_hand(model: HookedViT, images: Tensor) -> None:
    one = coder()
    result = evaluate(model, one, images, LABELS, dense=0.5)
    logits, cache = model.run_with_cache(images, names=HOOK)
    x = cache[HOOK].flatten(0, 1)
    f, y = one.encode(x), one(x)
    residual, spread = (x - y).square().sum(-1), (x - x.mean(0)).square().sum(-1)
    frequency = (f > 0).double().mean(0)
    with splice(model, one):
        spliced = model(images)
    zero = model.run_with_hooks(images, hooks={HOOK: lambda x, at: x * 0})
    clean_loss, spliced_loss, zero_loss = (cross_entropy(each, LABELS).item() for each in (logits, spliced, zero))
    expected = {
        "l0": (f > 0).sum(-1).double().mean().item(),
        "l0_cls": (one.encode(cache[HOOK][:, 0]) > 0).sum(-1).double().mean().item(),
        "explained_variance": (1 - residual / spread).mean().item(),
        "explained_variance_total": (1 - residual.sum() / spread.sum()).item(),
        "cosine": cosine_similarity(x, y, dim=-1).mean().item(),
        "dead": (frequency == 0).double().mean().item(),
        "dense": (frequency >= 0.5).double().mean().item(),
        "loss": clean_loss,
        "loss_spliced": spliced_loss,
        "loss_recovered": (zero_loss - spliced_loss) / (zero_loss - clean_loss),
    }
    assert {name: value(result, name) for name in expected} == pytest.approx(expected, rel=1e-9)
    assert abs(expected["explained_variance"] - expected["explained_variance_total"]) > 1e-3
    torch.testing.assert_close(result.tensors["frequency"], frequency.float())


def test_a_perfect_coder_recovers_all_and_one_of_zeros_nothing(model: HookedViT, images: Tensor) -> None:
    result = evaluate(model, perfect(), images, LABELS)
    for name in ("explained_variance", "explained_variance_total", "cosine", "loss_recovered"):
        assert value(result, name) == pytest.approx(1)
    assert value(result, "l0") == pytest.approx(D)
    nothing = evaluate(model, coder(scale=0.0), images, LABELS)
    assert value(nothing, "loss_recovered") == pytest.approx(0)
    assert value(nothing, "dead") == 1


def test_a_coder_of_patches_is_measured_on_patches(model: HookedViT, images: Tensor) -> None:
    result = evaluate(model, coder(tokens="patches"), images)
    assert result.facts["tokens"] == 5 * model.layout.n_patches
    assert "l0_cls" not in result.names("measure")
    assert "loss" not in result.names("measure")


def test_losses_with_and_without_the_logit_scale_differ(model: HookedViT, images: Tensor) -> None:
    class Scaled(HookedViT):
        def forward(self, *inputs: Any, **kwargs: Any) -> Tensor:
            return super().forward(*inputs, **kwargs) * self.logit_scale.exp()

    scaled = Scaled(model.spec).double()
    scaled.load_state_dict(model.state_dict())
    scaled.logit_scale = torch.tensor(3.0, dtype=torch.float64)
    result, plain = evaluate(scaled, coder(), images, LABELS), evaluate(model, coder(), images, LABELS)
    assert value(result, "loss_no_scale") == pytest.approx(value(plain, "loss"))
    assert value(result, "loss_recovered_no_scale") == pytest.approx(value(plain, "loss_recovered"))
    logits = model(images) * torch.tensor(3.0, dtype=torch.float64).exp()
    assert value(result, "loss") == pytest.approx(cross_entropy(logits, LABELS).item())
    assert value(result, "loss") != pytest.approx(value(result, "loss_no_scale"))


def test_monosemanticity_is_the_weighted_mean_of_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    a, e = torch.rand(7, 3, generator=generator, dtype=torch.float64), torch.randn(7, 4, generator=generator).double()
    a[:, 2] = 0
    scaled = (a - a.min(0).values) / (a.max(0).values - a.min(0).values)
    score = monosemanticity(a, e)
    for k in range(2):
        above = below = 0.0
        for n in range(7):
            for m in range(n):
                weight = float(scaled[n, k] * scaled[m, k])
                above += weight * float(cosine_similarity(e[n], e[m], dim=0))
                below += weight
        assert score[k].item() == pytest.approx(above / below)
    assert score[2].isnan()
    # One that fires on images alike has a higher score than one that fires on all.
    clusters = torch.eye(2).repeat_interleave(5, 0) + 0.01 * torch.randn(10, 2, generator=generator)
    fires = torch.stack([torch.tensor([1.0] * 5 + [0.0] * 5), torch.tensor([1.0, 0.9] * 5)], 1)
    fires[0, 1] = 0
    one, all_ = monosemanticity(fires, clusters).tolist()
    assert one > 0.99 > 0.8 > all_


def test_bad_input_is_one_error(model: HookedViT, images: Tensor) -> None:
    with pytest.raises(InputError, match="no image"):
        evaluate(model, coder(), [])
    with pytest.raises(InputError, match=r"5 images, got .*\[2\]"):
        evaluate(model, coder(), images, LABELS[:2])
    with pytest.raises(InputError, match="up to 7"):
        evaluate(model, coder(), images, LABELS + 1)
    with pytest.raises(InputError, match="force=True"):
        evaluate(model, coder(hook="blocks.1.hook_resid_post"), images, hook=HOOK)
    with pytest.raises(InputError, match=r"5 images, got .*\[4, 2\]"):
        evaluate(model, coder(), images, embeddings=torch.ones(4, 2))
