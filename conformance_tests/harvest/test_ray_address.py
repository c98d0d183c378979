"""A cluster that is not there is one error at once, and leaves nothing that counts as a harvest."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from prisma_harvest import harvest

from prisma_core import HookedViT, PluginError

pytest.importorskip("ray.data", reason="the extra 'scale' is not installed")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "host.invalid:6379", "127.0.0.1:99999999"])
def test_an_address_where_nobody_listens(model: HookedViT, tmp_path: Path, address: str) -> None:
    start, images = time.monotonic(), list(torch.randn(4, 3, 6, 6, dtype=torch.float64))
    with pytest.raises(PluginError, match=rf"No Ray cluster at '{address}'"):
        harvest(model, images, ("resid_post", 0), out=tmp_path, preprocess=None, workers=0, ray=address)
    assert time.monotonic() - start < 30
    assert not list(tmp_path.rglob("*.safetensors"))
