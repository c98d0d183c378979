"""CLIP models in transformers' form, TinyCLIP's among them: from a folder, with their own tokenizer and pictures."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import prisma_core as prisma
from prisma_core.transformer import HookedDual, HookedText, HookedViT

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
pytest.importorskip("prisma_hf.source", reason="the plugin prisma_hf is not installed")

from prisma_clip.hf_cases import TEXT, VISION, dual  # noqa: E402

WORDS = {"<start>": 0, "<pad>": 1, "a": 3, "cat": 4, "<end>": 5, "photo": 6, "of": 7, "dog": 8, "?": 9, ".": 10}


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel(WORDS, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 5)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="?", pad_token="<pad>", bos_token="<start>", eos_token="<end>"
    ).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dual("CLIP", VISION, TEXT).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    size = {"shortest_edge": VISION["image_size"]}
    crop = {"height": VISION["image_size"], "width": VISION["image_size"]}
    transformers.CLIPImageProcessor(size=size, crop_size=crop).save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def test_zero_shot_from_a_folder(folder: Path) -> None:
    model = prisma.load(f"hf:{folder}")
    assert isinstance(model, HookedDual)
    tokens = model.tokens(["a photo of a cat.", "a photo of a zebra."])
    assert tokens.tolist() == [[0, 3, 6, 7, 3, 4, 10, 5], [0, 3, 6, 7, 3, 9, 10, 5]]
    assert model.tokens("a dog").tolist() == [[0, 3, 8, 5, 1, 1, 1, 1]], "filled up to the longest text"
    assert model.tokens("a " * 20).shape == (1, 8), "cut to it"
    picture = Image.effect_noise((40, 30), 90).convert("RGB")
    assert model.preprocess is not None
    pixels = model.preprocess(picture)
    theirs: Any = transformers.CLIPModel.from_pretrained(folder)
    upstream = theirs(input_ids=tokens, pixel_values=pixels).logits_per_image.softmax(-1)
    assert torch.allclose(model.classify(picture, ["cat", "zebra"]), upstream, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["CLIPModel", "CLIPTextModelWithProjection"])
def test_a_saved_model_keeps_its_tokenizer(architecture: str, folder: Path, tmp_path: Path) -> None:
    model: Any = prisma.load(f"hf:{folder}", architecture=architecture)
    with warnings.catch_warnings(action="error"):
        first = prisma.save(model, tmp_path / "first")
        second = prisma.save(prisma.load(f"file:{first}"), tmp_path / "second")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    texts = ["a photo of a cat.", "a photo of a zebra.", "", "a " * 20]
    for one in (first, second):
        again: Any = prisma.load(f"file:{one}")
        assert torch.equal(again.tokens(texts), model.tokens(texts))
        if isinstance(model, HookedDual):
            picture = Image.effect_noise((40, 30), 90).convert("RGB")
            assert torch.allclose(again.classify(picture, ["cat", "dog"]), model.classify(picture, ["cat", "dog"]))


@torch.no_grad()
def test_either_tower_alone(folder: Path) -> None:
    whole = prisma.load(f"hf:{folder}")
    image, tokens = whole.sample_inputs(2)
    seeing = prisma.load(f"hf:{folder}", architecture="CLIPVisionModelWithProjection")
    reading = prisma.load(f"hf:{folder}", architecture="CLIPTextModelWithProjection")
    assert isinstance(seeing, HookedViT)
    assert isinstance(reading, HookedText)
    assert torch.allclose(seeing(image), whole.vision(image), atol=1e-6)
    assert torch.allclose(reading(tokens), whole.text(tokens), atol=1e-6)
    assert torch.equal(reading.tokens("a cat"), whole.tokens("a cat"))


def test_a_broken_tokenizer_is_named_when_it_is_needed(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    model = prisma.load(f"hf:{folder}")
    with pytest.raises(prisma.LoadError, match=r"tokenizer in .* could not be read"):
        model.tokens("a cat")
