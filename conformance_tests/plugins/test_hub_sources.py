"""Downloads, end to end, from a hub on loopback: what comes, what breaks off, what comes corrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loopback import Hub
from safetensors.torch import save_file

import prisma_core as prisma
from prisma_core import LoadError

timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'prisma-interp[timm]'")

NAME = "vit_tiny_patch16_224"
SMALL = {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 32}
IMAGE = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)


@pytest.fixture
def upstream(loopback: Hub) -> torch.nn.Module:
    """A model whose weights, in timm's own format, are on the hub."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, pretrained=False, **SMALL).eval()
    folder = loopback.repository(timm.get_pretrained_cfg(NAME).hf_hub_id)
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


def test_weights_are_downloaded_once(loopback: Hub, upstream: torch.nn.Module) -> None:
    for _ in range(2):
        assert torch.equal(prisma.load(f"timm:{NAME}", **SMALL)(IMAGE), upstream(IMAGE))
    sent = [line for line in loopback.asked if line.startswith("GET") and line.endswith("model.safetensors")]
    assert len(sent) == 1


def test_a_download_that_comes_corrupted_is_an_error_and_the_next_try_succeeds(
    loopback: Hub, upstream: torch.nn.Module
) -> None:
    loopback.fault = "corrupt"
    with pytest.raises(LoadError, match=r"model\.safetensors came corrupted.*try again"):
        prisma.load(f"timm:{NAME}", **SMALL)
    assert torch.equal(prisma.load(f"timm:{NAME}", **SMALL)(IMAGE), upstream(IMAGE))


def test_a_download_that_breaks_off_again_and_again_is_an_error_and_the_next_try_succeeds(
    loopback: Hub, upstream: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub's library waits between its own tries
    loopback.fault, loopback.faults = "break off", 1000
    with pytest.raises(LoadError, match=r"timm:vit_tiny_patch16_224 broke off.*Try again"):
        prisma.load(f"timm:{NAME}", **SMALL)
    loopback.fault = None
    assert torch.equal(prisma.load(f"timm:{NAME}", **SMALL)(IMAGE), upstream(IMAGE))


def test_one_hiccup_is_no_error(loopback: Hub, upstream: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    loopback.fault = "break off"
    assert torch.equal(prisma.load(f"timm:{NAME}", **SMALL)(IMAGE), upstream(IMAGE))


def test_a_file_that_went_bad_in_the_cache_is_fetched_again_at_the_next_try(
    loopback: Hub, upstream: torch.nn.Module, tmp_path: Path
) -> None:
    prisma.load(f"timm:{NAME}", **SMALL)
    (kept,) = (tmp_path / "cache").rglob("model.safetensors")
    kept.resolve().write_bytes(b"not weights")
    with pytest.raises(LoadError, match="was removed: try again"):
        prisma.load(f"timm:{NAME}", **SMALL)
    assert torch.equal(prisma.load(f"timm:{NAME}", **SMALL)(IMAGE), upstream(IMAGE))
