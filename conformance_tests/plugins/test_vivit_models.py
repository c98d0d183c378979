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
from prisma_conformance import check
from prisma_conformance.randomise import randomise
from torch import Tensor, nn

import prisma_core as prisma
from prisma_core import HookedViT, InputError, ModelSpec, UnknownName, UnsupportedArchitecture
from prisma_core.host import installed
from prisma_core.inputs.video import VideoPreprocess
from prisma_core.maps.weights import WeightMap
from prisma_core.spec import PoolSpec, RopeCount
from prisma_core.upstream.model import HookedUpstream

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
    proven = {case.name.partition(" ")[0] for case, plugin in installed().cases() if plugin == "vivit"}
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
    adapter = installed().adapter(upstream)
    x = video(upstream)
    clean = main_output(upstream, x)
    with adapter.unfused_attention(upstream):
        assert upstream.config._attn_implementation == "eager"
        torch.testing.assert_close(main_output(upstream, x), clean, rtol=0, atol=1e-12)
    with pytest.raises((ValueError, RuntimeError)), adapter.unfused_attention(upstream):
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
    adapter = copy.copy(installed().adapter(case.build()))
    right = adapter.spec
    adapter.spec = lambda upstream: mistake(right(upstream))  # type: ignore[method-assign]
    (certificate,) = check(case, adapter=adapter, checks="parity.logits").certificates
    assert not certificate.results[0].passed
    assert "logits differ by" in certificate.results[0].detail, "by its numbers, not by an error"


def test_frames_backwards_are_caught() -> None:
    case = next(case for case in cases.cases() if case.name == "VivitModel")
    adapter = copy.copy(installed().adapter(case.build()))
    right = adapter.weights

    def flip(x: torch.Tensor) -> torch.Tensor:
        return x.flip(2) if x.ndim == 5 else x

    def weights(upstream: Any, spec: Any) -> WeightMap:
        table = right(upstream, spec)
        rules = [
            dataclasses.replace(rule, how="{flip}", call=flip) if rule.targets == ("embed.proj.{*}",) else rule
            for rule in table.rows
        ]
        return dataclasses.replace(table, rows=tuple(rules))

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
    assert model.layout_for(x).frames == frames // 2


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


# ---------------------------------------------------------------- maps by time


def touched(upstream: Any, model: HookedUpstream, frame: int, row: int, column: int) -> tuple[Any, Any]:
    """Return the caches of a video, and of the same one with a patch of a frame painted over."""
    x = video(upstream)
    painted = x.clone()
    painted[:, frame, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 3
    return model.run_with_cache(x)[1], model.run_with_cache(painted)[1]


@pytest.mark.parametrize("place", [(0, 0, 1), (2, 1, 0), (3, 1, 2)])
@pytest.mark.parametrize("attention", ["divided_space_time", "joint_space_time", "space_only"])
def test_timesformers_views_find_the_patch_that_was_painted_over(attention: str, place: tuple[int, int, int]) -> None:
    upstream = drawn("TimesformerForVideoClassification", attention_type=attention)
    clean, painted = touched(upstream, prisma.adapt(upstream), *place)
    names = ["embed", "full_embed", ("resid_pre", 0)]
    names += [("ln_time.normalized", 0), ("time.q", 0)] if attention.startswith("divided") else [("ln1.normalized", 0)]
    for query in names:
        given = (query,) if isinstance(query, str) else query
        grid, other = clean.patches(*given), painted.patches(*given)
        assert grid.shape[:4] == (2, 4, 3, 3), query
        moved = (grid != other).flatten(4).any(-1).any(0)
        assert moved.nonzero().tolist() == [list(place)], query
        for frame in (0, 1, 2, -1):
            torch.testing.assert_close(clean.frame(frame, *given), grid[:, frame], rtol=0, atol=0)


def test_patterns_by_time_are_those_of_the_two_attentions() -> None:
    upstream = drawn("TimesformerForVideoClassification")
    model = prisma.adapt(upstream)
    assert model.layout.order == "row column frame"
    _, cache = model.run_with_cache(video(upstream))
    time, space = cache["time.pattern", 0], cache["space.pattern", 0]
    assert time.shape == (2, 9, 3, 4, 4)
    read = cache.frame(1, "time.pattern", 0, axis="key_frame")  # what each frame of a patch reads in frame 1
    assert torch.equal(read, time[..., 1].unflatten(1, (3, 3)))
    assert torch.equal(cache.patches("time.pattern", 0), time.unflatten(1, (3, 3)))
    within = cache.frame(2, "space.pattern", 0, axis="key_pos")
    assert torch.equal(within, space[:, 2, :, :, 1:].unflatten(-1, (3, 3)))
    assert torch.equal(cache.cls("space.pattern", 0, axis="query_pos"), space[..., 0, :])
    assert cache.patches("space.pattern", 0, axis="key_pos").shape == (2, 3, 10, 4, 3, 3)
    assert torch.equal(cache.cls("resid_post", 1), cache["resid_post", 1][:, 0])
    with pytest.raises(InputError, match="has two frame axes: give axis='query_frame' or axis='key_frame'"):
        cache.frame(1, "time.pattern", 0)
    with pytest.raises(InputError, match="no 'key_pos' among them"):
        cache.frame(1, "time.pattern", 0, axis="key_pos")
    with pytest.raises(UnknownName, match="frames of patches run from 0 to 3"):
        cache.frame(4, "time_out", 0)
    with pytest.raises(InputError, match="no token axis"):
        cache.frame(0, "logits")
    with pytest.raises(InputError, match="cls tokens are not in the cache"):
        cache.cls("time_out", 0)


def test_one_frame_of_timesformers_stream_is_cached() -> None:
    upstream = drawn("TimesformerForVideoClassification")
    model = prisma.adapt(upstream)
    _, whole = model.run_with_cache(video(upstream))
    _, part = model.run_with_cache(video(upstream), names=["resid_post", "space.z"], pos="frame 2")
    assert part["resid_post", 1].shape == (2, 9, 24)
    for name in ("resid_post", "space.z"):  # the second has an axis of frames, and is kept whole
        assert torch.equal(part.frame(2, name, 1), whole.frame(2, name, 1))
    with pytest.raises(InputError, match="not in the cache"):
        part.frame(1, "resid_post", 1)
    with pytest.raises(InputError, match=r"frames on an axis of their own.*cache\.frame"):
        model.run_with_cache(video(upstream), names="space.z", pos="frame 2")


def test_the_predictors_tokens_by_time() -> None:
    upstream = drawn("VJEPA2Model")
    encoded = prisma.adapt(upstream)(video(upstream))
    predictor = prisma.adapt(Predictor(upstream))
    predicted, cache = predictor.run_with_cache(encoded)
    grid = cache.patches("logits")
    assert grid.shape == (2, 3, 2, 2, upstream.config.hidden_size)
    assert torch.equal(cache.frame(1, "logits"), predicted[:, 4:8].unflatten(1, (2, 2)))
    with pytest.raises(InputError, match="holds 24 tokens; expected 12"):
        cache.patches("resid_post", 0)  # each position twice: seen, and to be predicted
    pairs = cache["rot_q", 0].unflatten(1, (-1, 2))
    assert predictor.layout.grid(pairs).shape[:5] == (2, 3, 2, 2, 2)
    seen, asked = [torch.arange(8).expand(2, -1)], [torch.arange(4, 12).expand(2, -1)]
    _, cache = predictor.run_with_cache(encoded, context_mask=seen, target_mask=asked)
    with pytest.raises(prisma.NotApplicable, match="no token layout"):
        cache.frame(0, "logits")


def test_the_classifiers_views_follow_the_video() -> None:
    upstream = drawn("VJEPA2ForVideoClassification")
    model = prisma.adapt(upstream)
    for frames, size, grid in ((6, (8, 8), (3, 2, 2)), (4, (12, 4), (2, 3, 1))):
        _, cache = model.run_with_cache(video(upstream, frames, size))
        assert cache.patches("blocks.0.hook_resid_post").shape[1:4] == grid
        assert cache.patches("pool.attn.pattern", axis="key_pos").shape[-3:] == grid
        assert torch.equal(cache.frame(-1, "embed"), cache.patches("embed")[:, -1])
