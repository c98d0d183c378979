"""Videos in: files read frame by frame, what is no video told in words, preprocessing like transformers' processors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

import prisma_core as prisma
from prisma_core import InputError, LoadError
from prisma_core.cli.app import main
from prisma_core.errors import PluginError
from prisma_core.inputs import Preprocess
from prisma_core.inputs.video import VideoPreprocess, evenly, read_video

av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'prisma-interp[video]'")
N, HEIGHT, WIDTH = 20, 24, 32
FILMS = {"ffv1.avi": "bgr0", "ffv1.mkv": "bgr0", "png.avi": "rgb24", "libx264.mp4": "yuv420p", "mpeg4.avi": "yuv420p"}
LOSSLESS = ("ffv1.avi", "ffv1.mkv", "png.avi")


def pixels(n: int = N) -> np.ndarray[Any, Any]:
    """Return frames whose colour says which they are, with a bar that grows."""
    frames = np.zeros((n, HEIGHT, WIDTH, 3), dtype=np.uint8)
    for index, frame in enumerate(frames):
        frame[:] = (10 * index, 240 - 10 * index, 90)
        frame[:8, : index + 1] = 200
    return frames


@pytest.fixture
def film(tmp_path: Path) -> Callable[..., Path]:
    """Write frames to a file with the codec that its name begins with."""

    def write(name: str, frames: np.ndarray[Any, Any] | None = None) -> Path:
        with av.open(str(tmp_path / name), "w") as file:
            stream = file.add_stream(name.partition(".")[0], rate=10)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, FILMS[name]
            stream.bit_rate = 10_000_000
            for frame in pixels() if frames is None else frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            file.mux(stream.encode())
        return tmp_path / name

    return write


def usable_torchcodec(path: Path) -> None:
    """Skip where torchcodec is not installed, or finds no FFmpeg to decode with."""
    decoders = pytest.importorskip("torchcodec.decoders", reason="torchcodec is not installed")
    try:
        decoders.VideoDecoder(str(path))
    except RuntimeError as error:
        if "Could not load" in str(error):
            pytest.skip("torchcodec finds no FFmpeg to decode with")


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("decoder", ["av", "torchcodec"])
@pytest.mark.parametrize("name", FILMS)
def test_frames_are_those_that_were_written(film: Callable[..., Path], name: str, decoder: Any) -> None:
    path = film(name)
    if decoder == "torchcodec":
        usable_torchcodec(path)
    read = read_video(path, decoder=decoder)
    assert read.dtype == torch.uint8
    assert read.shape == (N, HEIGHT, WIDTH, 3)
    if name in LOSSLESS:
        assert np.array_equal(read.numpy(), pixels())
    # Lossy codecs blur; still, each frame is nearest to the one it was.
    away = np.abs(read.numpy()[:, None].astype(int) - pixels()[None]).mean((2, 3, 4))
    assert away.argmin(axis=1).tolist() == list(range(N))


@pytest.mark.parametrize("wanted", [1, 3, 7, N])
def test_frames_are_taken_evenly(film: Callable[..., Path], wanted: int) -> None:
    read = read_video(film("ffv1.avi"), wanted)
    assert np.array_equal(read.numpy(), pixels()[evenly(N, wanted, "it")])
    assert evenly(N, wanted, "it") == np.arange(0, N, N / wanted).astype(int)[:wanted].tolist()


def test_a_header_that_does_not_count_frames(film: Callable[..., Path]) -> None:
    path = film("ffv1.mkv")
    with av.open(str(path)) as file:
        assert file.streams.video[0].frames == 0
    assert np.array_equal(read_video(path, 4).numpy(), pixels()[[0, 5, 10, 15]])


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("name", ["ffv1.avi", "libx264.mp4", "mpeg4.avi"])
def test_a_file_that_is_cut_off(film: Callable[..., Path], name: str, share: float) -> None:
    path = film(name)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match=rf"{name} is (cut off: it promises 20|not a video that PyAV can read, or is)"):
        read_video(path, 4, decoder="av")


def test_files_that_are_no_videos(film: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video" * 100)
    (tmp_path / "empty.mp4").touch()
    with av.open(str(tmp_path / "sound.wav"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        sound.rate = 8000
        file.mux(stream.encode(sound))
        file.mux(stream.encode())
    for name, told in {
        "text.mp4": "begins like no video",
        "empty.mp4": "begins like no video",
        "sound.wav": "holds no video stream: it holds audio",
        "absent.mp4": "No video at",
        ".": "No video at",
    }.items():
        with pytest.raises(InputError, match=told):
            read_video(tmp_path / name)
    with pytest.raises(InputError, match=r"ffv1\.avi has 20 frames, and 21 are wanted"):
        read_video(film("ffv1.avi"), 21)
    for few in (0, -3):
        with pytest.raises(InputError, match=f"frames, how many to take, as a whole number of at least 1, got {few}"):
            read_video(film("ffv1.avi"), few)


def test_without_a_decoder_it_says_what_to_install(film: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = film("ffv1.avi")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    monkeypatch.setitem(__import__("sys").modules, "torchcodec.decoders", None)
    with pytest.raises(PluginError, match=r"needs torchcodec or PyAV: pip install \"prisma-interp\[video\]\""):
        read_video(path)
    with pytest.raises(PluginError, match="torchcodec is not installed, or finds no FFmpeg"):
        read_video(path, decoder="torchcodec")


# ---------------------------------------------------------------- preprocessing

EACH = Preprocess(size=(16, 16), mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4), crop=0.9)


def test_every_form_of_a_video_gives_the_same_tensor(film: Callable[..., Path], tmp_path: Path) -> None:
    path, frames = film("ffv1.avi"), pixels()
    preprocess = VideoPreprocess(frames=5, each=EACH)
    made = preprocess(path)
    assert made.shape == (1, 5, 3, 16, 16)
    assert torch.equal(made[0], EACH(list(frames[[0, 4, 8, 12, 16]])))
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(tmp_path / "first.png")
    files = [str(tmp_path / "first.png"), *images[1:]]
    for form in (str(path), frames, torch.from_numpy(frames), list(frames), images, files, frames / 255):
        assert torch.equal(preprocess(form), made)
    assert torch.equal(preprocess([frames, images]), made.repeat(2, 1, 1, 1, 1))
    for forms in ([path, str(path)], [path, frames], (images, str(path))):
        assert torch.equal(preprocess(forms), made.repeat(2, 1, 1, 1, 1))
    still = [str(tmp_path / "first.png")] * 5  # images' files are frames
    assert torch.equal(preprocess(still), EACH(frames[0])[None].repeat(1, 5, 1, 1, 1))
    assert torch.allclose(preprocess.denormalise(made)[0], EACH.denormalise(made[0]))


def test_what_preprocessing_does_not_take() -> None:
    preprocess = VideoPreprocess(frames=5, each=EACH)
    with pytest.raises(InputError, match="The video has 4 frames, and 5 are wanted"):
        preprocess(pixels(4))
    with pytest.raises(InputError, match=r"Expected a path, a list of frames or pixels .* of shape \[24, 32, 3\]"):
        preprocess(pixels()[0])
    with pytest.raises(InputError, match="got int"):
        preprocess(7)
    with pytest.raises(InputError, match="The video has 0 frames"):
        preprocess([])
    with pytest.raises(InputError, match="NaN or infinite"):
        preprocess(np.full((5, 8, 8, 3), np.nan))


def test_preprocessing_survives_json() -> None:
    for facts in (EACH, VideoPreprocess(frames=5, each=EACH.model_copy(update={"corner": "floor"}))):
        assert type(facts).model_validate_json(facts.model_dump_json()) == facts
    with pytest.raises(ValidationError, match="frames"):
        VideoPreprocess.model_validate({"each": EACH.model_dump(), "frames": 0})


# ---------------------------------------------------------------- transformers' processors


@pytest.fixture
def cases() -> Any:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'prisma-interp[video]'")
    from prisma_vivit import cases

    return cases


@pytest.mark.parametrize("name", ["VivitVideoProcessor", "VideoMAEVideoProcessor", "TimesformerVideoProcessor"])
@pytest.mark.parametrize("size", [(61, 44), (43, 90), (240, 131)])
def test_a_video_comes_out_as_from_transformers(cases: Any, name: str, size: tuple[int, int]) -> None:
    from prisma_vivit import preprocess_of

    theirs = cases.processor(name)
    video = np.random.default_rng(0).integers(0, 256, (4, *size, 3)).astype(np.uint8)
    expected = theirs(video, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(preprocess_of(theirs, 4)(video), expected, rtol=0, atol=1e-5)


def test_processors_that_leave_frames_at_their_size_are_refused(cases: Any) -> None:
    import transformers
    from prisma_vivit import preprocess_of

    kind = transformers.VideoMAEVideoProcessor
    cut = {"height": 30, "width": 40}
    for options, told in (
        ({"do_center_crop": False}, "leaves frames at a size of their own"),
        ({"do_resize": False}, "leaves frames at a size of their own"),
        ({"crop_size": cut}, "cuts frames to a size that is not square"),
        ({"crop_size": cut, "size": {"height": 50, "width": 60}}, "resizes frames to one shape"),
    ):
        with pytest.raises(LoadError, match=f"VideoMAEVideoProcessor {told}"):
            preprocess_of(kind(**options), 4)


def test_a_saved_model_takes_a_file(
    cases: Any, film: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from prisma_vivit import preprocess_of

    upstream = cases.small("VivitForVideoClassification", **cases.VIVIT | {"num_channels": 3, "image_size": [40, 40]})
    model = prisma.adapt(upstream)
    model.preprocess = preprocess_of(cases.processor("VivitImageProcessor"), model.spec.n_frames)
    back = prisma.load(f"file:{prisma.save(model, tmp_path / 'saved')}")
    assert back.preprocess == model.preprocess
    path = film("ffv1.avi")
    video = back.preprocess(path)
    with torch.no_grad():
        torch.testing.assert_close(back(video), upstream(video).logits, rtol=0, atol=1e-5)
    assert main(["registers", f"file:{tmp_path / 'saved'}", str(path), str(path)]) == 0
    assert "2 videos, 0 registers" in capsys.readouterr().out
