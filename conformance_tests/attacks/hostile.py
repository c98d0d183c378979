"""Makers of hostile files: pickles that run commands, configurations with code, images that are programs, playlists."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any


class RunsCommand:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def truncate(path: Path) -> None:
    """Cut a file to its first half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_own_code(folder: Path, mark: Path, file: str = "config.json", **settings: Any) -> Path:
    """Write a configuration of transformers, with ``own.py`` beside it, which leaves a mark when it is imported."""
    folder.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(settings), encoding="utf-8")
    code = f"""
        import pathlib, transformers
        pathlib.Path({str(mark)!r}).touch()
        class Config(transformers.PretrainedConfig):
            model_type = "its_own"
        class Model(transformers.PreTrainedModel):
            config_class = Config
        class Words(transformers.PreTrainedTokenizerFast):
            pass
        class Images(transformers.BaseImageProcessor):
            pass
    """
    (folder / "own.py").write_text("\n".join(line[8:] for line in code.splitlines()), encoding="utf-8")
    return folder


def postscript(path: Path) -> Path:
    """Write an image that is a program: Pillow hands it to Ghostscript, whatever its name."""
    lines = ["%!PS-Adobe-3.0 EPSF-3.0", "%%BoundingBox: 0 0 10 10", "%%EndComments", "showpage", "%%EOF", ""]
    path.write_text("\n".join(lines))
    return path


def ghostscript(folder: Path, mark: Path) -> Path:
    """Write a program in the place of Ghostscript, which leaves a mark, and return its folder."""
    folder.mkdir()
    (folder / "gs").write_text(f"#!/bin/sh\ntouch '{mark}'\nexit 1\n")
    (folder / "gs").chmod(0o755)
    return folder


_DASH = "<MPD profiles='urn:mpeg:dash:profile:isoff-on-demand:2011'><BaseURL>{address}</BaseURL></MPD>"
_SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n"
# Texts that name a film, or an address, for FFmpeg to follow.
PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile {film}\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{address}\n#EXT-X-ENDLIST\n",
    "sdp": f"{_SDP}a=rtpmap:96 H264/90000\n",
    "dash": f'<?xml version="1.0"?>{_DASH}',
    "dash in a film": f"\x1aE\xdf\xa3{_DASH}",
}


def pickled(path: Path, data: bytes, tensor: bytes = b"") -> Path:
    """Write a file in the form of ``torch.save`` whose pickle is these instructions, with one storage, called ``0``."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {"data.pkl": data, "byteorder": b"little", "version": b"3\n", "data/0": tensor}.items():
            archive.writestr(f"archive/{name}", content)
    return path


def state_of(numel: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """Return the pickle of ``{"w": tensor}`` with a tensor of float32 that claims these sizes."""

    def number(n: int) -> bytes:
        return f"I{n}\n".encode()

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\n" + number(numel) + b"tQ"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + numbers(shape) + numbers(stride)
    return b"\x80\x02}Vw\n" + rebuilt + b"\x89ccollections\nOrderedDict\n)RtRs."
