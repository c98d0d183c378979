"""CLIP models in transformers' form, TinyCLIP's among them: from a folder, with their own tokenizer and images."""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from PIL import Image
from prisma_conformance.randomise import randomise

import prisma_core as prisma
from prisma_core.transformer import HookedDual, HookedText, HookedViT
from prisma_core.upstream import replaced

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
pytest.importorskip("prisma_hf.source", reason="the plugin prisma_hf is not installed")

from prisma_clip.hf_cases import TEXT, VISION, dual, tower  # noqa: E402

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
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    assert model.preprocess is not None
    pixels = model.preprocess(image)
    theirs: Any = transformers.CLIPModel.from_pretrained(folder)
    upstream = theirs(input_ids=tokens, pixel_values=pixels).logits_per_image.softmax(-1)
    assert torch.allclose(model.classify(image, ["cat", "zebra"]), upstream, atol=1e-6)


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
            image = Image.effect_noise((40, 30), 90).convert("RGB")
            assert torch.allclose(again.classify(image, ["cat", "dog"]), model.classify(image, ["cat", "dog"]))


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


# ---------------------------------------------------------------- positions that SigLIP 2 resizes


def by_torch(rows: Any, shapes: Any, length: int, **how: Any) -> Any:
    """Resize as transformers did before 5.24."""
    grid = rows.permute(2, 0, 1)[None].float()
    how = {"mode": "bilinear", "antialias": True} | how
    resized = [torch.nn.functional.interpolate(grid, tuple(size), **how)[0].flatten(1).T for size in shapes.tolist()]
    return torch.stack(resized).to(rows.dtype)


def by_weights(rows: Any, shapes: Any, length: int) -> Any:
    """Resize as transformers does since: a sum of all positions by weights."""
    side = len(rows)
    resized = []
    for size in shapes.tolist():
        rates = [side / torch.tensor(float(n)) for n in size]
        apart = [
            torch.arange(side).float() - ((torch.arange(n).float() + 0.5) * rate - 0.5)[:, None]
            for n, rate in zip(size, rates, strict=True)
        ]
        axes = [(1 - one.abs() / rate.clamp(min=1)).clamp(min=0) for one, rate in zip(apart, rates, strict=True)]
        row, column = (axis / axis.sum(-1, keepdim=True) for axis in axes)
        resized.append((row[:, None, :, None] * column[None, :, None, :]).flatten(2).flatten(0, 1))
    return (torch.stack(resized) @ rows.flatten(0, 1).float()).to(rows.dtype)


def at_home(function: Any, owner: type, name: str) -> Any:
    """Return a function as a method of a library's own, as another release of it would have."""
    there, full = vars(sys.modules[owner.__module__]), f"{owner.__qualname__}.{name}"
    own = FunctionType(function.__code__.replace(co_filename=there["__file__"], co_qualname=full), there, name)
    own.__kwdefaults__, own.__qualname__ = function.__kwdefaults__, full
    return own


RESIZE = "resize_positional_embeddings"


def siglip2() -> Any:
    return randomise(tower("Siglip2", "Vision", VISION | {"num_patches": 25}), torch.Generator().manual_seed(0)).eval()


@torch.no_grad()
@pytest.mark.parametrize("way", [None, by_torch, by_weights], ids=["as installed", "by torch", "by weights"])
def test_positions_are_resized_to_the_bit_as_upstream_resizes_them(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = siglip2()
    embeddings = upstream.embeddings
    if way is not None:
        monkeypatch.setattr(type(embeddings), RESIZE, staticmethod(at_home(way, type(embeddings), RESIZE)))
        monkeypatch.setattr(replaced, "_written", lambda module: {})  # as a release that has it
    model: Any = prisma.adapt(upstream)
    table = embeddings.position_embedding.weight.view(5, 5, -1)
    for size in ((3, 8), (9, 2), (6, 6), (5, 4)):
        expected = embeddings.resize_positional_embeddings(table, torch.tensor([size] * 2), size[0] * size[1])
        assert torch.equal(model.embed.positions(size), expected[1]), size
    if way is not None:
        assert model.spec.embed.interpolation.weights_in_float32 == (way is by_weights)


@pytest.mark.parametrize("how", [{"antialias": False}, {"mode": "bicubic"}, {"align_corners": True}], ids=str)
def test_positions_resized_otherwise_are_unsupported(how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = siglip2()
    other = partial(at_home(by_torch, type(upstream.embeddings), RESIZE), **how)
    monkeypatch.setattr(type(upstream.embeddings), RESIZE, staticmethod(other))
    with pytest.raises(prisma.UnsupportedArchitecture, match="positions resized otherwise than bilinear"):
        prisma.adapt(upstream)
