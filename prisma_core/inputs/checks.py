"""Checks of the tensors that a model is given: axes, channels, dtype, device, and values that are numbers."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack  # pyright: ignore[reportPrivateUsage]
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack  # pyright: ignore[reportPrivateUsage]

from prisma_core.errors import InputError, qualified_name
from prisma_core.errors.arguments import in_transform, shown

_n_modes = cast("Any", torch)._C._len_torch_dispatch_stack
_n_function_modes = cast("Any", torch)._C._len_torch_function_stack
_is_tracing = cast("Any", torch).jit.is_tracing
KNOWN = ("torch", "torchvision", "prisma_core")  # whose classes of tensors, and modes, change no number
BASE: Any = Tensor.__mro__[1]  # whose methods compute
OVERRIDES = ("__torch_function__", "__torch_dispatch__")


def input_kind(shape: tuple[int, ...]) -> str:
    """Return the word for an input of a shape in messages: ``image``, ``video`` or ``input``."""
    return {3: "image", 4: "video"}.get(len(shape), "input")


def input_words(shape: tuple[int, ...]) -> str:
    """Say what an input of a shape is: ``an image [batch 3 224 224]``.

    For errors alone: a compiler has no text for a number that it holds open, as that of channels is for a second model.
    """
    what = input_kind(shape)
    return f"{'a' if what == 'video' else 'an'} {what} [batch {' '.join(map(str, shape))}]"


def check_input(value: object, shape: tuple[int, ...]) -> Tensor:
    """Return an input with a batch axis, the channels of a shape, and floating point numbers; else an ``InputError``.

    Args:
        shape: of one image, video or other input, without the batch.
    """
    what = input_kind(shape)
    if not isinstance(value, Tensor):
        hint = "" if what == "input" else " model.preprocess makes one."
        raise InputError(f"Expected a tensor, {input_words(shape)}, got {shown(value)}.{hint}")
    if value.is_nested or value.layout != torch.strided:
        kind, way = ("a nested", "torch.stack(list(x))") if value.is_nested else ("a sparse", "x.to_dense()")
        raise InputError(f"Expected a dense tensor, {input_words(shape)}, got {kind} one. {way} makes one.")
    if value.ndim != len(shape) + 1:
        hint = f" Add a batch axis: {what}[None]." if value.ndim == len(shape) else ""
        raise InputError(f"Expected {input_words(shape)}, got shape {list(value.shape)}.{hint}")
    if len(shape) > 2 and value.shape[-3] != shape[-3]:
        raise InputError(
            f"Expected {shape[-3]} channels in {input_words(shape)}, got shape {list(value.shape)}. "
            "model.preprocess makes the right tensor."
        )
    if not value.is_floating_point():
        raise InputError(f"Expected floating point numbers, got {value.dtype}. model.preprocess scales pixels.")
    return value


def foreign_mode() -> str:
    """Say which mode of the user's may change what functions of torch compute; empty where none is on."""
    if torch.compiler.is_compiling() or not (_n_modes() or _n_function_modes()):
        return ""
    for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()):
        kind = cast("type", type(mode))
        if kind.__module__.partition(".")[0] not in KNOWN:
            return (
                f"a mode that is on ({qualified_name(mode)}), which may change what functions of torch compute. Prisma "
                "calls others than upstream does, so the numbers would not be upstream's. Leave the mode before"
            )
    return ""


def check_plain(what: str, x: Tensor) -> None:
    """Refuse an input whose class computes in its own way, and any in a mode that may: upstream calls other functions.

    The form that runs upstream's own code takes both.
    """
    if problem := foreign_mode():
        raise InputError(f"Expected a pass without {problem}.")
    if type(x) in (Tensor, nn.Parameter) or torch.compiler.is_compiling():
        return
    for kind in type(x).__mro__:
        if kind is Tensor or kind.__module__.partition(".")[0] in KNOWN:
            return
        for name in vars(kind):
            if name in OVERRIDES or (hasattr(BASE, name) and not hasattr(object, name)):
                raise InputError(
                    f"Expected the {what} as a plain tensor, got {qualified_name(x)}, whose {name} may change what "
                    "functions of torch compute. Prisma calls others than upstream does, so the numbers would not be "
                    f"upstream's. {what}.as_subclass(torch.Tensor) is a plain one."
                )


def check_place(what: str, x: Tensor, weight: Tensor | None) -> None:
    """Refuse an input that is not where the weights are, or not of their dtype; the error says what moves it."""
    if weight is None:
        return
    if weight.is_meta and not x.is_meta:
        raise InputError(
            "This model is on the meta device, where weights have shapes and no numbers: load it with its weights "
            f"(of an upstream that accelerate has offloaded, before it is adapted), or give {what}.to('meta')."
        )
    if x.device != weight.device:
        raise InputError(
            f"Expected the {what} on {weight.device}, where the model is; it is on {x.device}. "
            f"Move it: {what}.to({str(weight.device)!r})."
        )
    if x.dtype == weight.dtype or not (x.is_floating_point() and weight.is_floating_point()):
        return
    if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):  # else torch brings the two together
        raise InputError(
            f"Expected the {what} in {weight.dtype}, as the model's weights are; it is in {x.dtype}. "
            f"Convert it: {what}.to({weight.dtype}), or the model: model.to({x.dtype})."
        )


def check_numbers(what: str, x: Tensor) -> None:
    """Refuse an input with values that are not numbers (``InputError``), where a check may look at them."""
    if not may_look(x) or math.isfinite(x.detach().sum().item()):  # one sum tells, unless finite values overflow it
        return
    if bad := int((~torch.isfinite(x)).sum()):
        raise InputError(f"The {what} holds {bad} values that are NaN or infinite.")


def may_look(x: Tensor) -> bool:
    """Return whether a check may look at the numbers of an input.

    On a GPU it would stop the queue at every call. Neither ``torch.compile`` nor ``torch.vmap`` can trace it, and under
    ``make_fx``, in a fake mode, and in other modes that see every operation, there may be no numbers.
    """
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter) or x.device.type != "cpu":
        return False
    return not (in_transform() or _n_modes() or _is_tracing())
