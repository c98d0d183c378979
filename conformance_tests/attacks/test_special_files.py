"""Pipes, sockets, devices, folders and links in the place of files: one sentence, and nothing waits for them."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import prisma_harvest
import prisma_sae
import pytest
import torch
from models import build
from prisma_conformance.report.results import read_certificates
from prisma_dino.heads import load_head
from prisma_lens import TunedLens
from prisma_patch import Circuit
from prisma_toy.training import Trainer
from written import SUBJECTS, same

import prisma_core as prisma
from prisma_core import ActivationCache, HookedViT, LoadError, PrismaError, Result
from prisma_core.plugin import read_video

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


class StillWaiting(BaseException):
    """Nothing takes it for an error of a file."""


def root() -> bool:
    return os.geteuid() == 0


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
    # As root, whom no permission keeps out, reading the memory at address 0 fails.
    "a file that cannot be read": lambda path: path.symlink_to("/proc/self/mem") if root() else path.touch(mode=0),
}
DEVICES = ("a pipe", "a socket", "an endless device", "an empty device")


def of_transformers(folder: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


READERS: dict[str, Callable[[Path], Any]] = {
    "cache.safetensors": ActivationCache.load,
    "vit.safetensors": lambda path: prisma.load(f"dino:{path}"),
    "vit.pth": lambda path: prisma.load(f"timm:vit_tiny_patch16_224@{path}", depth=1),
    "toy.pth": lambda path: prisma.load(f"toy:{path}"),
    "open_clip_config.json": lambda path: prisma.load(f"open_clip:{path}", pretrained=False),
    "image.jpg": lambda path: prisma.load("toy:scenes-3l").preprocess(path),
    "config.json": lambda path: prisma.load(f"hf:{path.parent}"),
    "x.safetensors": Result.load,
    "lens/config.json": lambda path: TunedLens.load(path.parent),
    "circuit.json": Circuit.load,
    "log.jsonl": read_certificates,
    "head.pth": load_head,
    "film.mp4": read_video,
    "sae.pt": prisma_sae.read,
    "shard.tar": lambda path: prisma_harvest.harvest(build(), str(path), "resid_post", out=path.parent / "out"),
    "image.png": lambda path: prisma_harvest.harvest(build(), [str(path)], "resid_post", out=path.parent / "out"),
    "run/config.json": lambda path: Trainer.resume(path.parent),
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Whatever waits longer than a minute fails, and does not hold the others up."""

    def give_up(*_: object) -> None:
        raise StillWaiting

    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", READERS)
def test_what_is_read_is_a_file(kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    MAKERS[kind](tmp_path / name)
    with pytest.raises(PrismaError, match=r"regular file|folder|[Nn]o (file|video|tar)|link|config|holds|read"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("kind", DEVICES)
def test_a_file_that_is_looked_for_code_is_one(kind: str, tmp_path: Path) -> None:
    MAKERS[kind](tmp_path / "more.json")
    with pytest.raises(LoadError, match=r"more\.json is no regular file"):
        prisma.load(f"hf:{of_transformers(tmp_path)}")


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", ["spec.json", "model.safetensors"])
def test_a_saved_folder_holds_files(kind: str, name: str, vit: HookedViT, tmp_path: Path) -> None:
    folder = prisma.save(vit, tmp_path / "saved")
    for path in folder.glob(f"{Path(name).stem}*"):
        path.unlink()
        MAKERS[kind](path)
    with pytest.raises(LoadError, match=name.partition(".")[0]):
        prisma.load(f"file:{folder}")
    if name == "spec.json" and kind in DEVICES:  # saving reads what is there, and replaces it
        prisma.save(vit, folder)
        assert torch.equal(prisma.load(f"file:{folder}").blocks[0].attn.W_Q, vit.blocks[0].attn.W_Q)


# What each subject writes besides: a file that is read when it is used, or one that is not read at all.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SUBJECTS)
def test_everything_that_prisma_wrote_is_files(name: str, tmp_path: Path) -> None:
    """Each file by each of these in turn: an error in words, or it is not needed for what was written."""
    (home := tmp_path / "home").mkdir()
    right = SUBJECTS[name].write(home) and SUBJECTS[name].read(home)
    files = [path.relative_to(home) for path in home.rglob("*") if path.is_file()]
    refused = 0
    for place in files:
        for make in MAKERS.values():
            shutil.copytree(home, other := tmp_path / "other")
            (other / place).unlink()
            make(other / place)
            try:
                assert same(SUBJECTS[name].read(other), right)
            except PrismaError as error:
                refused += 1
                assert "\n" not in str(error)  # noqa: PT017
            os.chdir(tmp_path)
            shutil.rmtree(other)
    assert refused >= len(MAKERS)


@contextmanager
def nobody() -> Iterator[None]:
    """Run a block as a user without rights, where the tests run as root."""
    (os.setegid(65534), os.seteuid(65534)) if (was := root()) else None
    try:
        yield
    finally:
        (os.seteuid(0), os.setegid(0)) if was else None


@pytest.fixture
def anyones() -> Iterator[Path]:
    """A folder in which every user may look; pytest's are root's alone."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SUBJECTS)
def test_everything_behind_a_closed_folder(name: str, anyones: Path) -> None:
    """Each file lies there and is linked to, and then what was written lies there as a whole."""
    (home := anyones / "home").mkdir()
    (closed := anyones / "closed").mkdir()
    right = SUBJECTS[name].write(home) and SUBJECTS[name].read(home)
    for place in [path.relative_to(home) for path in home.rglob("*") if path.is_file()]:
        shutil.copytree(home, other := anyones / "other")
        (other / place).rename(closed / "file")
        (other / place).symlink_to(closed / "file")
        closed.chmod(0)
        with nobody():
            try:
                assert same(SUBJECTS[name].read(other), right)
            except PrismaError as error:
                assert "\n" not in str(error)  # noqa: PT017
        closed.chmod(0o700)
        shutil.rmtree(other)
    home.chmod(0)
    with nobody(), pytest.raises(PrismaError, match=r"Permission denied|holds no harvest"):
        SUBJECTS[name].read(home)
    home.chmod(0o700)


# -------------------------------------------------------------------- one mechanism

# Calls that open a path to read, and what a function looks at before.
OPENS = re.compile(r"\.read_text\(|\.read_bytes\(|\b(safe_open|load_file)\(|\.open\((\"rb\"|encoding)|\bimages\.open\(")
LOOKS = re.compile(r"\b(check_regular|is_file|isfile)\(")
ELSEWHERE = {
    "plugins/prisma_sae/published.py": "a table in the package",
    "plugins/prisma_conformance/report/supported.py": "a table in a package",
    "plugins/prisma_conformance/new_plugin.py": "templates in the package",
}


def unlooked(code: str) -> list[str]:
    """Return the names of the functions that open a path and do not look at what it is."""
    functions = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef)]
    texts = {each.name: ast.get_source_segment(code, each) or "" for each in functions}
    return [name for name, text in texts.items() if OPENS.search(text) and not LOOKS.search(text)]


def test_nothing_is_opened_unlooked_at() -> None:
    root = Path(prisma.__file__).parents[1]
    files = [*root.glob("prisma_core/**/*.py"), *root.glob("plugins/**/*.py")]
    found = {path.relative_to(root).as_posix(): unlooked(path.read_text(encoding="utf-8")) for path in files}
    assert {name: functions for name, functions in found.items() if functions and name not in ELSEWHERE} == {}
    assert {name for name in ELSEWHERE if not found[name]} == set()  # none is left over


def test_an_opening_is_seen() -> None:
    code = "def a(p): return p.read_text()\ndef b(p):\n check_regular(p)\n return p.open('rb')\n"
    code += "def c(p): return safe_open(p)"
    assert unlooked(code) == ["a", "c"]
