"""Files of the hub, from a hub on loopback: one file, a snapshot, damage, absence."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from loopback import Hub
from safetensors.torch import save_file

from prisma_core import LoadError, UnknownName
from prisma_core.files import hub


def test_a_file_or_repository_that_the_hub_lacks_is_named(loopback: Hub) -> None:
    loopback.repository("someone/empty")
    with pytest.raises(UnknownName, match=r"someone/empty.*model\.safetensors"):
        hub.fetch("someone/empty", ["model.safetensors"], reference="hf:someone/empty")
    with pytest.raises(UnknownName, match="someone/nothing"):
        hub.fetch("someone/nothing", ["model.safetensors"], reference="hf:someone/nothing")


def test_a_snapshot_is_a_folder_of_the_requested_files(loopback: Hub) -> None:
    folder = loopback.repository("someone/model")
    (folder / "config.json").write_text(json.dumps({"a": 1}))
    (folder / "readme.md").write_text("hello")
    save_file({"x": torch.arange(5.0)}, folder / "model.safetensors")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    request = {"reference": "hf:someone/model", "needs": ["model.safetensors"]}
    take = partial(hub.snapshot, "someone/model", ["*.json", "*.safetensors"], **request)
    loopback.fault = "corrupt"
    with pytest.raises(LoadError, match=r"model\.safetensors"):
        take()
    snapshot = take()
    assert sorted(path.name for path in snapshot.iterdir()) == ["config.json", "model.safetensors"]
    requests = len(loopback.asked)
    assert take() == snapshot
    assert len(loopback.asked) == requests
