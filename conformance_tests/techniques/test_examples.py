"""The examples in the docstrings of techniques run and print what they show, and no public function lacks one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

PACKAGES = ("prisma_lens", "prisma_patch", "prisma_sae", "prisma_harvest", "prisma_view", "prisma_registers")


def modules() -> Iterator[str]:
    for package in PACKAGES:
        path = importlib.import_module(package).__path__
        yield from (each.name for each in pkgutil.walk_packages(path, f"{package}."))


@pytest.mark.parametrize("name", modules())
def test_the_examples_of_a_file_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    torch.set_default_dtype(torch.float32)
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_function_of_the_techniques_has_an_example(package: str) -> None:
    module = importlib.import_module(package)
    functions = {name: getattr(module, name) for name in module.__all__ if inspect.isfunction(getattr(module, name))}
    assert len(functions) > 3
    hooks = {name for name, function in functions.items() if hasattr(function, "prisma_impl")}
    assert [name for name in functions.keys() - hooks if ">>>" not in (functions[name].__doc__ or "")] == []
