"""Pipes, sockets, devices, folders and links in the place of files: one sentence, and nothing waits for them."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import prisma_core as prisma
from prisma_core import ActivationCache, HookedViT, LoadError, PrismaError

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


def bound(path: Path) -> None:
    os.chdir(path.parent)  # the address of a socket is short
    socket.socket(socket.AF_UNIX).bind(path.name)


MAKERS: dict[str, Callable[[Path], Any]] = {
    "a pipe": os.mkfifo,
    "a socket": bound,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "an empty device": lambda path: path.symlink_to("/dev/null"),
    "a folder": Path.mkdir,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
}
DEVICES = ("a pipe", "a socket", "an endless device", "an empty device")
READERS: dict[str, Callable[[Path], Any]] = {
    "cache.safetensors": ActivationCache.load,
    "vit.safetensors": lambda path: prisma.load(f"dino:{path}"),
    "vit.pth": lambda path: prisma.load(f"timm:vit_tiny_patch16_224@{path}", depth=1),
    "toy.pth": lambda path: prisma.load(f"toy:{path}"),
    "open_clip_config.json": lambda path: prisma.load(f"open_clip:{path}", pretrained=False),
    "image.jpg": lambda path: prisma.load("toy:scenes-3l").preprocess(path),
    "config.json": lambda path: prisma.load(f"hf:{path.parent}"),
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Whatever waits longer than a minute fails, and does not hold the others up."""

    def give_up(*_: object) -> None:
        raise TimeoutError("still waiting")

    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", READERS)
def test_what_is_read_is_a_file(kind: str, name: str, tmp_path: Path) -> None:
    MAKERS[kind](tmp_path / name)
    with pytest.raises(PrismaError, match=r"\w+"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", ["spec.json", "model.safetensors"])
def test_a_saved_folder_holds_files(kind: str, name: str, vit: HookedViT, tmp_path: Path) -> None:
    folder = prisma.save(vit, tmp_path / "saved")
    for path in folder.glob(f"{Path(name).stem}*"):
        path.unlink()
        MAKERS[kind](path)
    with pytest.raises(LoadError, match=name.partition(".")[0]):
        prisma.load(f"file:{folder}")
    if name == "spec.json" and kind in DEVICES:
        with pytest.raises(LoadError, match="no regular file"):
            prisma.save(vit, folder)
