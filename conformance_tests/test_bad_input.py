"""Whatever comes in, what goes out is a right number or one clear error."""

from __future__ import annotations

import copy
import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import prisma_core as prisma
from prisma_core import HookedViT, HookError, InputError, LoadError, UnknownName
from prisma_core.files.checkpoint import read_checkpoint
from prisma_core.inputs import Preprocess
from prisma_core.saving.folder import SPEC, WEIGHTS


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to open a socket fails the test."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a network call")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


SMALL = {"depth": 1, "embed_dim": 24, "num_heads": 2, "num_classes": 5, "img_size": 32}

# ---------------------------------------------------------------- references


@pytest.mark.parametrize("reference", ["", ":", "timm:", ":vit_base_patch16_224", "vit_base_patch16_224", "/etc"])
def test_what_is_no_reference(reference: str) -> None:
    with pytest.raises(UnknownName, match=r"is not a reference: expected SOURCE:MODEL, such as timm:"):
        prisma.load(reference)


def test_a_reference_without_its_source_is_suggested() -> None:
    pytest.importorskip("timm")
    with pytest.raises(UnknownName, match=r"Did you mean timm:vit_base_patch16_224 or"):
        prisma.load("vit_base_patch16_224")


def test_a_folder_without_its_source_is_suggested(vit: HookedViT, tmp_path: Path) -> None:
    prisma.save(vit, tmp_path)
    with pytest.raises(UnknownName, match=f"Did you mean file:{tmp_path}\\?"):
        prisma.load(str(tmp_path))


def test_an_unknown_source_and_model_suggest_the_nearest() -> None:
    pytest.importorskip("timm")
    with pytest.raises(UnknownName, match=r"No source 'tim'.*Did you mean timm\?"):
        prisma.load("tim:vit_base_patch16_224")
    with pytest.raises(UnknownName, match=r"vit_tiny_patch16_244.*Did you mean vit_tiny_patch16_224"):
        prisma.load("timm:vit_tiny_patch16_244", pretrained=False)


def test_an_unknown_tag_suggests_the_nearest() -> None:
    pytest.importorskip("timm")
    with pytest.raises(UnknownName, match=r"augreg_in21k_ft_in1k"):
        prisma.load("timm:vit_tiny_patch16_224.augreg_in21k_ft_in1")


def test_a_device_that_is_none(vit: HookedViT, tmp_path: Path) -> None:
    reference = f"file:{prisma.save(vit, tmp_path)}"
    with pytest.raises(LoadError, match="cannot be put on device=abacus"):
        prisma.load(reference, device="abacus")


def test_an_option_that_no_source_takes(vit: HookedViT, tmp_path: Path) -> None:
    reference = f"file:{prisma.save(vit, tmp_path)}"
    with pytest.raises(InputError, match=r"file: takes no 'pretraned'\. It takes none"):
        prisma.load(reference, pretraned=False)


@pytest.mark.parametrize(
    ("name", "option", "near"),
    [
        ("vit_tiny_patch16_224", "pretraned", "pretrained"),
        ("vit_tiny_patch16_224", "img_sise", "img_size"),
        ("vit_tiny_patch16_224", "chekpoint_path", "checkpoint_path"),
        ("eva02_tiny_patch14_224", "swigl_mlp", "swiglu_mlp"),
    ],
)
def test_a_misspelt_option_is_told_before_any_download(no_network: None, name: str, option: str, near: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(InputError, match=rf"timm:{name} takes no '{option}'\. Did you mean {near}"):
        prisma.load(f"timm:{name}", **{option: False})


def test_options_that_a_class_reads_itself(no_network: None) -> None:
    pytest.importorskip("timm")
    with pytest.raises(InputError, match="pritrained"):
        prisma.load("timm:naflexvit_base_patch16_gap", pretrained=False, pritrained=3)
    small = prisma.load("timm:vit_tiny_patch16_224", pretrained=False, **SMALL, pretrained_cfg_overlay={})
    assert len(small.blocks) == 1


# ---------------------------------------------------------------- folders


def test_a_file_where_a_folder_should_be(vit: HookedViT, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    for path in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(LoadError, match=r"Expected a folder to save into, got .*taken"):
            prisma.save(vit, path)
    assert (tmp_path / "taken").read_text() == "mine"


def test_the_folder_above_a_model(vit: HookedViT, tmp_path: Path) -> None:
    for name in ("aaa", "model"):
        prisma.save(vit, tmp_path / name)
    with pytest.raises(LoadError, match=rf"holds no spec\.json.* Did you mean file:{tmp_path / 'model'}\?"):
        prisma.load(f"file:{tmp_path}")


# ---------------------------------------------------------------- caches


@pytest.mark.parametrize("device", ["cudda", "cuda:99", "gpu"])
def test_a_cache_on_a_device_that_is_none(vit: HookedViT, image: Tensor, device: str) -> None:
    with pytest.raises(InputError, match=rf"Expected a device of torch's, got '{device}'; there is cpu"):
        vit.run_with_cache(image, device=device)
    with pytest.raises(InputError, match=device), vit.caching(device=device):
        pass


def test_gradients_without_a_loss(vit: HookedViT, image: Tensor) -> None:
    _, cache = vit.run_with_cache(image, names="z")
    assert cache.gradients is None
    with pytest.raises(prisma.errors.NotApplicable, match=r"holds no gradients: take it with run_with_cache\(.*loss="):
        _ = cache.grad["z", 0]


def test_a_class_by_its_words(vit: HookedViT, image: Tensor) -> None:
    _, cache = vit.run_with_cache(image)
    vit.labels = ("🔴 red circle", "🟥 red square", "Emu, large", "fox", "⭐ star", "🌟 star", "hen")
    for given, index in (("red circle", 0), ("Red Square", 1), ("emu large", 2), ("🔴 red circle", 0), ("⭐ star", 4)):
        assert torch.equal(cache.logit_constant(given), cache.logit_constant(index)), given
    for given in ("star", "circle"):  # two of them, none of them
        with pytest.raises(UnknownName, match=f"No class '{given}'"):
            cache.logit_constant(given)


# ---------------------------------------------------------------- the network


def test_local_models_make_no_network_call(no_network: None, vit: HookedViT, image: Tensor, tmp_path: Path) -> None:
    loaded = prisma.load(f"file:{prisma.save(vit, tmp_path)}")
    assert torch.equal(loaded(image), vit(image))


def test_local_checkpoints_make_no_network_call(no_network: None, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
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


def test_an_unreachable_hub_is_an_error_in_seconds(tmp_path: Path) -> None:
    """A fresh process, for the hub's address is read on import; its port is closed, its cache empty."""
    pytest.importorskip("timm")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    code = (
        "import time, torch, timm, prisma_core as prisma\n"
        "start = time.monotonic()\n"
        "try:\n    prisma.load('timm:vit_tiny_patch16_224')\n"
        "except prisma.LoadError as error:\n    print('LoadError', time.monotonic() - start, error)\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    environment |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    kind, seconds, message = run.stdout.split(" ", 2)
    assert kind == "LoadError", run.stderr
    assert float(seconds) < 30
    assert "vit_tiny_patch16_224" in message


# ---------------------------------------------------------------- files of weights


class Wicked:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


STATE = {"w": torch.arange(4000.0), "b": torch.ones(3)}


def test_readable_checkpoints(tmp_path: Path) -> None:
    for name, value in {"flat.pt": STATE, "nested.pth": {"model": STATE, "epoch": 3}}.items():
        torch.save(value, tmp_path / name)
        found = read_checkpoint(tmp_path / name)
        assert found.keys() == STATE.keys()
        assert all(torch.equal(found[key], STATE[key]) for key in STATE)
    save_file(STATE, tmp_path / "flat.safetensors")
    assert torch.equal(read_checkpoint(tmp_path / "flat.safetensors")["w"], STATE["w"])


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage"])
def test_damaged_checkpoints(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"bad.{suffix}"
    if damage == "truncated":
        (save_file if suffix == "safetensors" else torch.save)(STATE, path)
        _half(path)
    else:
        path.write_bytes(b"" if damage == "empty" else b"these are not the weights you are looking for" * 20)
    with pytest.raises(LoadError, match=rf"bad\.{suffix} is not a"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, legacy: bool) -> None:
    mark = tmp_path / "it ran"
    torch.save({"w": STATE["w"], "x": Wicked(mark)}, tmp_path / "wicked.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(LoadError, match=r"wants to run (posix|nt)\.mkdir: refused"):
        read_checkpoint(tmp_path / "wicked.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Wicked(mark)))
    with pytest.raises(LoadError):
        read_checkpoint(tmp_path / "plain.pkl")
    assert not mark.exists()


def test_checkpoints_without_one_state_dict(tmp_path: Path) -> None:
    torch.save({"model": STATE, "ema": STATE}, tmp_path / "two.pt")
    with pytest.raises(LoadError, match=r"2 state dicts \(model, ema\)"):
        read_checkpoint(tmp_path / "two.pt")
    torch.save([1, 2], tmp_path / "none.pt")
    with pytest.raises(LoadError, match="holds a list without a state dict"):
        read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(LoadError, match="No file at"):
        read_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(LoadError, match="is a folder"):
        read_checkpoint(tmp_path)


@pytest.fixture
def folder(vit: HookedViT, tmp_path: Path) -> Path:
    return prisma.save(vit, tmp_path / "saved")


def _edited(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> str:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    return f"file:{folder}"


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda t: t.pop("head.bias"), "missing head.bias"),
        (lambda t: t.update(spare=torch.ones(2)), "extra spare"),
        (lambda t: t.update({"head.bias": torch.ones(9)}), r"head.bias has shape \[9\], expected \[7\]"),
    ],
)
def test_weights_that_do_not_fit(folder: Path, edit: Callable[[dict[str, Tensor]], object], told: str) -> None:
    with pytest.raises(LoadError, match=rf"does not fit the model: {told}\."):
        prisma.load(_edited(folder, edit))


def test_a_truncated_folder(folder: Path) -> None:
    _half(folder / WEIGHTS)
    with pytest.raises(LoadError, match="not a readable safetensors file"):
        prisma.load(f"file:{folder}")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"spec": 3}', '{"spec": {"d_model": 0}}'],
)
def test_a_spec_that_is_none(folder: Path, text: str) -> None:
    (folder / SPEC).write_text(text)
    with pytest.raises(LoadError, match=r"spec\.json does not describe a model"):
        prisma.load(f"file:{folder}")


def test_a_spec_with_a_fact_nobody_knows(folder: Path) -> None:
    facts = json.loads((folder / SPEC).read_text())
    facts["spec"]["colour"] = "green"
    (folder / SPEC).write_text(json.dumps(facts))
    with pytest.raises(LoadError, match="colour"):
        prisma.load(f"file:{folder}")


def test_a_folder_with_a_file_missing(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(LoadError, match=r"holds no model\.safetensors: expected a folder written by prisma\.save"):
        prisma.load(f"file:{folder}")


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
    timm = pytest.importorskip("timm")
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
    pytest.importorskip("timm")
    path = tmp_path / f"bad.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(STATE, path)
    _half(path)
    with pytest.raises(LoadError, match="truncated"):
        prisma.load(f"timm:vit_tiny_patch16_224@{path}", **SMALL)
    with pytest.raises(LoadError, match="No file"):
        prisma.load(f"timm:vit_tiny_patch16_224@{tmp_path / 'absent.pt'}", **SMALL)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_library_checkpoint_that_runs_code_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    mark = tmp_path / "it ran"
    torch.save({"head.bias": Wicked(mark)}, tmp_path / "wicked.pt")
    with pytest.raises(LoadError, match="refused"):
        prisma.load(f"timm:vit_tiny_patch16_224@{tmp_path / 'wicked.pt'}", **SMALL)
    assert not mark.exists()


# ---------------------------------------------------------------- pictures and tensors

PREPROCESS = Preprocess(size=(8, 12))


def _pixels(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return what preprocessing makes of an array, as colours in 0..1, ``[height width channel]``."""
    return PREPROCESS.denormalise(PREPROCESS(array))[0].permute(1, 2, 0).numpy()


def test_one_pixel() -> None:
    pixels = _pixels(np.array([[[255, 0, 51]]], dtype=np.uint8))
    assert pixels.shape == (8, 12, 3)
    np.testing.assert_allclose(pixels, np.broadcast_to([1.0, 0.0, 0.2], pixels.shape), atol=1e-6)


def test_alpha_lies_on_white() -> None:
    half = np.full((8, 12, 4), [255, 0, 0, 0], dtype=np.uint8)
    half[:, 6:, 3] = 255
    pixels = _pixels(half)
    np.testing.assert_allclose(pixels[:, :6], 1.0, atol=1e-6)
    np.testing.assert_allclose(pixels[:, 6:], np.broadcast_to([1.0, 0.0, 0.0], (8, 6, 3)), atol=1e-6)


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (12, 8), 1)
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.save(tmp_path / "palette.png", transparency=1)
    np.testing.assert_allclose(PREPROCESS.denormalise(PREPROCESS(tmp_path / "palette.png")).numpy(), 1.0, atol=1e-6)


@pytest.mark.parametrize("as_file", [False, True])
def test_sixteen_bits(tmp_path: Path, as_file: bool) -> None:
    array = np.full((8, 12), 13107, dtype=np.uint16)  # a fifth of 65535
    picture: Any = array
    if as_file:
        Image.fromarray(array).save(tmp_path / "deep.png")
        picture = tmp_path / "deep.png"
    np.testing.assert_allclose(PREPROCESS.denormalise(PREPROCESS(picture)).numpy(), 0.2, atol=1e-6)


def test_dark_pictures_of_sixteen_bits_stay_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 12), 200, dtype=np.uint16)).save(tmp_path / "dark.png")
    assert PREPROCESS.denormalise(PREPROCESS(tmp_path / "dark.png")).max() < 0.01


def test_pictures_of_floats_are_checked_as_arrays_are() -> None:
    array = np.full((8, 12), 0.25, dtype=np.float32)
    np.testing.assert_allclose(_pixels(Image.fromarray(array)), 64 / 255, atol=1e-6)
    array[0, 0] = np.nan
    with pytest.raises(InputError, match="NaN"):
        PREPROCESS(Image.fromarray(array))


def test_a_picture_for_the_model_goes_through_preprocess() -> None:
    model = prisma.load("toy:scenes-3l")
    with pytest.raises(InputError, match=r"model\.preprocess"):
        model(Image.new("RGB", (8, 8)))


def test_one_channel_becomes_three_and_three_become_one() -> None:
    grey = np.full((8, 12), 102, dtype=np.uint8)
    np.testing.assert_allclose(_pixels(grey), 0.4, atol=1e-6)
    np.testing.assert_allclose(_pixels(grey[:, :, None]), 0.4, atol=1e-6)
    single = Preprocess(size=(8, 12), mean=(0.0,), std=(1.0,))
    assert single(np.full((8, 12, 3), 102, dtype=np.uint8)).shape == (1, 1, 8, 12)


def test_a_picture_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not a picture")
    with pytest.raises(InputError, match=r"text\.jpg is not a picture that Pillow can read"):
        PREPROCESS(tmp_path / "text.jpg")
    with pytest.raises(InputError, match=r"No picture at .*absent\.png"):
        PREPROCESS(tmp_path / "absent.png")
    with pytest.raises(InputError, match="is not a picture"):
        PREPROCESS(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    _half(tmp_path / "cut.png")
    with pytest.raises(InputError, match=r"cut\.png is not a picture"):
        PREPROCESS(tmp_path / "cut.png")
    for nothing in (None, 3, object()):
        with pytest.raises(InputError, match="Expected a path, a Pillow image, an array or a tensor"):
            PREPROCESS(nothing)
    with pytest.raises(InputError, match="empty list"):
        PREPROCESS([])


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.zeros((8, 12, 2), np.uint8), "with 1, 3 or 4 channels"),
        (np.zeros((3, 8, 12), np.uint8), "with 1, 3 or 4 channels"),
        (np.zeros((0, 12), np.uint8), r"got \[0, 12\]"),
        (np.zeros((8, 12), np.int64), "got int64"),
        (np.full((8, 12), np.nan), "96 values that are NaN"),
        (np.full((8, 12), 3.0), r"in 0\.\.1, got 3\.\.3"),
    ],
)
def test_arrays_that_are_no_picture(array: np.ndarray[Any, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        PREPROCESS(array)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x: x[0], r"got shape \[3, 8, 12\]\. Add a batch axis"),
        (lambda x: x[:, :1], r"Expected 3 channels .* got shape \[3, 1, 8, 12\]"),
        (lambda x: torch.cat([x, x[:, :1]], 1), r"Expected 3 channels .* got shape \[3, 4, 8, 12\]"),
        (lambda x: x[..., :8], r"got shape \[3, 3, 8, 8\]: this model takes one size"),
        (lambda x: (x * 100).byte(), "Expected floating point pixels, got torch.uint8"),
        (lambda x: torch.where(x > 2, torch.nan, x), r"holds \d+ values that are NaN or infinite"),
        (lambda x: torch.where(x > 2, torch.inf, x), r"holds \d+ values that are NaN or infinite"),
    ],
)
def test_tensors_the_model_cannot_take(
    vit: HookedViT, image: Tensor, change: Callable[[Tensor], Tensor], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        vit(change(image))
    assert torch.isfinite(vit(image)).all()


def test_an_input_of_another_dtype_or_device(vit: HookedViT, image: Tensor) -> None:
    vit = vit.float()
    stream = vit(image.float(), stop_at_layer=1)
    told = (
        r"Expected the {} in torch\.float32, as the model's weights are; it is in torch\.float64.*to\(torch\.float32\)"
    )
    with pytest.raises(InputError, match=told.format("image")):
        vit(image)
    with pytest.raises(InputError, match=told.format("stream")):
        vit(stream.double(), start_at_layer=1)
    with pytest.raises(InputError, match=r"Expected the image on meta, where the model is; it is on cpu\. Move it"):
        vit.to("meta")(image.float())


def test_autocast_brings_dtypes_together(vit: HookedViT, image: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(vit.float()(image.bfloat16())).all()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"names_filter": "z"}, r"run_with_cache takes no 'names_filter': here it is names=\."),
        ({"incl_bwd": True}, r"here it is loss="),
        ({"stop_at_leyer": 1}, r"run_with_cache takes no 'stop_at_leyer'\. Did you mean stop_at_layer"),
        ({"nams": "z"}, r"Did you mean names"),
        ({"layers": 2}, r"It takes names, hooks, .*start_at_layer"),
        (
            {"return_type": "logits"},
            r"takes no 'return_type': what the model gives out is what is returned; .*output=False",
        ),
        ({"reset_hooks_end": True}, r"hooks end with their scope, and nothing is left on the model"),
    ],
)
def test_keywords_that_nothing_takes(vit: HookedViT, image: Tensor, given: dict[str, Any], told: str) -> None:
    for output in (True, False):
        with pytest.raises(InputError, match=told):
            vit.run_with_cache(image, output=output, **given)
    with pytest.raises(InputError, match=r"run_with_hooks takes no 'fwd_hooks': here it is hooks=\{name: hook\}"):
        vit.run_with_hooks(image, fwd_hooks=[])
    with pytest.raises(InputError, match=r"HookedViT takes no 'stop_layer'\. Did you mean stop_at_layer"):
        vit(image, stop_layer=1)


def test_scopes_answer_to_names_known_from_elsewhere(vit: HookedViT) -> None:
    with pytest.raises(InputError, match=r"hooks takes no 'fwd_hooks': here it is hooks=\{name: hook\}"):
        vit.hooks(fwd_hooks=[("hook_embed", lambda x, hook: x)])
    with pytest.raises(InputError, match=r"hooks takes no 'bwd_hooks': here it is backward=\{name: hook\}"):
        vit.hooks(bwd_hooks=[])
    with pytest.raises(InputError, match=r"hooks takes no 'bakward'\. Did you mean backward"):
        vit.hooks(bakward={})
    with (
        pytest.raises(InputError, match=r"caching takes no 'names_filter': here it is names="),
        vit.caching(names_filter="z"),
    ):
        pass
    with pytest.raises(HookError, match=r"hooks as \{name: hook\}, got list\. Of a list of pairs, dict\(pairs\)"):
        vit.hooks([("hook_embed", lambda x, hook: x)])


def test_attributes_known_from_elsewhere_are_answered(vit: HookedViT, image: Tensor) -> None:
    _, cache = vit.run_with_cache(image)
    for owner, name, told in (
        (vit, "to_tokens", r"HookedViT has no attribute 'to_tokens': here it is model\.tokens\(text\)"),
        (vit, "add_hook", r"here hooks are a scope: with model\.hooks\("),
        (vit, "cfg", r"here the facts are model\.spec"),
        (vit, "nothing", r"no attribute 'nothing'$"),
        (cache, "stack_activation", r"Cache has no attribute 'stack_activation': here it is torch\.stack"),
        (cache, "nothing", r"no attribute 'nothing'\.$"),
    ):
        with pytest.raises(AttributeError, match=told):
            getattr(owner, name)
        assert not hasattr(owner, name)


def test_an_image_that_no_patch_fits(make: Callable[..., HookedViT]) -> None:
    with pytest.raises(InputError, match="multiples of the patch 4x4, got 10x12"):
        make(interpolation=True)(torch.zeros(1, 3, 10, 12))
    with pytest.raises(InputError, match="multiples of the patch 4x4, got 0x12"):
        make(interpolation=True)(torch.zeros(1, 3, 0, 12))


def test_a_model_without_preprocessing_says_what_to_set(make: Callable[..., HookedViT], tmp_path: Path) -> None:
    model = make()
    assert not model.preprocess
    for one in (model, copy.deepcopy(model), prisma.load(f"file:{prisma.save(model, tmp_path)}")):
        assert one.preprocess == model.preprocess
        with pytest.raises(InputError, match=r"without a preprocess\. Set model\.preprocess = prisma_core\.inputs\."):
            one.preprocess("cat.jpg")
        with pytest.raises(AttributeError, match=r"mean: this model came without a preprocess"):
            _ = one.preprocess.mean


@pytest.mark.parametrize(
    "given",
    [{"std": (0, 0, 0)}, {"std": (1, -1, 1)}, {"mean": (0.5,)}, {"mean": (), "std": ()}, {"std": (1, 1, 1e999)}],
)
def test_preprocessing_that_makes_no_numbers_is_none(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"std|mean"):
        Preprocess(size=(8, 8), **given)


def test_numbers_of_numpys_beside_the_tensors_do_no_harm(tmp_path: Path) -> None:
    beside = {"best": np.float64(0.5), "step": np.int64(3), "generator": np.random.default_rng(0).bytes(3)}
    state = {"weight": torch.randn(2)}
    torch.save({"model": state, **beside, "keys": np.arange(3), "dtype": np.dtype("f4")}, tmp_path / "trained.pth")
    read = read_checkpoint(tmp_path / "trained.pth")
    assert list(read) == ["weight"]
    assert torch.equal(read["weight"], state["weight"])
    torch.save({"model": state, "names": np.array([Path("x")], dtype=object)}, tmp_path / "objects.pth")
    with pytest.raises(LoadError, match=r"wants to run pathlib"):
        read_checkpoint(tmp_path / "objects.pth")
