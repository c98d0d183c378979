"""Dtypes: float32 beside the fused kernels of half models, which sum in it too; and models of several dtypes."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from prisma_core.errors import InputError

HALF = (torch.float16, torch.bfloat16)
AS_IT_IS = nullcontext()  # one for all: it keeps nothing
_in_any_autocast = cast("Callable[[], bool]", cast(Any, torch)._C._is_any_autocast_enabled)


def widened(x: Tensor) -> Tensor:
    """Return ``x`` in float32 if its dtype is a half one, else as it is."""
    return x.float() if x.dtype in HALF else x


@contextmanager
def taking_gradients() -> Generator[None]:
    """Open a scope in which gradients are taken, whatever the caller's mode.

    Raises:
        InputError: the caller is in ``torch.inference_mode()``, or a tensor was made in it.
    """
    if torch.is_inference_mode_enabled():
        raise InputError("This takes gradients, of which torch.inference_mode() has none: use torch.no_grad() instead.")
    try:
        with torch.enable_grad():
            yield
    except RuntimeError as error:
        if "inference tensor" not in str(error).lower():
            raise
        made = "This takes gradients through what was made in torch.inference_mode(), which has none"
        raise InputError(f"{made}: make the cache or image again, in torch.no_grad().") from error


def unrounded(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which products on the device of ``x`` keep their dtype: autocast would round them to half."""
    return torch.autocast(x.device.type, enabled=False) if autocast_on(x) else AS_IT_IS


def autocast_on(x: Tensor) -> bool:
    """Return whether autocast is on, on the device of ``x``."""
    if (x.is_cpu or x.is_cuda) and not _in_any_autocast():  # the quick question, which leaves out devices such as mps
        return False
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def softmax(scores: Tensor) -> Tensor:
    """Return the softmax over the last axis, and zeros where no key may be read, as fused kernels have it."""
    hidden = scores.isneginf().all(-1, keepdim=True)
    return scores.masked_fill(hidden, 0).softmax(-1).masked_fill(hidden, 0)


def show(point: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x`` after a hook point that shows it in the model's dtype; it is in that, or in float32 beside a half.

    Numbers that hooks leave as they are keep their precision; those that hooks change are taken as given. Gradients
    pass through the hook point, except where the number is too large for the dtype.
    """
    if x.dtype == dtype:
        return point(x)
    shown = x.to(dtype)
    hooked = point(shown)
    if hooked is shown and not x.requires_grad:
        return x
    same, finite = hooked == shown, shown.isfinite()
    rounding = torch.where(same & finite, x - shown, 0).detach()
    return torch.where(same & ~finite, x, hooked.to(x.dtype) + rounding)


def joining(x: Tensor, stream: Tensor, blocks: nn.Module) -> Tensor:
    """Return prefix tokens or positions as they join a stream of another dtype.

    They are rounded to the stream's where the matrices of the model's blocks are in that, as open_clip does in half
    precision. Elsewhere torch takes the wider dtype of the two.
    """
    if x.dtype == stream.dtype:
        return x
    return x.to(stream.dtype) if stream.dtype == matrix_dtype(blocks) else x


def matrix_dtype(blocks: nn.Module) -> torch.dtype | None:
    """Return the dtype of the blocks' matrices; None where they have none."""
    return next((each.dtype for each in blocks.parameters() if each.ndim > 1 and each.is_floating_point()), None)
