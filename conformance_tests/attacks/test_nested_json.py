"""JSON that nests without end, or is no object, wherever a file of Prisma's holds some: an error in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prisma_harvest.folder import read_lines
from prisma_harvest.resuming import Kept
from prisma_toy.checkpoints import LOG, STATE, load_state, log_rows
from safetensors.torch import save_file

import prisma_core as prisma
from prisma_core import LoadError

TEXTS = ["[" * 100_000, '{"a":' * 100_000, "[]", "5", "null", "{"]


def with_header(path: Path, name: str, text: str) -> Path:
    save_file({"values": torch.zeros(2)}, path, {name: text})
    return path


def search(path: Path, text: str) -> None:
    kept: Any = object.__new__(Kept)
    kept.path, kept.mark = with_header(path / "search", "top_examples", text), "mine"
    kept.read(SimpleNamespace())


def lines(path: Path, text: str) -> None:
    (path / "lines").write_text(text)
    if list(read_lines(path / "lines")):  # what a line holds is for others to check
        raise LoadError("")


READERS: dict[str, Callable[[Path, str], object]] = {
    "a result": lambda path, text: prisma.Result.load(with_header(path / "x", "prisma_result", text)),
    "a cache": lambda path, text: prisma.ActivationCache.load(with_header(path / "x", "prisma_cache", text)),
    "a search": search,
    "lines of a harvest": lines,
}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:6])
@pytest.mark.parametrize("name", READERS)
def test_json_that_is_none(name: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(LoadError):
        READERS[name](tmp_path, text)


@pytest.mark.parametrize("text", TEXTS[:2], ids=lambda text: text[:6])
def test_training_that_was_damaged(text: str, tmp_path: Path) -> None:
    with_header(tmp_path / STATE, "facts", text)
    with pytest.raises(LoadError, match="not a state"):
        load_state(tmp_path)
    (tmp_path / LOG).write_text(text)
    assert list(log_rows(tmp_path)) == []
