"""From video files to the tensor a model of videos takes."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from prisma_core.errors import InputError, PluginError
from prisma_core.errors.arguments import expect, number
from prisma_core.files.texts import check_regular
from prisma_core.inputs import ImageLike, Preprocess
from prisma_core.spec import Facts

Decoder: TypeAlias = Literal["torchcodec", "av"]
Video: TypeAlias = "str | Path | Tensor | Sequence[ImageLike] | Any"
_ENDINGS = """
    3g2 3gp asf avi divx f4v flv m2ts m4v mjpeg mkv mov mp4 mpe mpeg mpg mts ogm ogv qt ts vob webm wmv
"""
FILMS = frozenset(f".{ending}" for ending in _ENDINGS.split())
# FFmpeg's names of what holds a film's own bytes. Its other formats are lists of files and addresses, or devices.
_DEMUXERS = """
    mov,mp4,m4a,3gp,3g2,mj2 matroska,webm avi mpeg mpegts mpegvideo m4v h264 hevc ivf ogg flv asf
    rm mxf mjpeg gif wav
"""
WHITELISTS = {"format_whitelist": ",".join(_DEMUXERS.split()), "protocol_whitelist": "file"}
# How such files begin, in the order of their names; lists begin with a line of text.
_BEGINNINGS = re.compile(
    rb".{4}(ftyp|moov|mdat|free|skip|wide|pnot|uuid)|\x1aE\xdf\xa3|RIFF.{4}|\0\0\0?\x01|G.{187}G|.{4}G.{191}G|DKIF|OggS|FLV"
    rb"|\x30\x26\xb2\x75|\.RMF|\x06\x0e\x2b\x34|\xff\xd8\xff|GIF8",
    re.DOTALL,
)
_LISTS = (b"<mpd", b"<composition")  # found by FFmpeg anywhere in what is before the first zero
INSTALL = 'pip install "prisma-interp[video]"'


class VideoPreprocess(Facts):
    """Frames taken evenly from a video, each prepared like an image.

    Attributes:
        frames: how many the model takes.
        each: from one frame to its tensor.
    """

    frames: int = Field(gt=0)
    each: Preprocess

    def __call__(self, video: Video | Sequence[Video]) -> Float[Tensor, "batch frame channel height width"]:
        """Return ``[batch frame channel height width]`` of one video or a list of them.

        Args:
            video: the path of a file, an array or tensor ``[frame height width channel]``, or a list of frames, each
                anything that is an image. A list of paths of video files, of arrays or of lists of frames: several
                videos.

        Raises:
            InputError: it is no video, or has fewer frames than the model takes.
        """
        if isinstance(video, list | tuple) and any(_is_video(one) for one in cast("Sequence[object]", video)):
            return torch.cat([self(one) for one in cast("Sequence[Video]", video)])
        if isinstance(video, str | Path):
            frames: Any = read_video(video, self.frames)
        else:
            frames = [video[index] for index in evenly(_length(video), self.frames, "The video")]
        return self.each(frames)[None]

    def denormalise(self, pixels: Tensor) -> Tensor:
        """Return normalised pixels ``[... channel height width]`` in 0..1 again."""
        return self.each.denormalise(pixels)


def read_video(
    path: str | Path, frames: int | None = None, *, decoder: Decoder | None = None
) -> UInt8[Tensor, "frame height width 3"]:
    """Return frames of a video file, bytes ``[frame height width channel]``.

    A turn that a file asks players for is not made: frames come as they are stored.

    Args:
        path: the file.
        frames: how many to take, evenly: the first of each of so many equal parts. None for all.
        decoder: what decodes; None for torchcodec where it is installed and works, else PyAV.

    Raises:
        InputError: there is no such file, it is no video, is cut off or damaged, or has fewer frames; or fewer than one
            frame is wanted.
        LoadError: it may not be read.
        PluginError: neither torchcodec nor PyAV is installed.
    """
    frames = None if frames is None else number(frames, "frames, how many to take,", 1)
    path = Path(expect(path, (str, Path), "the path of a video"))
    _check_beginning(path)
    if decoder == "torchcodec" or (decoder is None and _torchcodec() is not None):
        try:
            return _read_with_torchcodec(path, frames)
        except InputError:
            # Installed without FFmpeg's libraries it can read nothing. What PyAV makes of the file stands.
            if decoder is not None or importlib.util.find_spec("av") is None:
                raise
    return _read_with_av(path, frames)


def _check_beginning(path: Path) -> None:
    """Refuse what a decoder may take for a list of other files or addresses, and what is no file (``InputError``)."""
    if not path.is_file():
        raise InputError(f"No video at {str(path)!r}.")
    check_regular(path)
    with path.open("rb") as file:
        head = file.read(1 << 20)
    text = head.partition(b"\0")[0].lower()
    if _BEGINNINGS.match(head) is None or any(name in text for name in _LISTS):
        raise InputError(
            f"{path} begins like no video: expected MP4, Matroska, AVI, MPEG, Ogg or the like. Playlists and lists of "
            "files are not followed."
        )


def evenly(n: int, number: int | None, what: str) -> list[int]:
    """Return which of ``n`` frames to take: the first of each of ``number`` equal parts; an ``InputError`` for fewer.

    Source: transformers' default_sample_indices_fn.

    >>> evenly(10, 4, "a film")
    [0, 2, 5, 7]
    """
    if number is None:
        return list(range(n))
    if n < number:
        raise InputError(f"{what} has {n} frame{'s' if n != 1 else ''}, and {number} are wanted.")
    return [index * n // number for index in range(number)]


def _is_video(video: object) -> bool:
    """Whether this is a whole video, not a frame; files are recognised by their ending."""
    if isinstance(video, str | Path):
        return Path(video).suffix.lower() in FILMS
    return isinstance(video, list | tuple) or getattr(video, "ndim", 0) == 4


def _length(video: Any) -> int:
    if isinstance(video, list | tuple):
        return len(cast("Sequence[object]", video))
    if getattr(video, "ndim", None) != 4:
        shape = f" of shape {list(video.shape)}" if hasattr(video, "shape") else ""
        raise InputError(
            f"Expected a path, a list of frames or pixels [frame height width channel], "
            f"got {type(video).__name__}{shape}."
        )
    return len(video)


# -------------------------------------------------------------------- decoders


def _torchcodec() -> Any:
    """Return torchcodec's decoders, or None where they are not installed or cannot run."""
    try:
        return importlib.import_module("torchcodec.decoders")
    except (ImportError, RuntimeError, OSError):  # versions of it that load FFmpeg's libraries when imported
        return None


def _read_with_torchcodec(path: Path, frames: int | None) -> Tensor:
    decoders = _torchcodec()
    if decoders is None:
        raise PluginError("torchcodec is not installed, or finds no FFmpeg to decode with: decoder='av' does without.")
    try:
        reader = decoders.VideoDecoder(str(path.resolve()))
        facts = reader.metadata
        _whole(path, facts.num_frames_from_content, facts.num_frames_from_header)
        indices = evenly(len(reader), frames, str(path))
        return reader.get_frames_at(indices).data.permute(0, 2, 3, 1).contiguous()
    except (RuntimeError, ValueError, IndexError) as error:
        first = str(error).strip().partition("\n")[0].rpartition(".cpp:")[2]
        raise InputError(f"{path} is not a video that torchcodec can read: {first}") from error


def _read_with_av(path: Path, frames: int | None) -> Tensor:
    try:
        av = importlib.import_module("av")
    except ImportError as error:
        raise PluginError(f"Reading videos needs torchcodec or PyAV: {INSTALL}.") from error
    try:
        n = _count_with_av(av, path)
        places = set(indices := evenly(n, frames, str(path)))
        images: list[Tensor] = []
        with _opened(av, path) as file:
            for index, frame in enumerate(file.decode(file.streams.video[0])):
                if index in places:
                    images.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
                if len(images) == len(indices):
                    break
    except (av.error.FFmpegError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "its names are no text"
        raise InputError(f"{path} is not a video that PyAV can read, or is damaged: {problem}.") from error
    if len({frame.shape for frame in images}) > 1:
        raise InputError(f"The frames of {path} change their size on the way.")
    return torch.stack(images)


def _opened(av: Any, path: Path) -> Any:
    """Return a file opened by PyAV, and none that it names; in an absolute path FFmpeg sees no address."""
    return av.open(str(path.resolve()), options=dict(WHITELISTS))


def _count_with_av(av: Any, path: Path) -> int:
    """Return how many frames there are. What a header says may be missing or wrong, so they are decoded and counted."""
    with _opened(av, path) as file:
        if not file.streams.video:
            kinds = ", ".join(sorted({stream.type for stream in file.streams})) or "nothing"
            raise InputError(f"{path} holds no video stream: it holds {kinds}.")
        stream = file.streams.video[0]
        promised, packets, decoded = stream.frames, 0, 0
        for packet in file.demux(stream):
            packets += packet.size > 0
            decoded += len(packet.decode())
    _whole(path, packets, promised)
    return decoded


def _whole(path: Path, decoded: int | None, promised: int | None) -> None:
    if decoded is not None and promised and decoded < promised:
        raise InputError(f"{path} is cut off: it promises {promised} frames, and {decoded} are there.")
    if decoded == 0:
        raise InputError(f"{path} holds no frames.")
