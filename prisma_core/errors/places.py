"""Checks of dtypes and devices, as users name them."""

from __future__ import annotations

import torch

from prisma_core.errors import InputError


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype of a name, such as ``float16``; a dtype comes back as it is.

    Raises:
        InputError: torch has none of this name.
    """
    named: object = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if (named is not None and not isinstance(named, torch.dtype)) or (named is None and dtype is not None):
        raise InputError(f"{dtype!r} is not a dtype: expected one of torch's, such as torch.float16.")
    return named


def check_device(device: torch.device | str | None) -> None:
    """Refuse a device that is not there, before a pass is made for nothing.

    Raises:
        InputError: torch cannot put anything on it.
    """
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch's ways to say so
        there = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        raise InputError(f"Expected a device of torch's, got {device!r}; there is {' and '.join(there)}.") from error
