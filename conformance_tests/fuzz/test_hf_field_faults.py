"""The faults that the sweep of fields found, each by itself."""

from __future__ import annotations

from typing import Any

import pytest
from prisma_conformance import check, tolerances
from prisma_conformance.measure import worst

from prisma_core.errors import UnsupportedArchitecture
from prisma_core.host import installed
from prisma_core.zoo import adapt

from .hf_fields import configurations, moved
from .hf_sweep import EVERY, sample


def built(name: str, **changes: Any) -> Any:
    """Return a case's model with fields of its configuration moved."""
    case = EVERY[name]
    kind = type(getattr(case.build(), "config", None))
    with moved([(kind, field, value) for field, value in changes.items()]):
        return case.build().eval()


@pytest.mark.parametrize(
    "name",
    [
        "hf-ViTModel",
        "hf-ViTMAEForPreTraining",
        "dino-dinov2",
        "dino-dinov3",
        "vivit-VivitModel",
        "clip-hf/CLIPVisionModel",
    ],
)
def test_attention_turned_causal_by_a_configuration_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"config\.is_causal=True"):
        adapt(built(name, is_causal=True))
    upstream = built(name)
    adapt(upstream)
    for part in upstream.modules():
        if hasattr(part, "is_causal"):
            part.is_causal = True
    with pytest.raises(UnsupportedArchitecture, match="causal attention"):
        adapt(upstream)


def test_an_mlp_that_runs_in_chunks_of_tokens_is_read_whole() -> None:
    upstream = built("clip-roberta-ViT-B-32/whole")
    chunked = [part for part in upstream.modules() if hasattr(part, "chunk_size_feed_forward")]
    for part in chunked:
        part.chunk_size_feed_forward = 1
    report = check(upstream, checks="parity.hooks")
    assert report.passed, str(report)
    assert {part.chunk_size_feed_forward for part in chunked} == {1}


def test_a_norm_over_all_heads_is_one_where_there_is_one_head() -> None:
    upstream = built("hf-QianfanOCRVisionModel.rms", num_attention_heads=1)
    report = check(upstream, checks="parity.hooks")
    assert report.passed, str(report)


def test_texts_that_a_configuration_stops_masking_are_refused() -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"config\.is_causal=False"):
        adapt(built("clip-hf/CLIPTextModel", is_causal=False))


def test_a_backbone_that_ends_early_is_refused() -> None:
    with pytest.raises(UnsupportedArchitecture, match="not the last block's"):
        adapt(built("hf-VitPoseBackbone", out_features=["stage1"]))


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 0}, {"layer_norm_eps": 0.0}, {"layer_norm_eps": -1e-5}])
@pytest.mark.parametrize("name", ["hf-ViTModel", "dino-dinov2", "clip-hf/CLIPTextModel"])
def test_values_that_no_spec_can_hold_are_unsupported(name: str, changes: dict[str, float]) -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"no spec can hold|no blocks"):
        adapt(built(name, **changes))


def test_a_masked_autoencoder_s_encoder_is_that_of_all_patches_whatever_it_is_to_hide() -> None:
    upstream = built("hf-ViTMAEModel", mask_ratio=0.5).double()
    model = adapt(upstream)
    (image,) = sample(model)
    seen = installed().adapter(upstream).call(upstream, image)
    assert worst(model(image), seen) < tolerances.FLOAT64
    assert upstream.config.mask_ratio == 0.5


def test_sizes_on_offer_are_whole_patches_where_the_native_one_is_not() -> None:
    upstream = built("hf-ViTModel", image_size=25).double()
    model = adapt(upstream)
    sizes = model.sizes()
    assert sizes[0] == (25, 25)
    assert len(sizes) > 1
    for size in sizes:
        (image,) = model.sample_inputs(2, size=size)
        theirs = installed().adapter(upstream).call(upstream, image.double())
        assert worst(model(image.double()), theirs) < tolerances.FLOAT64


@pytest.mark.parametrize(
    ("name", "changed", "words"),
    [
        ("hf-Aimv2VisionModel", {"is_native": True}, "positions made for each"),
        ("hf-Idefics2VisionTransformer", {"patch_size": 4}, "by which patches are looked up"),
        ("hf-Molmo2VisionModel", {"image_size": None}, "height and width"),
        ("dino-dinov3", {"image_size": 40}, "another grid"),
        ("dino-dinov3_backbone_tokens", {"num_register_tokens": 6}, "registers of another number"),
        ("vivit-VJEPA2Predictor", {"patch_size": 0}, "patch_size=0, where a whole number"),
        ("vivit-VJEPA2ForVideoClassification", {"patch_size": [4, 8]}, "where a whole number"),
        ("clip-roberta-ViT-B-32/whole", {"pad_token_id": 3}, "pad_token_id"),
        ("clip-roberta-ViT-B-32/whole", {"is_decoder": True}, "is_decoder"),
    ],
)
def test_configurations_that_were_changed_since_are_refused(name: str, changed: dict[str, Any], words: str) -> None:
    upstream = EVERY[name].build()
    (several,) = configurations(upstream).values()
    for config in several:
        for attribute, value in changed.items():
            setattr(config, attribute, value)
    with pytest.raises(UnsupportedArchitecture, match=words):
        adapt(upstream)


@pytest.mark.parametrize("name", ["vivit-VivitModel", "vivit-VideoMAEModel"])
def test_frames_are_counted_on_the_module(name: str) -> None:
    upstream = built(name)
    frames = upstream.config.num_frames
    upstream.config.num_frames *= 2
    assert adapt(upstream).spec.n_frames == frames


def test_heads_of_an_odd_number_of_channels_cannot_turn_in_pairs() -> None:
    with pytest.raises(UnsupportedArchitecture, match="odd number of channels"):
        adapt(built("vivit-VJEPA2Model", num_attention_heads=6))


def test_a_model_without_a_class_token_is_one() -> None:
    upstream = built("hf-PixioModel", n_cls_tokens=0).double()
    model = adapt(upstream)
    (image,) = sample(model)
    assert model.layout.n_prefix == 0
    assert worst(model(image), upstream(image).last_hidden_state) < tolerances.FLOAT64


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("hf-ViTMAEForPreTraining", "num_hidden_layers"),
        ("hf-ViTMAEForPreTraining", "decoder_num_hidden_layers"),
        ("vivit-TimesformerModel (joint)", "num_hidden_layers"),
        ("vivit-VJEPA2Model", "num_hidden_layers"),
        ("vivit-VJEPA2ForVideoClassification", "num_hidden_layers"),
    ],
)
def test_a_model_without_blocks_is_unsupported(name: str, field: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match="0 parts: there is no number 0"):
        adapt(built(name, **{field: 0}))


def test_heads_are_those_of_the_modules_whatever_a_configuration_says_since() -> None:
    upstream = built("vivit-TimesformerModel (joint)").double()
    heads = upstream.encoder.layer[0].attention.attention.num_heads
    upstream.config.num_attention_heads = 2 * heads
    model = adapt(upstream)
    _, cache = model.run_with_cache(*sample(model), names="z")
    assert cache["z", 0].shape[-2] == heads


def test_images_of_parts_of_patches_are_cut_to_whole_ones_where_patches_are_handed_over() -> None:
    upstream = built("hf-PaddleOCRVisionModel", image_size=25).double()
    model = adapt(upstream)
    (image,) = sample(model)
    assert image.shape[-2:] == (24, 24)
    assert worst(model(image), installed().adapter(upstream).call(upstream, image)) < tolerances.FLOAT64


def test_a_table_of_no_tokens_is_no_tensor_to_account_for() -> None:
    upstream = built("dino-dinov2_registers", num_register_tokens=0).double()
    model = adapt(upstream)
    (image,) = sample(model)
    assert model.layout.n_prefix == 1
    assert worst(model(image), installed().adapter(upstream).call(upstream, image)) < tolerances.FLOAT64
    upstream.load_state_dict(model.export())
