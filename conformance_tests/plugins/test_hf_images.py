"""Image processors of transformers, both backends: as data where that says it all, else called; saved with a model."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import prisma_core as prisma
from prisma_core import InputError, LoadError
from prisma_core.inputs import Preprocess, probe
from prisma_core.saving.processors import ProcessorFolder

transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'prisma-interp[hf]'")
pytest.importorskip("torchvision", reason="torchvision is missing: pip install 'prisma-interp[hf]'")

from PIL import Image  # noqa: E402
from prisma_hf.images import as_data, preprocess, reference  # noqa: E402
from prisma_hf.processors import CONFIG, Processed  # noqa: E402

SETTINGS: dict[str, dict[str, Any]] = {
    "ViT": {"size": {"height": 30, "width": 50}, "resample": 0},
    "Beit": {"size": {"height": 33, "width": 33}, "do_normalize": False},
    "CLIP": {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}},
    "Bit": {"size": {"shortest_edge": 32}, "crop_size": {"height": 40, "width": 40}, "image_std": [0.1, 0.2, 0.3]},
    "ConvNext": {"size": {"shortest_edge": 40}, "crop_pct": 0.8},
    "PoolFormer": {"size": {"shortest_edge": 40}, "crop_pct": 0.7, "crop_size": {"height": 40, "width": 40}},
    "EfficientNet": {"size": {"height": 30, "width": 50}, "rescale_factor": 1 / 127.5, "rescale_offset": True},
    "MobileViT": {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}},
}
# What data does not say, by what their images become.
CALLED: dict[str, dict[str, Any]] = {
    "Owlv2": {"size": {"height": 36, "width": 36}},
    "Perceiver": {"size": {"height": 36, "width": 36}, "crop_size": {"height": 50, "width": 50}},
    "Levit": {"size": {"shortest_edge": 28}, "crop_size": {"height": 24, "width": 24}},
    "Pixtral": {"size": {"longest_edge": 48}, "patch_size": {"height": 8, "width": 8}},
    "DeiT": {"size": {"height": 41, "width": 37}, "crop_size": {"height": 32, "width": 32}},
    "ViT": {"do_resize": False, "rescale_factor": 1 / 127.5},
    "Siglip2": {"patch_size": 8, "max_num_patches": 20},
}


def made(name: str, settings: dict[str, Any], backend: str = "") -> Any:
    return getattr(transformers, f"{name}ImageProcessor{backend}")(**settings)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3)).astype("uint8"))


@pytest.mark.parametrize("backend", ["", "Pil"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_processor_is_repeated_to_the_byte(name: str, backend: str) -> None:
    processor = made(name, SETTINGS[name], backend)
    ours = preprocess(processor)
    assert isinstance(ours, Preprocess)
    assert ours.resampling == ("pillow" if backend else "torch")
    for width, height in ((61, 43), (29, 31), (33, 90)):
        image = noise(width, height)
        assert torch.allclose(ours(image)[0], reference(processor)(image), rtol=0, atol=1e-5)
        assert ours.denormalise(ours(image)).sub(ours.model_copy(update=PLAIN)(image)).abs().max() < 1e-5


PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "order": "rgb"}


@pytest.mark.parametrize("name", CALLED)
def test_what_is_more_than_data_is_left_to_the_processor(name: str, tmp_path: Path) -> None:
    processor = made(name, CALLED[name])
    ours = preprocess(processor)
    assert isinstance(ours, Processed)
    ours.save_pretrained(tmp_path)
    again = Processed.from_pretrained(tmp_path)
    for width, height in ((61, 43), (33, 90)):
        image = noise(width, height)
        pixels = ours(image)
        assert torch.equal(again(image), pixels)
        theirs = reference(processor)(image)
        if name == "Siglip2":  # patches, each in one, and what fills up their number
            theirs = unpacked(theirs, processor(images=image, return_tensors="pt")["spatial_shapes"][0])
        assert torch.equal(pixels[0], theirs)


def unpacked(patches: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    rows, columns = shape.tolist()
    columns_first = patches[: rows * columns].reshape(rows * columns, 64, 3).permute(2, 1, 0).reshape(1, 192, -1)
    return torch.nn.functional.fold(columns_first, (8 * rows, 8 * columns), 8, stride=8)[0]


def test_both_backends_are_kept_apart(tmp_path: Path) -> None:
    for backend in ("", "Pil"):
        ours = Processed(made("CLIP", SETTINGS["CLIP"], backend))
        ours.save_pretrained(tmp_path)
        assert type(Processed.from_pretrained(tmp_path).processor) is type(ours.processor)


def test_pillow_and_tensors_resize_differently() -> None:
    """Else the two backends need not be told apart."""
    one = preprocess(transformers.ViTImageProcessor())
    other = preprocess(transformers.ViTImageProcessorPil())
    assert not torch.equal(one(noise(70, 90)), other(noise(70, 90)))


def test_a_processor_that_scales_before_it_resizes() -> None:
    processor = transformers.DINOv3ViTImageProcessor(size={"height": 41, "width": 37})
    ours = preprocess(processor)
    assert isinstance(ours, Preprocess)
    assert ours.resampling == "torch_float"
    assert torch.allclose(ours(noise(90, 61))[0], reference(processor)(noise(90, 61)), rtol=0, atol=1e-6)


def test_what_is_seen_of_an_image_is_what_the_model_gets() -> None:
    ours = preprocess(made("Owlv2", CALLED["Owlv2"]))
    image = Image.new("RGB", (60, 30), (250, 20, 30))
    seen = ours.seen(image, side=100)
    assert seen.size == (108, 108)
    assert max(abs(a - b) for a, b in zip(seen.getpixel((50, 20)), (250, 20, 30), strict=True)) <= 1
    assert max(seen.getpixel((50, 100))) == 0, "what fills it up to a square"
    turned = Processed(made("MobileViT", SETTINGS["MobileViT"]))
    assert turned.scale.order == "bgr"
    assert turned.seen(image).getpixel((16, 16)) == (250, 20, 30)


PACKED = {
    "Qwen2VL": {},
    "Qwen2VLImageProcessorPil": {"merge_size": 3, "temporal_patch_size": 3},
    "VideoLlama3": {},
    "PaddleOCRVL": {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 100}},
    "Kimi_K25": {},
}


@pytest.mark.parametrize("name", PACKED)
def test_patches_in_any_order_become_the_image_they_were_cut_from(name: str) -> None:
    name, _, pil = name.partition("ImageProcessor")
    ours = preprocess(made(name, PACKED[name + (pil and "ImageProcessorPil")], pil))
    assert isinstance(ours, Processed)
    image = noise(168, 252)  # of whole patches, so that it is not resized
    pixels = ours(image)
    assert pixels.shape == (1, 3, 252, 168)
    assert torch.equal((ours.denormalise(pixels)[0] * 255).round(), torch.tensor(np.array(image)).permute(2, 0, 1))
    assert ours(noise(200, 90)).shape[2] < ours(noise(200, 90)).shape[3]


def test_patches_in_an_order_unknown_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = made("Qwen2VL", {})
    call = type(processor).__call__

    def shuffled(self: Any, *args: Any, **options: Any) -> Any:
        result = call(self, *args, **options)
        result["pixel_values"] = result["pixel_values"].flip(0)
        return result

    monkeypatch.setattr(type(processor), "__call__", shuffled)
    with pytest.raises(InputError, match="in an order in which they make no image"):
        Processed(processor)(noise(168, 252))


def test_images_that_come_out_in_several_sizes_are_no_batch() -> None:
    ours = preprocess(made("Pixtral", CALLED["Pixtral"]))
    assert ours([noise(61, 43), noise(61, 43)]).shape == (2, 3, 40, 48)
    with pytest.raises(InputError, match=r"40 x 48, 48 x 24.*one by one"):
        ours([noise(61, 43), noise(30, 70)])


def test_tiles_are_asked_for() -> None:
    small = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    ours = preprocess(made("Idefics3", small))
    with pytest.raises(InputError, match=r"makes 5 tiles.*model\.preprocess\.tiles\(image\)"):
        ours(noise(60, 60))
    tiles = ours.tiles(noise(60, 60))
    assert tiles.shape == (5, 3, 32, 32)
    whole = preprocess(made("Idefics3", {**small, "do_image_splitting": False}))
    assert torch.allclose(whole(noise(60, 60))[0], tiles[-1], atol=2e-2), "the last one is all of the image"


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("Pix2Struct", {}, r"makes no image \[channel height width\], but flattened_patches, attention_mask: set"),
        ("Gemma4", {}, r"makes no image \[channel height width\], but pixel_values 1 x 2520 x 768"),
        ("MiniCPMV4_6", {}, r"makes no image"),
        ("VitPose", {}, r"cannot prepare an image by itself .*boxes.*set model\.preprocess"),
        ("Aria", {"max_image_size": 490}, r"hides a part of what it makes \(pixel_mask\)"),
        ("ImageGPT", {}, r"Clusters"),
    ],
)
def test_what_is_no_image_is_said(name: str, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        preprocess(made(name, settings))(noise(61, 43))


def test_settings_of_an_odd_kind_do_not_stop_it() -> None:
    assert isinstance(preprocess(made("Ovis2", {})), Preprocess), "a grid beside an image"
    for name in ("BridgeTower", "Fuyu", "Idefics"):
        assert isinstance(preprocess(made(name, {})), Preprocess | Processed)


# ---------------------------------------------------------------- with a model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    transformers.ViTModel(transformers.ViTConfig(image_size=36, patch_size=12, **sizes)).save_pretrained(tmp_path)
    made("Owlv2", CALLED["Owlv2"]).save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def test_it_is_loaded_and_saved_with_its_model(folder: Path, tmp_path: Path) -> None:
    model = prisma.load(f"hf:{folder}")
    assert isinstance(model.preprocess, Processed)
    pixels = model.preprocess([noise(61, 43), noise(30, 70)])
    assert pixels.shape == (2, 3, 36, 36)
    assert torch.equal(pixels[0], reference(made("Owlv2", CALLED["Owlv2"]))(noise(61, 43)))
    with warnings.catch_warnings(action="error"):
        prisma.save(model, tmp_path / "saved")
        back = prisma.load(f"file:{prisma.save(prisma.load(f'file:{tmp_path}/saved'), tmp_path / 'twice')}")
    assert isinstance(vars(back)["preprocess"], ProcessorFolder)
    assert torch.equal(back(back.preprocess(noise(61, 43))), model(pixels[:1]))
    assert back.preprocess.seen(noise(61, 43), 50).size == (72, 72)


@torch.no_grad()
def test_siglip_2_gets_the_image_that_its_patches_were_cut_from(tmp_path: Path) -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    vision = {"patch_size": 8, "num_patches": 25, **sizes}
    text = {"vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2, **sizes}
    upstream = transformers.Siglip2Model(transformers.Siglip2Config(vision_config=vision, text_config=text)).eval()
    upstream.save_pretrained(tmp_path)
    processor = made("Siglip2", CALLED["Siglip2"])
    processor.save_pretrained(tmp_path)
    model = prisma.load(f"hf:{tmp_path}")
    for width, height in ((61, 43), (30, 90)):
        image = noise(width, height)
        theirs = upstream.get_image_features(**processor(images=image, return_tensors="pt"))
        ours = model.vision(model.vision.preprocess(image))
        assert torch.allclose(ours, getattr(theirs, "pooler_output", theirs), rtol=0, atol=2e-6)


@torch.no_grad()
def test_qwen_gets_the_image_that_its_patches_were_cut_from() -> None:
    facts = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 40, "patch_size": 4}
    facts |= {"out_hidden_size": 20, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    upstream = transformers.Qwen3VLVisionModel(transformers.Qwen3VLVisionConfig(**facts)).eval()
    processor = made("Qwen2VL", {"patch_size": 4, "size": {"shortest_edge": 8 * 8, "longest_edge": 32 * 32}})
    given = processor(images=noise(200, 200), return_tensors="pt")
    theirs = upstream(given["pixel_values"], grid_thw=given["image_grid_thw"]).last_hidden_state
    model = prisma.adapt(upstream)
    ours = model(preprocess(processor)(noise(200, 200)))[0]
    merged = ours.reshape(4, 2, 4, 2, 32).transpose(1, 2).reshape(64, 32)  # the order in which they are merged
    assert torch.allclose(merged, theirs, rtol=0, atol=1e-6)


def test_data_stands_among_a_saved_models_facts(folder: Path, tmp_path: Path) -> None:
    made("ViT", {"size": {"height": 36, "width": 36}}).save_pretrained(folder)
    model = prisma.load(f"hf:{folder}")
    assert isinstance(model.preprocess, Preprocess)
    assert prisma.load(f"file:{prisma.save(model, tmp_path / 'saved')}").preprocess == model.preprocess
    assert not (tmp_path / "saved" / "companions").exists()


def test_without_transformers_the_model_is_there_and_its_images_are_told_of(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prisma.save(prisma.load(f"hf:{folder}"), tmp_path / "saved")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "transformers" else find(name))
    back = prisma.load(f"file:{tmp_path}/saved")
    with pytest.raises(prisma.PluginError, match=r"prisma-interp\[hf\]"):
        back.preprocess(probe(61, 43))


def test_code_that_came_with_a_processor_is_not_saved(tmp_path: Path) -> None:
    class Mine(transformers.ViTImageProcessor): ...

    with pytest.raises(LoadError, match="Mine is no class of transformers' own"):
        Processed(Mine(do_resize=False)).save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [("{", "no readable JSON"), ("{}", "image_processor_type"), ('"x"', "holds a str; expected a JSON object")],
)
def test_a_broken_file_is_told_of(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(LoadError, match=told):
        Processed.from_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"image_processor_type": "Nonesuch"}))
    with pytest.raises(LoadError, match="'Nonesuch'"):
        Processed.from_pretrained(tmp_path)


def test_what_is_not_data_is_none() -> None:
    assert as_data(transformers.ViTImageProcessor(do_resize=False)) is None
    assert as_data(transformers.CLIPImageProcessor(do_center_crop=False)) is None
    assert as_data(transformers.Idefics2ImageProcessor()) is None
