"""Conformance cases: transformers' video models, small, hyperparameters off their defaults."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from prisma_core.conformance.case import Case

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


def cases() -> Iterator[Case]:
    """Yield a case for every class and every fact that tells two of its models apart."""
    yield _case("VivitModel", **VIVIT)
    yield _case("VivitForVideoClassification", **VIVIT)
    yield _case("VivitForVideoClassification", "no bias, exact gelu", **VIVIT, qkv_bias=False, hidden_act="gelu")
    yield _case("VideoMAEModel", **VIDEOMAE)
    yield _case("VideoMAEModel", "norm, no bias", **VIDEOMAE, use_mean_pooling=False, qv_bias=False)
    yield _case("VideoMAEForVideoClassification", **VIDEOMAE, hidden_act="quick_gelu")
    yield _case("VideoMAEForVideoClassification", "first token", **VIDEOMAE, use_mean_pooling=False)
    yield _case("VJEPA2Model", **VJEPA2)
    yield _case("VJEPA2Model", "no bias", **VJEPA2, qkv_bias=False, drop_path_rate=0.1)


def _case(kind: str, what: str = "", **facts: Any) -> Case:
    name = f"{kind} ({what})" if what else kind
    return Case(name, build=partial(small, kind, **facts), forward=main_output)


def small(kind: str, **facts: Any) -> nn.Module:
    """Return a model of transformers' own class, built from a config of these facts."""
    import transformers

    made = getattr(transformers, kind)
    return made(made.config_class(**facts)).eval()


def main_output(upstream: nn.Module, video: Tensor) -> Tensor:
    """Return the logits, or all tokens of a model without a head."""
    output: Any = upstream(video)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state
