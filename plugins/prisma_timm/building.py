"""Build timm's models with random weights or none, with an error in words for an option that timm does not take."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import timm
import torch
from timm.models import build_model_with_cfg  # pyright: ignore[reportUnknownVariableType]
from torch import nn
from torch.overrides import TorchFunctionMode

from prisma_core.plugin import InputError, check_keywords, keyword_names

# In-place functions of initialisation. Without data they would only cost time, and most of the time at that.
DRAWING = {"add_", "clamp_", "copy_", "div_", "erfinv_", "fill_", "mul_", "normal_", "uniform_", "zero_"}
DRAWING |= {"kaiming_uniform_", "kaiming_normal_"}
UNEXPECTED = re.compile(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'")
FEATURES = ("features_only", "out_indices")  # options of every builder besides the spelt-out ones


class WithoutData(TorchFunctionMode):
    """Skips initialisation of tensors without data."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in DRAWING:
            drawn = args[0] if args else (kwargs or {}).get("tensor")
            if getattr(drawn, "is_meta", False):
                return drawn
        return func(*args, **(kwargs or {}))


def create(reference: str, options: Mapping[str, Any]) -> nn.Module:
    """Return a timm model with random weights.

    Args:
        reference: ``NAME`` or ``NAME.TAG``, known to timm.
        options: passed to ``timm.create_model``.

    Raises:
        InputError: timm takes no such option; the nearest are suggested.
    """
    try:
        return timm.create_model(reference, pretrained=False, **options)
    except TypeError as error:
        if not options:
            raise
        name = reference.partition(".")[0]
        _check_option(name, str(error))
        raise InputError(f"timm:{name} takes no such options ({', '.join(options)}): {error}.") from error


def create_without_data(reference: str, options: Mapping[str, Any]) -> nn.Module:
    """Return ``create``'s model on the meta device, in a fraction of the time."""
    with torch.device("meta"), WithoutData():
        return create(reference, options)


def _check_option(name: str, message: str) -> None:
    """Raise the InputError that suggests options, where timm's message names one that a function does not take."""
    if (unexpected := UNEXPECTED.search(message)) is None:
        return
    function = getattr(sys.modules[timm.model_entrypoint(name).__module__], unexpected[1], None)
    if function is None:
        return
    builders = (function, timm.create_model, cast("Callable[..., Any]", build_model_with_cfg))
    options = [option for builder in builders for option in keyword_names(builder)]
    check_keywords(f"timm:{name}", [unexpected[2]], ["pretrained", *options, *FEATURES])
