"""Conformance cases: transformers' video models, small, hyperparameters off their defaults."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from prisma_core.plugin import Case, Images
from prisma_vivit.hooked.vjepa2_maps import Predictor
from prisma_vivit.processing import preprocess_of

VIVIT = {
    "image_size": [8, 12],
    "num_frames": 6,
    "tubelet_size": [2, 4, 4],
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "num_channels": 2,
    "num_labels": 5,
}

VIDEOMAE = {
    "image_size": [8, 12],
    "patch_size": [4, 4],
    "num_frames": 6,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "num_channels": 2,
    "num_labels": 5,
}
VJEPA2 = {
    "crop_size": 8,
    "patch_size": 4,
    "frames_per_clip": 6,
    "hidden_size": 42,  # heads of 14 channels: 4 each for frame, row and column, and 2 that do not turn
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "mlp_ratio": 1.5,
    "in_chans": 2,
    "num_labels": 5,
    "num_pooler_layers": 2,
    "pred_hidden_size": 32,
    "pred_num_attention_heads": 2,
    "pred_num_hidden_layers": 2,
    "pred_num_mask_tokens": 3,
}


TIMESFORMER = {
    "image_size": 12,
    "patch_size": 4,
    "num_frames": 4,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "num_channels": 2,
    "num_labels": 5,
}
PROCESSORS: dict[str, dict[str, Any]] = {
    "VivitImageProcessor": {"size": {"shortest_edge": 45}, "crop_size": {"height": 40, "width": 40}},
    "VivitVideoProcessor": {"size": {"shortest_edge": 45}, "crop_size": {"height": 40, "width": 40}},
    "VideoMAEImageProcessorPil": {"size": {"shortest_edge": 48}, "crop_size": {"height": 40, "width": 40}},
    "VideoMAEVideoProcessor": {"size": {"height": 30, "width": 44}, "do_center_crop": False, "image_mean": [0.3] * 3},
    "VJEPA2VideoProcessor": {"crop_size": 40},
    "TimesformerVideoProcessor": {"size": {"shortest_edge": 40}, "crop_size": {"height": 40, "width": 40}},
}


def cases() -> Iterator[Case]:
    """Yield a case for every class and every fact that tells two of its models apart."""
    yield _case("VivitModel", processor="VivitVideoProcessor", **VIVIT)
    yield _case("VivitForVideoClassification", processor="VivitImageProcessor", **VIVIT)
    yield _case("VivitForVideoClassification", "no bias, exact gelu", **VIVIT, qkv_bias=False, hidden_act="gelu")
    yield _case("VideoMAEModel", processor="VideoMAEVideoProcessor", **VIDEOMAE)
    yield _case("VideoMAEModel", "norm, no bias", **VIDEOMAE, use_mean_pooling=False, qv_bias=False)
    yield _case(
        "VideoMAEForVideoClassification", processor="VideoMAEImageProcessorPil", hidden_act="quick_gelu", **VIDEOMAE
    )
    yield _case("VideoMAEForVideoClassification", "first token", **VIDEOMAE, use_mean_pooling=False)
    yield _case("VJEPA2Model", processor="VJEPA2VideoProcessor", **VJEPA2)
    yield _case("VJEPA2Model", "no bias", **VJEPA2, qkv_bias=False, drop_path_rate=0.1)
    yield _case("VJEPA2ForVideoClassification", **VJEPA2)
    yield Case("VJEPA2Predictor", build=_predictor)
    yield _case("TimesformerModel", "joint", attention_type="joint_space_time", hidden_act="gelu_new", **TIMESFORMER)
    yield _case("TimesformerForVideoClassification", processor="TimesformerVideoProcessor", **TIMESFORMER)
    yield _case(
        "TimesformerForVideoClassification",
        "space alone, no bias",
        attention_type="space_only",
        qkv_bias=False,
        **TIMESFORMER,
    )


def _case(kind: str, what: str = "", processor: str | None = None, **facts: Any) -> Case:
    name = f"{kind} ({what})" if what else kind
    return Case(
        name,
        build=partial(small, kind, **facts),
        images=partial(_images, processor) if processor else None,
    )


def _predictor() -> nn.Module:
    return Predictor(small("VJEPA2Model", **VJEPA2))


def _images(name: str, upstream: nn.Module) -> Images:
    """Return our preprocessing of one frame, and a processor's of transformers."""
    theirs = processor(name)

    def reference(frame: Any) -> Tensor:
        made = theirs([np.asarray(frame)] * 2, return_tensors="pt")
        return made.get("pixel_values", made.get("pixel_values_videos"))[0, 0]

    return Images(preprocess_of(theirs, 2).each, reference)


def processor(name: str) -> Any:
    """Return a processor of transformers, small."""
    import transformers

    return getattr(transformers, name)(**PROCESSORS[name])


def small(kind: str, **facts: Any) -> nn.Module:
    """Return a model of transformers' own class, built from a config of these facts."""
    import transformers

    made = getattr(transformers, kind)
    return made(made.config_class(**facts)).eval()
