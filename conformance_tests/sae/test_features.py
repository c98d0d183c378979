"""Features of a spliced coder as activations like any other, on models of every form, compiled ones too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from coders import drawn
from prisma_harvest import Pass, harvest, top_examples
from prisma_lens import probe
from prisma_patch import activation_patch, attribution_patch
from prisma_sae import CoderFacts, SparseCoder, evaluate, load, splice
from prisma_toy import sample_scene
from torch import Tensor
from torch.nn.functional import cross_entropy

import prisma_core as prisma

FEATURES = "blocks.1.hook_resid_post.sae.hook_features"


@pytest.fixture(autouse=True)
def _float32() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def scenes() -> tuple[Any, SparseCoder, Tensor]:
    model = prisma.load("toy:scenes-3l")
    return model, load("scenes-3l"), model.preprocess([sample_scene(seed).image for seed in range(6)])


def test_a_harvest_of_features_is_what_the_coder_encodes(scenes: Any, tmp_path: Any) -> None:
    model, coder, images = scenes
    how: dict[str, Any] = {"preprocess": None, "batch": 3, "workers": 0}
    with splice(model, coder):
        acts = harvest(model, list(images), FEATURES, out=tmp_path, dtype="float32", note="scenes-3l", **how)
        best = top_examples(Pass(model, list(images), FEATURES, note="scenes-3l", **how), FEATURES, 2)
    _, cache = model.run_with_cache(images, names=("resid_post", 1), pos="patches")
    features = coder.encode(cache["resid_post", 1])
    assert torch.allclose(acts.read(FEATURES, 0, 6), features, atol=1e-5)
    largest = features.amax(1).sort(0, descending=True).values[:2].T
    assert torch.allclose(best.values, largest, atol=1e-5)
    assert best.values.max() > 0.5


def test_a_probe_reads_features(scenes: Any) -> None:
    """What is planted into one feature is read from features, and from the stream behind the decoder."""
    model, coder, images = scenes
    labels = torch.arange(6) % 2
    repeated = images.repeat(8, 1, 1, 1)
    truth = labels.repeat(8)

    def plant(x: Tensor, at: Any) -> Tensor:
        y = x.clone()
        y[..., 7] = truth.to(x)[:, None]
        return y

    with splice(model, coder), model.hooks({FEATURES: plant}):
        read = probe(model, [(repeated, truth)], FEATURES, tokens="mean", control=False)
    assert read.values[0, 0] == 1
    weights = read.tensors[f"{FEATURES}/weight"][0]
    assert weights.shape == (coder.facts.d_sae,)
    assert weights[7] > 0


def test_patching_and_its_estimate_take_features(scenes: Any) -> None:
    model, coder, images = scenes
    clean, corrupt = images[:1], images[1:2]
    with splice(model, coder, error_term=True), torch.no_grad():
        whole = activation_patch(model, clean, corrupt, 3, at=FEATURES, over="layer")
        _, cache = model.run_with_cache(corrupt, names=FEATURES)
        patched = model.run_with_hooks(clean, hooks={FEATURES: lambda x, at: cache[FEATURES].to(x)})
        expected = patched[0, 3] - model(clean)[0, 3]
    assert whole.values.flatten()[0] == pytest.approx(float(expected), abs=1e-4)
    assert abs(float(expected)) > 1e-3
    with splice(model, coder, error_term=True):
        estimate = attribution_patch(model, clean, corrupt, 3, at=FEATURES, over="layer")
    assert estimate.values.shape == whole.values.shape
    assert torch.isfinite(estimate.values).all()
    assert estimate.values.abs().max() > 0


def upstream() -> tuple[Any, Tensor, str]:
    model = prisma.load("timm:test_convnext", pretrained=False)
    image = model.sample_inputs(2, generator=torch.Generator().manual_seed(0))[0]
    return model, image, next(name for name in model.hook_points() if name.endswith("blocks.0.hook_resid_post"))


def square(d: int, hook: str) -> SparseCoder:
    eye = torch.eye(d)
    facts = CoderFacts(kind="standard", d_in=d, d_sae=2 * d, d_out=d, hook=hook)
    return SparseCoder(
        facts, {"W_enc": torch.cat([eye, -eye], 1), "b_enc": torch.zeros(2 * d), "W_dec": torch.cat([eye, -eye])}
    )


def test_a_splice_on_a_hooked_upstream_model() -> None:
    """A model without a canonical form: a perfect coder changes nothing, another one does, features are hook points."""
    pytest.importorskip("timm")
    model, image, hook = upstream()
    assert isinstance(model, prisma.HookedUpstream)
    clean, cache = model.run_with_cache(image, names=hook)
    d = cache[hook].shape[-1]
    with splice(model, square(d, hook), force=True):
        logits, inside = model.run_with_cache(image, names="sae.features")
        assert torch.allclose(logits, clean, atol=1e-5)
    name = f"{hook}.sae.hook_features"
    torch.testing.assert_close(inside[name], torch.cat([cache[hook].relu(), (-cache[hook]).relu()], -1))
    tensors = drawn(0, W_enc=(d, 9), b_enc=(9,), W_dec=(9, d))
    other = SparseCoder(CoderFacts(kind="standard", d_in=d, d_sae=9, d_out=d, hook=hook), tensors)
    with splice(model, other, force=True):
        assert (model(image) - clean).abs().max() > 1e-4
        without = model.run_with_hooks(image, hooks={name: lambda x, at: x * 0})
        assert (without - model(image)).abs().max() > 1e-4
    with splice(model, other, error_term=True, force=True):
        assert torch.allclose(model(image), clean, atol=1e-5)
    assert torch.equal(model(image), clean)


@pytest.mark.filterwarnings("ignore")
def test_a_splice_in_a_compiled_model(scenes: Any) -> None:
    model, coder, images = scenes
    model.requires_grad_(False)
    run = torch.compile(model, backend="eager")
    clean = model(images)
    assert torch.allclose(run(images), clean, atol=1e-5)
    with splice(model, coder):
        expected = model(images)
        assert (expected - clean).abs().max() > 1e-2
        assert torch.allclose(run(images), expected, atol=1e-4)
        with model.caching("sae.features") as cache:
            run(images)
        _, eager = model.run_with_cache(images, names="sae.features")
        assert torch.allclose(cache[FEATURES], eager[FEATURES], atol=1e-4)
    assert torch.allclose(run(images), clean, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_transcoder_in_a_compiled_model(scenes: Any) -> None:
    model, coder, images = scenes
    model.requires_grad_(False)
    about = {"kind": "transcoder", "hook": "blocks.1.hook_resid_mid", "tokens": None}
    one = SparseCoder(coder.facts.model_copy(update=about | {"hook_out": "blocks.1.hook_mlp_out"}), coder.tensors())
    run = torch.compile(model, backend="eager")
    clean = run(images)
    with splice(model, one):
        expected = model(images)
        assert (expected - clean).abs().max() > 1e-2
        assert torch.allclose(run(images), expected, atol=1e-4)
        assert torch.allclose(run(images.flip(0)), expected.flip(0), atol=1e-4)


def test_losses_of_a_dual_encoder_have_its_own_scale_and_none() -> None:
    model = prisma.load("toy:clip-scenes")
    texts = model.tokens(["a red circle", "a blue square", "a green triangle"])
    images = model.preprocess([sample_scene(seed).image for seed in range(4)])
    labels = torch.tensor([0, 1, 2, 0])
    hook = "blocks.1.hook_resid_post"
    d = model.vision.spec.d_model
    tensors = {name: 0.2 * x for name, x in drawn(0, W_enc=(d, 64), b_enc=(64,), W_dec=(64, d)).items()}
    coder = SparseCoder(CoderFacts(kind="standard", d_in=d, d_sae=64, d_out=d, hook=hook), tensors)
    result = evaluate(model, coder, images, labels, texts=texts, force=True)
    with torch.no_grad():
        cosines = model.encode_image(images, normalize=True) @ model.encode_text(texts, normalize=True).T
        scaled = model(images, texts)
    said = {name: result.sel(measure=name).values.item() for name in ("loss", "loss_no_scale")}
    assert said["loss"] == pytest.approx(float(cross_entropy(scaled, labels)), rel=1e-4)
    assert said["loss_no_scale"] == pytest.approx(float(cross_entropy(cosines, labels)), rel=1e-3)
    assert said["loss"] != pytest.approx(said["loss_no_scale"], rel=1e-2)
    recovered = [result.sel(measure=name).values.item() for name in ("loss_recovered", "loss_recovered_no_scale")]
    assert recovered[0] != pytest.approx(recovered[1], rel=1e-3)
