"""Plugins made for a test."""

from __future__ import annotations

import signal
import sys
import types
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from prisma_core import hookimpl
from prisma_core.host import Host


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


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Host]:
    """Return a way to make the plugins of a test the installed ones."""

    def use(*points: EntryPoint) -> Host:
        host = Host(points)
        monkeypatch.setattr("prisma_core.host._host", host)
        return host

    return use


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C means what Python makes of it, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
