"""Wrong references, options and checkpoints of ``timm:``: errors that name the nearest, before any download."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hostile import RunsCommand, truncate
from safetensors.torch import save_file
from torch import Tensor

import prisma_core as prisma
from prisma_core import InputError, LoadError, UnknownName

timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'prisma-interp[timm]'")

SMALL = {"depth": 1, "embed_dim": 24, "num_heads": 2, "num_classes": 5, "img_size": 32}
STATE = {"w": torch.arange(4000.0), "b": torch.ones(3)}


def test_a_reference_without_its_source_is_suggested() -> None:
    with pytest.raises(UnknownName, match="timm:vit_base_patch16_224"):
        prisma.load("vit_base_patch16_224")


def test_an_unknown_source_and_model_suggest_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"'tim'.*timm\?"):
        prisma.load("tim:vit_base_patch16_224")
    with pytest.raises(UnknownName, match=r"vit_tiny_patch16_244.*vit_tiny_patch16_224"):
        prisma.load("timm:vit_tiny_patch16_244", pretrained=False)


def test_an_unknown_tag_suggests_the_nearest() -> None:
    with pytest.raises(UnknownName, match="augreg_in21k_ft_in1k"):
        prisma.load("timm:vit_tiny_patch16_224.augreg_in21k_ft_in1")


@pytest.mark.parametrize(
    ("name", "option", "near"),
    [
        ("vit_tiny_patch16_224", "pretraned", "pretrained"),
        ("vit_tiny_patch16_224", "img_sise", "img_size"),
        ("vit_tiny_patch16_224", "chekpoint_path", "checkpoint_path"),
        ("eva02_tiny_patch14_224", "swigl_mlp", "swiglu_mlp"),
    ],
)
def test_a_misspelt_option_is_an_error_before_any_download(no_network: None, name: str, option: str, near: str) -> None:
    with pytest.raises(InputError, match=f"timm:{name}.*'{option}'.*{near}"):
        prisma.load(f"timm:{name}", **{option: False})


def test_options_that_a_class_reads_from_its_own_keywords(no_network: None) -> None:
    with pytest.raises(InputError, match="pritrained"):
        prisma.load("timm:naflexvit_base_patch16_gap", pretrained=False, pritrained=3)
    small = prisma.load("timm:vit_tiny_patch16_224", pretrained=False, **SMALL, pretrained_cfg_overlay={})
    assert len(small.blocks) == 1


def test_local_checkpoints_make_no_network_call(no_network: None, tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **SMALL).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    torch.save(model.state_dict(), tmp_path / "mine.pt")
    image = torch.randn(1, 3, 32, 32)
    for file in ("mine.safetensors", "mine.pt"):
        loaded = prisma.load(f"timm:vit_tiny_patch16_224@{tmp_path / file}", **SMALL)
        with torch.no_grad():
            torch.testing.assert_close(loaded(image), model(image), rtol=0, atol=1e-10)


def test_an_unreachable_hub_is_an_error(tmp_path: Path) -> None:
    """A fresh process, for the hub's address is read on import; its port is closed, its cache empty."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    code = (
        "import torch, timm, prisma_core as prisma\n"
        "try:\n    prisma.load('timm:vit_tiny_patch16_224')\n"
        "except prisma.LoadError as error:\n    print('LoadError', error)\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    environment |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    kind, message = run.stdout.split(" ", 1)
    assert kind == "LoadError", run.stderr
    assert "vit_tiny_patch16_224" in message


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.pop("blocks.0.attn.proj.bias"),
        lambda t: t.update({"blocks.1.norm1.bias": torch.ones(24)}),
        lambda t: t.update({"pos_embed": torch.ones(1, 7, 24)}),
    ],
    ids=["missing", "extra", "misshapen"],
)
def test_a_library_checkpoint_that_does_not_fit(edit: Callable[[dict[str, Tensor]], object], tmp_path: Path) -> None:
    state = timm.create_model("vit_tiny_patch16_224", pretrained=False, **SMALL).state_dict()
    keys = set(state)
    shape = state["pos_embed"].shape
    edit(state)
    changed = (keys ^ set(state)) or ({"pos_embed"} if state["pos_embed"].shape != shape else set())
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(LoadError) as caught:
        prisma.load(f"timm:vit_tiny_patch16_224@{tmp_path / 'odd.safetensors'}", **SMALL)
    assert changed.pop() in str(caught.value)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_library_checkpoint_that_is_damaged(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"bad.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(STATE, path)
    truncate(path)
    with pytest.raises(LoadError, match="truncated"):
        prisma.load(f"timm:vit_tiny_patch16_224@{path}", **SMALL)
    with pytest.raises(LoadError, match="No file"):
        prisma.load(f"timm:vit_tiny_patch16_224@{tmp_path / 'absent.pt'}", **SMALL)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_library_checkpoint_that_runs_code_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    torch.save({"head.bias": RunsCommand(mark)}, tmp_path / "wicked.pt")
    with pytest.raises(LoadError, match="refused"):
        prisma.load(f"timm:vit_tiny_patch16_224@{tmp_path / 'wicked.pt'}", **SMALL)
    assert not mark.exists()
