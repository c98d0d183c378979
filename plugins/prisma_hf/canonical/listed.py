"""Encoders that are handed the patches of all images of a batch as one list, with each image's grid beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.overrides import TorchFunctionMode


def call(upstream: Any, proj: Any, image: Tensor) -> Tensor:
    """Return the main output for images of one size, cut into patches row by row.

    Args:
        proj: the patch projection; where it reads frames, an image is shown in all of them.
    """
    *frames, down, across = proj.kernel_size
    sides = [1, image.shape[2] // down, image.shape[3] // across]
    grids = torch.tensor([sides] * len(image), device=image.device)
    if frames:
        patches = repeat(image, "b c (r p) (s q) -> (b r s) (c t p q)", p=down, q=across, t=frames[0])
        output = upstream(patches, grid_thw=grids, **_row_by_row(upstream, grids)).last_hidden_state
    else:
        patches = rearrange(image, "b c (r p) (s q) -> 1 (b r s) c p q", p=down, q=across)
        output = upstream(patches, grid_thw=grids).last_hidden_state
    return output.reshape(len(image), -1, output.shape[-1])


def _row_by_row(upstream: Any, grids: Tensor) -> Mapping[str, Tensor]:
    """Return where each patch stands, row by row.

    By itself upstream counts patches in the order in which a language model's merger reads them, some rows at once. No
    token depends on that order, and it takes other positions from its caller.
    """
    from transformers.vision_utils import get_vision_position_ids

    return {"position_ids": get_vision_position_ids(grids, 1), **_added(upstream, grids)}


def _added(upstream: Any, grids: Tensor) -> Mapping[str, Tensor]:
    """Return which rows of the table of positions each patch takes, and how much of each."""
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    rows, weights = get_vision_interpolation_indices_and_weights(
        grids,
        num_grid_per_side=upstream.num_grid_per_side,
        mode=upstream.interpolation_mode,
        align_corners=upstream.interpolation_align_corners,
    )
    return {"interp_indices": rows, "interp_weights": weights}


def one_frame(weight: Tensor) -> Tensor:
    """Return what a projection of frames makes of an image that is shown in all of them."""
    return weight.sum(2)


@contextmanager
def together() -> Iterator[None]:
    """Let attention see the images of a list as a batch, where it would take them one after the other."""
    with _Together():
        yield


class _Together(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "split" or kwargs.get("dim") != 2:
            return func(*args, **kwargs)
        heads, lengths = args
        return (rearrange(heads, "1 h (b p) w -> b h p w", p=lengths[0]),)
