"""What transformers' backbones return: the patches behind their last stage."""

from __future__ import annotations

from prisma_core.adapter import Reader
from prisma_core.spec import PoolSpec

V3 = "DINOv3ViTBackbone"


def pool(upstream: Reader) -> PoolSpec:
    """Return what the last feature map holds.

    Raises:
        UnsupportedArchitecture: it does not come from the last block.
    """
    if upstream.out_features[-1] != upstream.stage_names[-1]:
        raise upstream.unsupported(
            f"a last feature map that is not the last block's (out_features={list(upstream.out_features)!r}; add "
            f"{upstream.stage_names[-1]!r}; the others are hook points)"
        )
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
