"""The examples in the docstrings of techniques run, and print what they show."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import prisma_lens
import pytest
import torch

EXAMPLES = ("attribute", "bridge", "composition", "gradients", "heads", "lens", "readouts", "textspan")


@pytest.mark.parametrize("name", [each.name for each in pkgutil.iter_modules(prisma_lens.__path__)])
def test_the_examples_of_a_file_run(name: str) -> None:
    torch.set_default_dtype(torch.float32)
    result = doctest.testmod(importlib.import_module(f"prisma_lens.{name}"))
    assert result.failed == 0
    assert (result.attempted > 0) == (name in EXAMPLES)


@pytest.mark.parametrize(
    "name", ["prisma_patch.interventions", "prisma_patch.masks", "prisma_patch.switches", "prisma_view.figures"]
)
def test_the_examples_of_interventions_and_figures_run(name: str) -> None:
    torch.set_default_dtype(torch.float32)
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted > 2
