"""Checkpoints read without running anything in them: flat, nested, damaged, with numpy's numbers, hostile."""

from __future__ import annotations

import pickle
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import RunsCommand, truncate
from safetensors.torch import save_file

from prisma_core import LoadError
from prisma_core.files.checkpoint import read_checkpoint

STATE = {"w": torch.arange(4000.0), "b": torch.ones(3)}


def test_readable_checkpoints(tmp_path: Path) -> None:
    for name, value in {"flat.pt": STATE, "nested.pth": {"model": STATE, "epoch": 3}}.items():
        torch.save(value, tmp_path / name)
        state = read_checkpoint(tmp_path / name)
        assert state.keys() == STATE.keys()
        assert all(torch.equal(state[key], STATE[key]) for key in STATE)
    save_file(STATE, tmp_path / "flat.safetensors")
    assert torch.equal(read_checkpoint(tmp_path / "flat.safetensors")["w"], STATE["w"])


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage"])
def test_damaged_checkpoints(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"bad.{suffix}"
    if damage == "truncated":
        (save_file if suffix == "safetensors" else torch.save)(STATE, path)
        truncate(path)
    else:
        path.write_bytes(b"" if damage == "empty" else b"these are not the weights you are looking for" * 20)
    with pytest.raises(LoadError, match=rf"bad\.{suffix}"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, legacy: bool) -> None:
    mark = tmp_path / "it ran"
    torch.save(
        {"w": STATE["w"], "x": RunsCommand(mark)}, tmp_path / "wicked.pt", _use_new_zipfile_serialization=not legacy
    )
    with pytest.raises(LoadError, match=r"(posix|nt)\.mkdir"):
        read_checkpoint(tmp_path / "wicked.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(RunsCommand(mark)))
    with pytest.raises(LoadError):
        read_checkpoint(tmp_path / "plain.pkl")
    assert not mark.exists()


def test_checkpoints_without_one_state_dict(tmp_path: Path) -> None:
    torch.save({"model": STATE, "ema": STATE}, tmp_path / "two.pt")
    with pytest.raises(LoadError, match=r"model, ema"):
        read_checkpoint(tmp_path / "two.pt")
    torch.save([1, 2], tmp_path / "none.pt")
    with pytest.raises(LoadError, match="list"):
        read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(LoadError, match=r"absent\.pt"):
        read_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(LoadError, match="folder"):
        read_checkpoint(tmp_path)


def test_numpy_values_beside_the_tensors_are_skipped(tmp_path: Path) -> None:
    extras = {"best": np.float64(0.5), "step": np.int64(3), "generator": np.random.default_rng(0).bytes(3)}
    state = {"weight": torch.randn(2)}
    torch.save({"model": state, **extras, "keys": np.arange(3), "dtype": np.dtype("f4")}, tmp_path / "trained.pth")
    read = read_checkpoint(tmp_path / "trained.pth")
    assert list(read) == ["weight"]
    assert torch.equal(read["weight"], state["weight"])
    torch.save({"model": state, "names": np.array([Path("x")], dtype=object)}, tmp_path / "objects.pth")
    assert list(read_checkpoint(tmp_path / "objects.pth")) == ["weight"]
    torch.save({"model": state, "price": Decimal(3)}, tmp_path / "other.pth")
    with pytest.raises(LoadError, match=r"decimal\.Decimal"):
        read_checkpoint(tmp_path / "other.pth")
