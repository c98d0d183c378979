"""Conformance cases: every class that an adapter takes, small and away from its defaults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import transformers
from torch import Tensor, nn

from prisma_core.conformance.case import Case

SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 24,
    "patch_size": 8,
    "num_channels": 2,
    "layer_norm_eps": 3e-5,
    "hidden_act": "gelu_new",
}


def main_output(upstream: Any, image: Tensor) -> Tensor:
    """Return what a model is called for: logits where it has a head, else the last hidden state."""
    size = upstream.config.image_size
    native = (size, size) if isinstance(size, int) else tuple(size)
    asked = {} if tuple(image.shape[2:]) == native else {"interpolate_pos_encoding": True}
    output = upstream(image, **asked)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def cases() -> Iterator[Case]:
    def vit(**given: Any) -> nn.Module:
        return transformers.ViTModel(transformers.ViTConfig(**{**SMALL, **given}))

    yield Case("ViTModel", vit, forward=main_output)
    yield Case(
        "ViTForImageClassification",
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**{**SMALL, "qkv_bias": False, "num_labels": 5, "image_size": (16, 24)})
        ),
        forward=main_output,
    )
