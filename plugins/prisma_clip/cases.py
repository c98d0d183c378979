"""Conformance cases: open_clip's architectures, built small."""

from __future__ import annotations

from typing import Any

import open_clip
import torch.nn.functional as F
from torch import Tensor, nn


def small(name: str) -> nn.Module:
    config: dict[str, Any] = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    config["embed_dim"] = 12
    vision.update(width=32, layers=2, head_width=16, image_size=(2 * 8, 3 * 8), patch_size=8)
    text.update(width=24, layers=2, heads=2, context_length=7, vocab_size=50)
    custom = config.pop("custom_text", False)
    return open_clip.model.CLIP(**config).eval()


def forward(model: Any, image: Tensor, tokens: Tensor) -> Tensor:
    given = model(image, tokens)
    seen, read, scale, *bias = given
    logits = scale * seen @ read.T
    return logits + bias[0] if bias else logits
