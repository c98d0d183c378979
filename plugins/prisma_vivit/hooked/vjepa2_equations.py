"""Equations of V-JEPA 2's predictor and classifier that no formula of a row holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch

from prisma_core.plugin import Reader
from prisma_vivit.hooked.mapping import Acts, Equation


def rotary_equations(layers: Reader, acts: Acts, *, twice: bool) -> Iterator[Equation]:
    """Yield what rotated queries and keys are.

    Args:
        twice: every position is there twice: seen, and to be predicted.
    """
    for index, layer in enumerate(layers):
        at, attn = f"blocks.{index}.attn", cast(Any, layer.attention.module)
        for name in "qk":
            x = acts[f"{at}.hook_{name}"].transpose(1, 2)
            places = torch.arange(x.shape[2] // (1 + twice), device=x.device).repeat_interleave(1 + twice)
            rotated = attn.apply_rotary_embeddings(x, attn.get_position_ids(x, masks=places.expand(len(x), -1)))
            yield (
                f"{at}: rot_{name} = {name} rotated by its position",
                acts[f"{at}.hook_rot_{name}"],
                rotated.transpose(1, 2),
            )


def token_equations(predictor: Reader, acts: Acts) -> Iterator[Equation]:
    """Yield how the predictor's tokens come together, all of them seen and all to be predicted."""
    seen, tokens, mask = acts["hook_embed"], acts["hook_full_embed"], predictor.embeddings.mask_tokens
    hidden = mask[1 % len(mask)].expand_as(seen)
    yield "hook_full_embed = embed, then mask tokens", tokens, torch.cat([seen, hidden], 1)
    # The two of one position come in any order.
    pairs = acts["blocks.0.hook_resid_pre"].unflatten(1, (-1, 2)).sum(2)
    yield "blocks.0.hook_resid_pre = full_embed, sorted by position", pairs, tokens.unflatten(1, (2, -1)).sum(1)
