"""Broken twins: a technique with one planted mistake, which its planted truth must reject."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


def twin(technique: Callable[..., Any] | ModuleType, right: str, wrong: str) -> Any:
    """Return a copy of a module in which one passage reads differently, or a function of such a copy.

    Args:
        technique: the function, or the module.
        right: a passage that stands in the module once.
        wrong: the mistake.
    """
    module = technique if isinstance(technique, ModuleType) else sys.modules[technique.__module__]
    source = inspect.getsource(module)
    assert source.count(right) == 1, f"{right!r} stands {source.count(right)} times in {module.__name__}: plant it anew"
    copy = ModuleType(module.__name__)
    copy.__file__ = module.__file__
    sys.modules[copy.__name__] = copy  # dataclasses look their module up
    try:
        exec(compile(source.replace(right, wrong), str(module.__file__), "exec"), vars(copy))
    finally:
        sys.modules[copy.__name__] = module
    return copy if isinstance(technique, ModuleType) else getattr(copy, technique.__name__)


def rejects(truth: Callable[[Any], None], technique: Callable[..., Any], right: str, wrong: str) -> None:
    """Assert that a planted truth holds of a technique and not of its broken twin."""
    truth(technique)
    broken = twin(technique, right, wrong)
    with pytest.raises(AssertionError):
        truth(broken)
