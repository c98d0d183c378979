"""Names and labels of a file steer no terminal: neither in what is shown of an object, nor in an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from coders import D_IN, D_SAE, standard
from prisma_sae import CoderFacts, SparseCoder
from safetensors.torch import save_file

import prisma_core as prisma
from prisma_core import LoadError, Result
from prisma_core.plugin import read_checkpoint

TITLE = "\x1b]0;it is mine\x07"
TURNED = "a\u202eb"


def test_labels_of_a_result(tmp_path: Path) -> None:
    one = Result(torch.ones(2), ("head",), {"head": (TITLE, TURNED)}, technique=TITLE, unit=TURNED)
    shown = repr(Result.load(one.save(tmp_path / "one.safetensors")))
    assert "\\x1b]0;it is mine\\x07" in shown
    assert not set(shown) & {"\x1b", "\x07", "\u202e"}
    assert one.labels["head"] == (TITLE, TURNED)  # as they are, for who asks


def test_places_of_a_coder() -> None:
    facts = CoderFacts(kind="standard", d_in=D_IN, d_sae=D_SAE, d_out=D_IN, hook=TITLE, model=TURNED)
    shown = repr(SparseCoder(facts, standard()))
    assert "it is mine" in shown
    assert not set(shown) & {"\x1b", "\x07", "\u202e"}


def test_names_in_errors(tmp_path: Path) -> None:
    (tmp_path / TITLE).mkdir()
    save_file({TITLE: torch.ones(2)}, tmp_path / TITLE / "model.pt")
    with pytest.raises(LoadError, match=r"model\.safetensors") as raised:
        read_checkpoint(tmp_path / TITLE / "model.pt")
    assert "it is mine" in str(raised.value)
    assert "\x1b" not in str(raised.value)
    with pytest.raises(prisma.PrismaError, match=r"\\x1b") as other:
        prisma.load(f"toy:{TITLE}")
    assert "\x1b" not in str(other.value)
