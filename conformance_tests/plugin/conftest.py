"""Plugins made for a test."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from prisma_core import hookimpl


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[..., EntryPoint]:
    """Return a maker of entry points: hook implementations by name become a plugin's module."""

    def make(name: str, module: str | None = None, **hooks: Callable[..., Any]) -> EntryPoint:
        module = module or f"plugin_for_tests_{name}"
        made = types.ModuleType(module)
        for hook, function in hooks.items():
            setattr(made, hook, hookimpl(function))
        monkeypatch.setitem(sys.modules, module, made)
        return EntryPoint(name, module, "prisma")

    return make
