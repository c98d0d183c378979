"""Inputs that a model cannot take: shape, channels, dtype, device, values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prisma_core import HookedViT, InputError


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda x: x[0], r"\[3, 8, 12\].*batch"),
        (lambda x: x[:, :1], r"3 channels.*\[3, 1, 8, 12\]"),
        (lambda x: torch.cat([x, x[:, :1]], 1), r"3 channels.*\[3, 4, 8, 12\]"),
        (lambda x: x[..., :8], r"\[3, 3, 8, 8\].*one size"),
        (lambda x: (x * 100).byte(), r"torch\.uint8"),
        (lambda x: torch.where(x > 2, torch.nan, x), r"\d+ values.*NaN"),
        (lambda x: torch.where(x > 2, torch.inf, x), r"\d+ values.*NaN"),
    ],
)
def test_tensors_the_model_cannot_take(
    vit: HookedViT, image: Tensor, change: Callable[[Tensor], Tensor], fact: str
) -> None:
    with pytest.raises(InputError, match=fact):
        vit(change(image))
    assert torch.isfinite(vit(image)).all()


def test_an_input_of_another_dtype_or_device(vit: HookedViT, image: Tensor) -> None:
    vit = vit.float()
    stream = vit(image.float(), stop_at_layer=1)
    fact = r"{}.*torch\.float32.*torch\.float64.*to\(torch\.float32\)"
    with pytest.raises(InputError, match=fact.format("image")):
        vit(image)
    with pytest.raises(InputError, match=fact.format("stream")):
        vit(stream.double(), start_at_layer=1)
    with pytest.raises(InputError, match=r"image on cpu.*meta"):
        vit(image.float().to("meta"))
    with pytest.raises(InputError, match=r"model is on the meta device, where weights have shapes and no numbers"):
        vit.to("meta")(image.float())


def test_a_stream_of_no_tokens(vit: HookedViT) -> None:
    with pytest.raises(InputError, match=r"residual stream \[batch pos \d+\], got shape \[1, 0, \d+\]"):
        vit(torch.zeros(1, 0, vit.spec.d_model, dtype=torch.float64), start_at_layer=1)


def test_autocast_brings_dtypes_together(vit: HookedViT, image: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(vit.float()(image.bfloat16())).all()


def test_an_image_that_no_patch_fits(make: Callable[..., HookedViT]) -> None:
    with pytest.raises(InputError, match=r"4x4.*10x12"):
        make(interpolation=True)(torch.zeros(1, 3, 10, 12))
    with pytest.raises(InputError, match=r"4x4.*0x12"):
        make(interpolation=True)(torch.zeros(1, 3, 0, 12))


@pytest.mark.parametrize("gradients", [False, True])
def test_a_batch_of_none(variant: HookedViT, image: Tensor, gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        logits, cache = variant.run_with_cache(image[:0])
        expected, whole = variant.run_with_cache(image)
    assert logits.shape == (0, *expected.shape[1:])
    assert {name: x.shape for name, x in cache.items()} == {name: (0, *x.shape[1:]) for name, x in whole.items()}
