"""prisma_lens' heads, saliency and probes, each against a planted truth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from planted import COPIES, READS, RELAY, SOURCE, marked, planted
from planted_dual import planted_dual
from prisma_lens import (
    captum_inputs,
    grad_cam,
    gradient_x_activation,
    head_scores,
    integrated_gradients,
    logit_difference,
    logit_lens,
    probe,
    relevance,
    rollout,
)
from prisma_lens.heads import key_kinds
from torch import Tensor

from prisma_core import HookedViT, InputError, NotApplicable, TokenLayout, UnknownName

BRIGHT = marked(1.0)
METRIC = ("a bright mark", "a dark mark")


@pytest.fixture(scope="module")
def model() -> HookedViT:
    return planted()


# -------------------------------------------------------------------- heads

KEYS: dict[str, Callable[[int, int], bool]] = {  # of patches in a grid of 3 x 3, by hand
    "self": lambda q, k: q == k,
    "corner": lambda q, k: k in (0, 2, 6, 8),
    "edge": lambda q, k: k != 4,
    "row": lambda q, k: q // 3 == k // 3 and q != k,
    "column": lambda q, k: q % 3 == k % 3 and q != k,
    "local": lambda q, k: q != k and abs(q // 3 - k // 3) <= 1 and abs(q % 3 - k % 3) <= 1,
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_head_that_attends_to_one_kind_scores_one_there(model: HookedViT, kind: str) -> None:
    mask = torch.tensor([[KEYS[kind](q, k) for k in range(9)] for q in range(9)], dtype=torch.float64)

    def attend(pattern: Tensor, at: object) -> None:
        pattern[:, 1, 1:] = 0
        pattern[:, 1, 1:, 1:] = mask / mask.sum(-1, keepdim=True)

    with model.hooks({("pattern", 0): attend}):
        scores = head_scores(model, BRIGHT)
    assert scores.sel(kind=kind, layer="L0", head="H1").values.item() == pytest.approx(1)
    share = (mask.sum(-1) / 10).mean().item()
    assert scores.tensors["baseline"][scores.index("kind", kind)].item() == pytest.approx(share)
    assert scores.sel(kind=kind, layer="L0", head="H0").values.item() < 0.99


def test_the_class_token_and_a_modulus_are_found(model: HookedViT) -> None:
    def attend(pattern: Tensor, at: object) -> None:
        pattern[:, 0] = 0
        pattern[:, 0, :, 0] = 1
        pattern[:, 2] = 0
        for query in range(9):
            keys = [1 + key for key in range(9) if key != query and (key - query) % 4 == 0]
            pattern[:, 2, 1 + query, keys] = 1 / len(keys)

    with model.hooks({("pattern", 1): attend}):
        scores = head_scores(model, BRIGHT)
    assert scores.sel(kind="cls", layer=1, head=0).values.item() == pytest.approx(1)
    assert scores.sel(kind="modulus 4", layer=1, head=2).values.item() == pytest.approx(1)
    assert scores.sel(kind="modulus 3", layer=1, head=2).values.item() < 0.1


def test_earlier_frames_have_a_score_in_videos_alone() -> None:
    video = key_kinds(TokenLayout(cls=1, frames=2, rows=1, columns=2))
    assert video["previous_frame"].nonzero().tolist() == [[2, 1], [3, 2]]
    by_patch = key_kinds(TokenLayout(frames=2, rows=1, columns=2, order="row column frame"))
    assert by_patch["previous_frame"].nonzero().tolist() == [[1, 0], [3, 2]]
    assert "previous_frame" not in key_kinds(TokenLayout(rows=2, columns=2))


def test_rollout_follows_the_mark_to_the_class_token(model: HookedViT) -> None:
    mixed = rollout(model, BRIGHT)
    torch.testing.assert_close(mixed.values.sum(-1), torch.ones_like(mixed.values[..., 0]))
    _, cache = model.run_with_cache(BRIGHT, names="pattern")
    steps = [0.5 * torch.eye(10) + 0.5 * cache["pattern", layer].mean(1)[0] for layer in range(2)]
    torch.testing.assert_close(mixed.values[0], steps[1] @ steps[0])
    alone = rollout(model, BRIGHT, residual=0.0, heads=lambda pattern: pattern.amax(1)).sel(pos="cls")
    assert alone.values[0].argmax().item() == SOURCE


# -------------------------------------------------------------------- saliency


def test_saliency_finds_where_the_mark_is(model: HookedViT) -> None:
    for study in (gradient_x_activation, integrated_gradients):
        assert study(model, BRIGHT, METRIC, ("resid_pre", 1)).values[0].argmax().item() == RELAY
    cam = grad_cam(model, BRIGHT, METRIC, ("resid_pre", 1)).values[0]
    assert cam.flatten().argmax().item() == RELAY - 1


def test_integrated_gradients_are_complete_within_their_stated_gap(model: HookedViT) -> None:
    metric = logit_difference(1, 2)
    for baseline in ("zero", "mean", 0.3 * torch.randn(1, 10, model.spec.d_model, dtype=torch.float64)):
        saliency = integrated_gradients(model, BRIGHT, METRIC, baseline=baseline, steps=64)
        _, cache = model.run_with_cache(BRIGHT, names="hook_full_embed")
        a = cache["hook_full_embed"]
        start = (
            torch.zeros_like(a)
            if baseline == "zero"
            else a.mean(1, keepdim=True).expand_as(a)
            if baseline == "mean"
            else baseline
        )
        from_start = metric(model.run_with_hooks(BRIGHT, hooks={"hook_full_embed": lambda x, at, s=start: s}))
        change = (metric(model(BRIGHT)) - from_start).item()
        assert abs(saliency.values.sum().item() - change) <= saliency.facts["gap"] + 1e-9
        assert saliency.facts["gap"] < 0.05 * max(1.0, abs(change))


def test_integrated_gradients_agree_with_captums(model: HookedViT) -> None:
    attr = pytest.importorskip("captum.attr", reason="captum is not installed")
    metric = logit_difference(1, 2)
    _, cache = model.run_with_cache(BRIGHT, names=("resid_pre", 0))
    stream = cache["resid_pre", 0]
    theirs = attr.IntegratedGradients(lambda x: metric(model(x, start_at_layer=0))).attribute(
        stream, baselines=torch.zeros_like(stream), n_steps=16, method="riemann_middle"
    )
    ours = integrated_gradients(model, BRIGHT, METRIC, ("resid_pre", 0), steps=16)
    torch.testing.assert_close(ours.values, theirs.sum(-1), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("relu", [True, False])
def test_grad_cam_agrees_with_captums(model: HookedViT, relu: bool) -> None:
    attr = pytest.importorskip("captum.attr", reason="captum is not installed")
    _, cache = model.run_with_cache(BRIGHT, names=("resid_pre", 1))
    stream = cache["resid_pre", 1]

    class Grid(torch.nn.Module):
        """The model behind a layer whose output is a grid of channels, as captum's Grad-CAM takes them."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Identity()

        def forward(self, grid: Tensor) -> Tensor:
            return model(torch.cat([stream[:, :1], self.layer(grid).flatten(2).mT], 1), start_at_layer=1)

    grid, net = stream[:, 1:].mT.unflatten(2, (3, 3)), Grid()
    theirs = attr.LayerGradCam(net, net.layer).attribute(grid, target=1, relu_attributions=relu)
    ours = grad_cam(model, BRIGHT, METRIC[0], ("resid_pre", 1), relu=relu)
    torch.testing.assert_close(ours.values, theirs[:, 0], rtol=1e-8, atol=1e-10)
    assert ours.values.abs().max() > 1e-3


def test_of_a_dual_encoder_the_vision_tower_is_read() -> None:
    clip = planted_dual()
    images = torch.cat([BRIGHT, marked(-1.0)])
    tokens = clip.tokens(["a bright mark", "a dark mark"])
    assert torch.equal(head_scores(clip, images).values, head_scores(clip.vision, images).values)
    assert torch.equal(rollout(clip, images).values, rollout(clip.vision, images).values)
    read = clip.encode_text(tokens).detach()

    def difference(seen: Tensor) -> Tensor:
        logits = clip.compare(seen, read)
        return logits[:, 0] - logits[:, 1]

    at = ("resid_pre", 1)
    for study, options in (
        (gradient_x_activation, {}),
        (integrated_gradients, {"steps": 4}),
        (grad_cam, {}),
    ):
        whole = study(clip, (images, tokens), (0, 1), f"vision.blocks.{at[1]}.hook_resid_pre", **options)
        tower = study(clip.vision, images, difference, at, **options)
        torch.testing.assert_close(whole.values, tower.values)
        assert whole.axes == tower.axes
        assert whole.labels == tower.labels
        assert whole.values.abs().max() > 1e-5
    torch.testing.assert_close(
        relevance(clip, (images, tokens), (0, 1)).values, relevance(clip.vision, images, difference).values
    )
    forward, activation = captum_inputs(clip, (images, tokens), (0, 1), "vision.blocks.1.hook_resid_pre")
    torch.testing.assert_close(forward(activation), difference(clip.vision(images)))
    with pytest.raises(NotApplicable, match=r"take a hook point of vision\."):
        captum_inputs(clip, (images, tokens), (0, 1), "text.blocks.0.hook_resid_pre")
    words = gradient_x_activation(clip, (images, tokens), lambda logits: logits[:, 0], "text.hook_full_embed")
    assert words.values.shape == (2, 2)
    assert words.values[0].abs().max() > 10 * words.values[1].abs().max(), "the first text alone is read"


def test_a_probe_of_a_dual_encoder_is_one_of_its_vision_tower() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    clip = planted_dual()
    images = torch.cat([marked(0.4, 0, 8), marked(-0.4, 1, 8)])
    data = [(images, torch.tensor([1] * 8 + [0] * 8))]
    found = probe(clip, data, names=[("resid_post", 1)], tokens="cls", control=False)
    assert found.values.item() == 1
    assert probe(clip.vision, data, names=[("resid_post", 1)], tokens="cls", control=False).facts == found.facts
    lens = logit_lens(clip, images, found)
    assert (lens.sel(pos="cls", layer="L1").values[:, 0] > 0).tolist() == [True] * 8 + [False] * 8


def test_saliency_says_what_it_cannot(model: HookedViT) -> None:
    with pytest.raises(NotApplicable, match="earlier layer"):
        grad_cam(model, BRIGHT, METRIC, ("resid_post", -1))
    with pytest.raises(UnknownName, match="2 hook points"):
        gradient_x_activation(model, BRIGHT, METRIC, "resid_pre")
    with pytest.raises(InputError, match="Expected a baseline"):
        integrated_gradients(model, BRIGHT, METRIC, baseline=torch.zeros(3))


# -------------------------------------------------------------------- probes


def data(batches: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Images with a bright or a dark mark, by label."""
    found = []
    for seed in range(batches):
        bright, dark = marked(0.4, 2 * seed, batch=8), marked(-0.4, 2 * seed + 1, batch=8)
        found.append((torch.cat([bright, dark]), torch.tensor([1] * 8 + [0] * 8)))
    return found


def test_a_probe_reads_the_mark_where_it_has_been_copied(model: HookedViT) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    result = probe(model, data(), names=["resid_post"], tokens="cls")
    assert result.sel(place="L1", task="probe").values.item() == 1.0
    assert result.sel(place="L1", task="control").values.item() < 0.8
    early = probe(model, data(), names=[("resid_pre", 0)], tokens="cls")  # before anything reached the class token
    assert early.sel(task="probe").values.item() < 0.8
    weight, bias = result.tensors["blocks.1.hook_resid_post/weight"], result.tensors["blocks.1.hook_resid_post/bias"]
    _, cache = model.run_with_cache(torch.cat([marked(0.4, 99), marked(-0.4, 98)]), names=("resid_post", 1))
    said = (cache["resid_post", 1][:, 0].float() @ weight.T + bias).flatten()
    assert said[0] > 0 > said[1]


def test_probes_of_patches_take_labels_of_patches(model: HookedViT) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    labels = torch.zeros(16, 9, dtype=torch.long)
    labels[:, 0] = 1
    pairs = [(images, labels) for images, _ in data(3)]
    result = probe(model, pairs, names=("resid_pre", 0), tokens="patches", control=False)
    assert result.values.item() == 1.0
    with pytest.raises(InputError, match=r"\[16, 9\]"):
        probe(model, data(1), names=("resid_pre", 0), tokens="patches")
    with pytest.raises(InputError, match="no data"):
        probe(model, [])


def test_the_truth_is_the_planted_one(model: HookedViT) -> None:
    """The heads these tests rely on are the ones that carry the mark."""
    _, cache = model.run_with_cache(BRIGHT, names="pattern")
    assert cache["pattern", COPIES[0]][0, COPIES[1], RELAY].argmax().item() == SOURCE
    assert cache["pattern", READS[0]][0, READS[1], 0].argmax().item() == RELAY
