"""Makers of sparse coders' files, written as the libraries' own code writes them, and of small coders."""

from __future__ import annotations

import io
import json
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

D_IN, D_SAE = 6, 16


def drawn(seed: int = 0, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Return random tensors by name; biases and thresholds are no zeros."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def standard(seed: int = 0, d_in: int = D_IN, d_sae: int = D_SAE) -> dict[str, Tensor]:
    """Return the four tensors of a standard coder."""
    return drawn(seed, W_enc=(d_in, d_sae), b_enc=(d_sae,), W_dec=(d_sae, d_in), b_dec=(d_in,))


def rows(n: int = 32, d: int = D_IN, seed: int = 9) -> Tensor:
    """Return activations whose mean and scale are far from 0 and 1."""
    return 3 * torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 1.5


@contextmanager
def class_of(path: str, **fields: Any) -> Iterator[Any]:
    """Yield an object of a class with this full name, which can be pickled inside the block."""
    module, _, name = path.rpartition(".")
    parts = module.split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    fresh = [each for each in names if each not in sys.modules]
    for each in fresh:
        sys.modules[each] = types.ModuleType(each)
    made = type(name, (), {"__module__": module})
    setattr(sys.modules[module], name, made)
    try:
        value = made()
        vars(value).update(fields)
        yield value
    finally:
        for each in fresh:
            del sys.modules[each]


def top(h: Tensor, k: int) -> Tensor:
    """Return ``h`` with all but the k largest of each row set to zero."""
    kth = h.topk(k, dim=-1).values[..., -1:]
    return h * (h >= kth)


X = rows()


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def far(ours: Tensor, theirs: Tensor) -> None:
    """Show that a wrong reading would be seen."""
    assert (ours - theirs).abs().max() > 1e-2


def encoded(t: dict[str, Tensor], x: Tensor = X, *, minus: str | None = "b_dec") -> Tensor:
    return (x if minus is None else x - t[minus]) @ t["W_enc"] + t["b_enc"]


def saev(file: Any, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    file.write((json.dumps(header) + "\n").encode())
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    file.write(buffer.getvalue())
