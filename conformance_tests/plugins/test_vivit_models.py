"""Video models from loading to predicting: what comes from folders, what is refused, what upstream itself cannot do."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prisma_core as prisma
from prisma_core import HookedViT, InputError, ModelSpec, UnsupportedArchitecture
from prisma_core.conformance import check
from prisma_core.conformance.randomise import randomise
from prisma_core.mapped import HookedUpstream
from prisma_core.plugins import host
from prisma_core.spec import PoolSpec, RopeCount
from prisma_core.video import VideoPreprocess
from prisma_core.weights import WeightMap

transformers: Any = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'prisma-interp[video]'"
)

from prisma_vivit import Predictor, cases  # noqa: E402

FACTS: dict[str, dict[str, Any]] = {
    "Vivit": cases.VIVIT,
    "VideoMAE": cases.VIDEOMAE,
    "VJEPA2": cases.VJEPA2,
    "Timesformer": cases.TIMESFORMER,
}


def main_output(upstream: Any, video: torch.Tensor) -> torch.Tensor:
    """Return the logits, or all tokens of a model without a head."""
    output = upstream(video)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def drawn(kind: str, **facts: Any) -> nn.Module:
    """Return a model of one of transformers' classes in float64, every parameter random."""
    family = next(name for name in FACTS if kind.startswith(name))
    upstream = cases.small(kind, **{**FACTS[family], **facts}).double()
    return randomise(upstream, torch.Generator().manual_seed(0))


def video(upstream: Any, frames: int | None = None, size: tuple[int, int] | None = None) -> Tensor:
    config = upstream.config
    channels = getattr(config, "num_channels", None) or config.in_chans
    n = frames or getattr(config, "num_frames", None) or config.frames_per_clip
    native = getattr(config, "image_size", None) or config.crop_size
    native = (native, native) if isinstance(native, int) else native
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, n, channels, *(size or native), generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- every class


def test_every_class_of_the_four_families_has_a_case_or_is_refused() -> None:
    proven = {case.name.partition(" ")[0] for case, plugin in host().cases() if plugin == "vivit"}
    classes: set[str] = set()
    for family in ("vivit", "videomae", "vjepa2", "timesformer"):
        module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["__all__"])
        classes |= {name for name in module.__all__ if not name.endswith("PreTrainedModel")}
    assert classes - proven == {"VideoMAEForPreTraining"}
    assert proven - classes == {"VJEPA2Predictor"}


def test_the_decoder_is_refused_and_its_encoder_comes_in() -> None:
    upstream = drawn("VideoMAEForPreTraining", patch_size=4, decoder_hidden_size=24, decoder_num_attention_heads=2)
    with pytest.raises(
        UnsupportedArchitecture, match=r"a decoder that fills in masked patches; adapt\(model\.videomae"
    ):
        prisma.adapt(upstream)
    x = video(upstream)
    encoder = upstream.get_submodule("videomae")
    torch.testing.assert_close(prisma.adapt(encoder)(x), encoder(x).last_hidden_state, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["VivitModel", "VivitForVideoClassification", "VJEPA2Model"])
def test_in_float32_logits_are_upstreams_to_the_bit(kind: str) -> None:
    # ViViT's own default activation is written out step by step upstream, and fused here.
    facts = {"hidden_act": "gelu"} if kind.startswith("Vivit") else {}
    upstream = drawn(kind, **facts).float()
    x = video(upstream).float()
    with torch.no_grad():
        assert torch.equal(prisma.adapt(upstream)(x), main_output(upstream, x))


@pytest.mark.parametrize(("act", "kind"), [("gelu_fast", "gelu_tanh"), ("gelu_new", "gelu_tanh"), ("relu", "relu")])
def test_the_activation_is_what_was_built(act: str, kind: str) -> None:
    upstream = drawn("VivitModel", hidden_act=act)
    model = prisma.adapt(upstream)
    assert {block.mlp.act for block in model.spec.blocks} == {kind}
    x = video(upstream)
    torch.testing.assert_close(model(x), upstream(x).last_hidden_state, rtol=0, atol=1e-10)


def test_an_activation_of_another_kind_is_refused() -> None:
    with pytest.raises(UnsupportedArchitecture, match="its activation function"):
        prisma.adapt(drawn("VivitModel", hidden_act="mish"))


def test_frames_left_over_by_tubelets_are_dropped_as_upstream_drops_them() -> None:
    upstream = drawn("VivitModel", num_frames=7)
    model = prisma.adapt(upstream)
    assert model.spec.n_frames == 6
    x = video(upstream)
    torch.testing.assert_close(model(x[:, :6]), upstream(x).last_hidden_state, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["VivitModel", "VJEPA2ForVideoClassification"])
def test_showing_attention_step_by_step_leaves_upstream_as_it_was(kind: str) -> None:
    upstream: Any = drawn(kind)
    before = {name: dict(vars(part.config)) for name, part in upstream.named_modules() if hasattr(part, "config")}
    adapter = host().adapter(upstream)
    x = video(upstream)
    clean = main_output(upstream, x)
    with adapter.explicit(upstream):
        assert upstream.config._attn_implementation == "eager"
        torch.testing.assert_close(main_output(upstream, x), clean, rtol=0, atol=1e-12)
    with pytest.raises((ValueError, RuntimeError)), adapter.explicit(upstream):
        upstream(x[..., :3])
    after = {name: dict(vars(part.config)) for name, part in upstream.named_modules() if hasattr(part, "config")}
    assert after == before
    assert torch.equal(main_output(upstream, x), clean)


def test_videos_shorter_than_a_tubelet_are_refused() -> None:
    with pytest.raises(UnsupportedArchitecture, match="videos shorter than a tubelet"):
        prisma.adapt(drawn("VJEPA2Model", frames_per_clip=1))


# ---------------------------------------------------------------- mistakes that must be caught


def _untiled(spec: ModelSpec) -> ModelSpec:
    assert spec.rope is not None
    assert isinstance(spec.rope.grid, RopeCount)
    grid = spec.rope.grid.model_copy(update={"tiled": False})
    return spec.model_copy(update={"rope": spec.rope.model_copy(update={"grid": grid})})


def _column_by_column(spec: ModelSpec) -> ModelSpec:
    assert spec.rope is not None
    assert isinstance(spec.rope.grid, RopeCount)
    grid = spec.rope.grid.model_copy(update={"rows": 1, "columns": 4})
    return spec.model_copy(update={"rope": spec.rope.model_copy(update={"grid": grid})})


def _mean_of_tokens(spec: ModelSpec) -> ModelSpec:
    return spec.model_copy(update={"pool": PoolSpec(kind="avg", with_prefix=True)})


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [
        ("VJEPA2Model", _untiled),
        ("VJEPA2Model", _column_by_column),
        ("VivitForVideoClassification", _mean_of_tokens),
        ("VideoMAEForVideoClassification (first token)", _mean_of_tokens),
    ],
)
def test_a_wrong_fact_is_caught(kind: str, mistake: Callable[[ModelSpec], ModelSpec]) -> None:
    case = next(case for case in cases.cases() if case.name == kind)
    adapter = copy.copy(host().adapter(case.build()))
    right = adapter.spec
    adapter.spec = lambda upstream: mistake(right(upstream))  # type: ignore[method-assign]
    (certificate,) = check(case, adapter=adapter, checks="parity.logits").certificates
    assert not certificate.results[0].passed
    assert "logits differ by" in certificate.results[0].detail, "by its numbers, not by an error"


def test_frames_backwards_are_caught() -> None:
    case = next(case for case in cases.cases() if case.name == "VivitModel")
    adapter = copy.copy(host().adapter(case.build()))
    right = adapter.weights

    def weights(upstream: Any, spec: Any) -> WeightMap:
        table = right(upstream, spec)
        rules = [
            dataclasses.replace(rule, how="{flip}") if rule.targets == ("embed.proj.{*}",) else rule
            for rule in table.rules
        ]
        flip = {"flip": lambda x: x.flip(2) if x.ndim == 5 else x}
        return dataclasses.replace(table, rules=tuple(rules), functions=flip)

    adapter.weights = weights  # type: ignore[method-assign]
    (certificate,) = check(case, adapter=adapter, checks="parity.logits").certificates
    assert not certificate.results[0].passed
    assert "logits differ by" in certificate.results[0].detail, "by its numbers, not by an error"


# ---------------------------------------------------------------- other sizes


def test_upstreams_own_resizing_of_vivit_fails_so_one_size_is_taken() -> None:
    """It shapes positions of all frames to one square. If this test fails, upstream mended it: take other sizes."""
    upstream = drawn("VivitModel", image_size=[16, 16], num_frames=8)  # 4 frames of 4 x 4 patches: 8 x 8 in a square
    for size in ((24, 24), (16, 24), (24, 16)):
        with pytest.raises(RuntimeError):
            upstream(video(upstream, size=size), interpolate_pos_encoding=True)
        with pytest.raises(InputError, match="takes one size"):
            prisma.adapt(upstream)(video(upstream, size=size))


@pytest.mark.parametrize("frames", [2, 4, 6, 10])
@pytest.mark.parametrize("size", [(8, 8), (16, 16), (12, 4), (4, 20)])
def test_vjepa2_takes_other_lengths_and_sizes(frames: int, size: tuple[int, int]) -> None:
    upstream = drawn("VJEPA2Model")
    x = video(upstream, frames, size)
    model = prisma.adapt(upstream)
    torch.testing.assert_close(model(x), upstream(x).last_hidden_state, rtol=0, atol=1e-10)
    assert model.layout_of(x).frames == frames // 2


# ---------------------------------------------------------------- V-JEPA 2's predictor


def test_the_predictor_reads_what_the_encoder_makes() -> None:
    upstream = drawn("VJEPA2Model")
    x = video(upstream)
    encoder, predictor = prisma.adapt(upstream), prisma.adapt(Predictor(upstream))
    predicted, cache = predictor.run_with_cache(encoder(x))
    torch.testing.assert_close(predicted, upstream(x).predictor_output.last_hidden_state, rtol=0, atol=1e-10)
    n = encoder.layout.n_tokens
    assert cache["pattern", 1].shape == (2, 2, 2 * n, 2 * n)
    assert cache["pooled"].shape == (2, n, upstream.config.pred_hidden_size)


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_predictor_fills_in_what_is_not_seen(wrapped: bool) -> None:
    upstream = drawn("VJEPA2Model")
    x = video(upstream)
    seen = [torch.stack([torch.randperm(12)[:7] for _ in range(2)])]
    asked = [torch.stack([torch.arange(12)[3:8], torch.arange(12)[5:10]])]
    expected = upstream(x, context_mask=seen, target_mask=asked).predictor_output.last_hidden_state
    predictor = prisma.adapt(Predictor(upstream) if wrapped else upstream.get_submodule("predictor"))
    encoded = prisma.adapt(upstream)(x)
    given: dict[str, Any] = {"context_mask": seen, "target_mask": asked}
    predicted = predictor(encoded, **given)
    torch.testing.assert_close(predicted, expected, rtol=0, atol=1e-10)
    edited = predictor.run_with_hooks(encoded, hooks={("resid_post", 0): lambda x, at: 0 * x}, **given)
    assert not torch.allclose(edited, predicted)


def test_attention_that_was_set_to_run_step_by_step_is_seen_too() -> None:
    upstream: Any = drawn("VJEPA2ForVideoClassification")
    x = video(upstream)
    _, fused = prisma.adapt(upstream).run_with_cache(x, names="pattern")
    upstream.config._attn_implementation = "eager"
    logits, cache = prisma.adapt(upstream.float()).run_with_cache(x.float(), names="pattern")
    assert list(cache) == list(fused)
    for name in cache:
        torch.testing.assert_close(cache[name].double(), fused[name], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits, upstream(x.float()).logits)


# ---------------------------------------------------------------- from folders

SAVED: dict[str, tuple[dict[str, Any], str]] = {
    "VivitForVideoClassification": ({"num_channels": 3, "image_size": 40}, "VivitImageProcessor"),
    "VideoMAEForVideoClassification": ({"num_channels": 3, "image_size": 40}, "VideoMAEImageProcessorPil"),
    "VJEPA2Model": ({"in_chans": 3, "crop_size": 40}, "VJEPA2VideoProcessor"),
    "VJEPA2ForVideoClassification": ({"in_chans": 3, "crop_size": 40}, "VJEPA2VideoProcessor"),
    "TimesformerForVideoClassification": ({"num_channels": 3, "image_size": 40}, "VideoMAEImageProcessorPil"),
}


@pytest.mark.parametrize("kind", SAVED)
def test_a_folder_that_transformers_wrote_is_loaded_with_its_preprocessing(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("prisma_hf")
    facts, processor = SAVED[kind]
    drawn(kind, **facts).float().save_pretrained(tmp_path)
    upstream = getattr(transformers, kind).from_pretrained(tmp_path).eval()  # eps is the configuration's again
    cases.processor(processor).save_pretrained(tmp_path)
    model = prisma.load(f"hf:{tmp_path}")
    assert isinstance(model, HookedViT | HookedUpstream)
    assert isinstance(model.preprocess, VideoPreprocess)
    pixels = np.random.default_rng(0).integers(0, 256, (11, 50, 60, 3)).astype(np.uint8)
    x = model.preprocess(pixels)
    assert x.shape == (1, model.preprocess.frames, 3, 40, 40)
    theirs = transformers.AutoVideoProcessor.from_pretrained(tmp_path)
    indices = [index * 11 // x.shape[1] for index in range(x.shape[1])]
    made = theirs(pixels[indices], return_tensors="pt")
    expected = made["pixel_values"] if "pixel_values" in made else made["pixel_values_videos"]
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(x), main_output(upstream, x), rtol=1e-4, atol=1e-5)
