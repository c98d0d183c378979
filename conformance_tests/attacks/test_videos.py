"""Playlists and lists of files under the name of a film: none is followed, to a file or to an address."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import PLAYLISTS

from prisma_core import InputError
from prisma_core.inputs import video
from prisma_core.inputs.video import read_video

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'prisma-interp[video]'")


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """A film of 4 frames."""
    with av.open(str(tmp_path / "film.mkv"), "w") as file:
        stream = file.add_stream("ffv1", rate=4)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), dtype=np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return tmp_path / "film.mkv"


@pytest.fixture
def door() -> Iterator[socket.socket]:
    """A socket that nobody is to knock at."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.setblocking(False)
        yield listening


@pytest.mark.parametrize("guard", ["beginning", "formats"])
@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("name", ["list.mp4", "list.avi", "list.m3u8"])
def test_a_list_is_not_followed(
    kind: str, name: str, guard: str, film: Path, door: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By either guard alone: how the file begins, and the formats that FFmpeg may take it for."""
    port = door.getsockname()[1]
    text = PLAYLISTS[kind].format(film=film.name, address=f"http://127.0.0.1:{port}/a.mp4", port=port)
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    if guard == "formats":
        monkeypatch.setattr(video, "_check_beginning", lambda _: None)
    else:
        monkeypatch.setattr(video, "WHITELISTS", {})
    told = (
        "begins like no video: expected MP4.*Playlists" if guard == "beginning" else "is not a video that PyAV can read"
    )
    with pytest.raises(InputError, match=rf"{name} {told}"):
        read_video(tmp_path / name)
    with pytest.raises(BlockingIOError):
        door.accept()


def test_without_guards_a_list_is_followed(film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list.mp4").write_text(PLAYLISTS["ffconcat"].format(film=film.name))
    guards: dict[str, Any] = {"_check_beginning": lambda path: None, "WHITELISTS": {}}
    for name, nothing in guards.items():
        monkeypatch.setattr(video, name, nothing)
    assert len(read_video(tmp_path / "list.mp4")) == len(read_video(film)) == 4
