"""Broken twins: copies of a technique's module with one mistake planted in the source."""

from __future__ import annotations

import inspect
from types import ModuleType


def twin(module: ModuleType, right: str, wrong: str) -> ModuleType:
    """Return a copy of a module in which ``right``, a text that stands in its source once, is ``wrong``."""
    source = inspect.getsource(module)
    assert source.count(right) == 1, f"{module.__name__} holds {source.count(right)} of {right!r}: plant it anew."
    copy = ModuleType(module.__name__)  # the name under which dataclasses look up their annotations
    exec(compile(source.replace(right, wrong), copy.__name__, "exec"), copy.__dict__)
    return copy
