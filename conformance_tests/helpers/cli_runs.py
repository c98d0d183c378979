"""A source and commands for tests of the command line."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Collection, Iterator
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import typer

from prisma_core import HookedViT, LoadError, hookimpl
from prisma_core.contract.source import Loaded, ModelInfo, Source

OURS = ("models", "plugins", "info", "check", "doctor")
Run = Callable[..., "Ran"]


class Ran:
    """What a command left: exit status, stdout, and the lines of stderr."""

    def __init__(self, status: int, out: str, err: str):
        self.status, self.out, self.err = status, out, err.splitlines()


class Tiny(Source):
    name = "tiny"

    def __init__(self, model: HookedViT):
        self.model = model

    def load(self, rest: str, **options: Any) -> Loaded:
        if rest == "unreadable":
            raise LoadError("One line,\nand another.")
        if rest == "upstream":
            timm = pytest.importorskip("timm")
            kind = timm.models.vision_transformer.VisionTransformer
            return Loaded(kind(img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=2, num_classes=5))
        return Loaded(self.model)

    def models(self) -> Iterator[ModelInfo]:
        yield ModelInfo("tiny:one", "small", pretrained=True, note="tags: a, b")
        yield ModelInfo("tiny:two", "smaller", pretrained=False)
        yield ModelInfo("tiny:huge", "large", pretrained=False)

    def loadable(self, rests: Collection[str]) -> Collection[str] | None:
        return set(rests) - {"huge"}


class Hungry(Source):
    name, library, install = "hungry", "no_such_library_for_tests", 'pip install "prisma[hungry]"'

    def load(self, rest: str, **options: Any) -> Loaded: ...

    def models(self) -> Iterator[ModelInfo]:
        raise AssertionError("asked for models without its library")


def greet(name: str) -> None:
    """Greet somebody."""
    if name == "bug":
        raise ZeroDivisionError("oh\nno")
    if name == "stop":
        raise KeyboardInterrupt
    print(f"hello {name}")  # noqa: T201


@hookimpl
def prisma_commands(app: typer.Typer) -> None:
    app.command()(greet)


def entry(monkeypatch: pytest.MonkeyPatch, name: str, **hooks: Callable[..., Any]) -> EntryPoint:
    module = types.ModuleType(f"cli_plugin_for_tests_{name}")
    for hook, function in hooks.items():
        setattr(module, hook, hookimpl(function))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return EntryPoint(name, module.__name__, "prisma")
