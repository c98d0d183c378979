"""Outputs of transformers' models and backbones: the patches behind the last stage."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prisma_core.plugin import PoolSpec, Reader, ends_with_last_stage
from prisma_dino.canonical import blocks

V3 = f"{blocks.V3}Backbone"


def main_output(result: Any) -> Tensor:
    """Return a classifier's logits, a model's pooled output, or a backbone's last feature map as tokens."""
    for name in ("logits", "pooler_output"):
        if getattr(result, name, None) is not None:
            return getattr(result, name)
    last: Tensor = result.feature_maps[-1]
    return last if last.ndim == 3 else last.flatten(2).transpose(1, 2)


def pool(upstream: Reader, layers: Reader) -> PoolSpec:
    """Return what the last feature map holds.

    Raises:
        UnsupportedArchitecture: it does not come from the last block.
    """
    ends_with_last_stage(upstream, layers)
    every = not (upstream.is_a(V3) or upstream.config.reshape_hidden_states)
    return PoolSpec(kind="none" if every else "patches")


def output_rows(upstream: Reader, last: str) -> str:
    """Return the hook rows of the last feature map; ``last`` is the path of what a backbone returns whole."""
    n, how = len(upstream.out_features) - 1, ""
    if upstream.config.reshape_hidden_states:
        place, how = f"@ contiguous#{n}", " : b d r c -> b (r c) d"
    elif upstream.is_a(V3):
        per_stage = 2 if getattr(upstream.config, "return_class_token", False) else 1
        place = f"@ getitem#{per_stage * (n + 1) - 1}"
    else:
        place = last if last != "encoder.layer" else f"encoder.layer.{len(upstream.encoder.layer) - 1}"
    return f"""
        {place}  ->  hook_pooled  {how}
        {place}  ->  hook_logits  {how}
    """
