"""The tokenizers of CLIP models: which one a configuration asks for, and that a saved model has it."""

from __future__ import annotations

import functools
import gzip
import importlib.util
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import prisma_core as prisma
from prisma_core import LoadError, PluginError
from prisma_core.model import MissingProcessor

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed: pip install 'prisma-interp[clip]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from open_clip import tokenizer as theirs  # noqa: E402
from prisma_clip.source import OpenClipSource  # noqa: E402
from prisma_clip.texts import Tokenizer  # noqa: E402

NAME = "ViT-B-32"
VISION = {"width": 64, "layers": 1, "head_width": 32, "patch_size": 8, "image_size": 16}
TEXT = {"width": 32, "heads": 2, "layers": 1, "context_length": 11, "vocab_size": 49410}
SMALL: dict[str, Any] = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT}
WORDS = {"<pad>": 0, "?": 1, "<start>": 2, "<end>": 3, "a": 4, "cat": 5, "dog": 6, "photo": 7, "of": 8, "Cat": 9}
TEXTS = ["a photo of a Cat.", "Dog &amp; cat", "a cat " * 20]


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """Return a folder with a tokenizer of whole words."""
    from tokenizers import Tokenizer as Made
    from tokenizers import models, pre_tokenizers, processors

    made = Made(models.WordLevel(WORDS, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 3)]
    )
    named = {"unk_token": "?", "pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>"}
    named |= {"sep_token": "<end>", "cls_token": "<start>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **named).save_pretrained(tmp_path / "words")
    return tmp_path / "words"


def fresh(**config: Any) -> Any:
    return prisma.load(f"open_clip:{NAME}", pretrained=False, **{**SMALL, "text_cfg": {**TEXT, **config}})


def again(model: Any, folder: Path) -> Any:
    with warnings.catch_warnings(action="error"):
        return prisma.load(f"file:{prisma.save(model, folder)}")


@torch.no_grad()
def chances(model: Any) -> Tensor:
    return model.classify(Image.new("RGB", (40, 30), (200, 30, 90)), ["cat", "dog", "red Square"])


@pytest.mark.parametrize("kwargs", [{}, {"clean": "canonicalize", "additional_special_tokens": ["<one>", "<two>"]}])
def test_open_clips_own_tokenizer_is_kept(kwargs: dict[str, Any], tmp_path: Path, no_network: None) -> None:
    model = fresh(tokenizer_kwargs=kwargs)
    mine = theirs.SimpleTokenizer(context_length=11, **kwargs)
    texts = ["a Cat, <two> dogs!"]
    saved = again(model, tmp_path / "one")
    for one in (model, saved, again(saved, tmp_path / "two")):
        assert torch.equal(one.tokens(texts), mine(texts))
    assert torch.allclose(chances(saved), chances(model), atol=1e-6)
    assert sum(path.stat().st_size for path in (tmp_path / "one" / "companions").rglob("*.json")) < 500


@pytest.mark.parametrize("mode", [None, "clips"])
@pytest.mark.parametrize("kwargs", [{}, {"clean": "lower", "strip_sep_token": True}])
def test_a_tokenizer_of_transformers_inside_open_clip_is_kept(
    mode: str | None, kwargs: dict[str, Any], words: Path, tmp_path: Path, no_network: None
) -> None:
    config = {"hf_tokenizer_name": str(words), "tokenizer_mode": mode, "tokenizer_kwargs": kwargs}
    model = fresh(**config)
    mine = theirs.HFTokenizer(str(words), context_length=11, tokenizer_mode=mode, **kwargs)
    assert torch.equal(model.tokens(TEXTS[:2]), mine(TEXTS[:2]))
    saved = again(model, tmp_path / "saved")
    shutil.rmtree(words)
    assert torch.equal(saved.tokens(TEXTS[:2]), mine(TEXTS[:2]))
    assert torch.allclose(chances(saved), chances(model), atol=1e-6)


def test_a_configuration_in_a_file_says_which_tokenizer(words: Path, tmp_path: Path, no_network: None) -> None:
    """Its own and that of a folder; once, all of them got CLIP's, with 77 tokens."""
    text = {**TEXT, "hf_tokenizer_name": "nobody/has-this", "tokenizer_kwargs": {"clean": "lower"}}
    config = {"model_cfg": {**SMALL, "text_cfg": text}, "preprocess_cfg": {}}
    (words / "open_clip_config.json").write_text(json.dumps(config))
    mine = theirs.HFTokenizer(str(words), context_length=11, clean="lower")
    assert torch.equal(prisma.load(f"open_clip:{words}", pretrained=False).tokens(TEXTS[0]), mine(TEXTS[0]))
    text["hf_tokenizer_name"] = str(words)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model: Any = prisma.load(f"open_clip:{tmp_path / 'config.json'}", pretrained=False)
    assert torch.equal(model.tokens(TEXTS[0]), mine(TEXTS[0]))
    assert fresh(context_length=8).tokens("a cat").shape == (1, 8)


def test_one_that_the_user_set_is_kept(tmp_path: Path, no_network: None) -> None:
    upstream = open_clip.create_model(NAME, load_weights=False, **SMALL).eval()
    model = prisma.adapt(upstream)
    model.tokenizer = open_clip.get_tokenizer(NAME, context_length=11)
    assert torch.allclose(again(model, tmp_path).encode_text(TEXTS[:2]), model.encode_text(TEXTS[:2]), atol=1e-6)


def cased(text: str) -> str:
    return text


def own_vocabulary(folder: Path) -> Any:
    with gzip.open(theirs.default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    lines[1], lines[2] = lines[2], lines[1]
    with gzip.open(folder / "bpe.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    return theirs.SimpleTokenizer(str(folder / "bpe.gz"), context_length=11)


def own_cleaning(folder: Path) -> Any:
    made = theirs.SimpleTokenizer(context_length=11)
    made.clean_fn = cased
    return made


OTHERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "vocabulary": (own_vocabulary, "its vocabulary is another"),
    "cleaning": (own_cleaning, "it cleans texts with a function of one's own"),
    "random": (lambda folder: theirs.SimpleTokenizer(context_length=11, reduction_mask="random"), "texts at random"),
    "partial": (lambda folder: functools.partial(theirs.SimpleTokenizer(), context_length=11), "saves functools"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_its_facts_do_not_say_is_lost_and_said_to_be(kind: str, tmp_path: Path) -> None:
    make, why = OTHERS[kind]
    model = fresh()
    model.tokenizer = make(tmp_path)
    with pytest.warns(UserWarning, match=why):
        prisma.save(model, tmp_path / "saved")
    saved: Any = prisma.load(f"file:{tmp_path / 'saved'}")
    assert isinstance(saved.tokenizer, MissingProcessor)
    with pytest.raises(prisma.InputError, match=rf"{why}.*Set model\.tokenizer again"):
        saved.encode_text("a cat")


def test_one_that_cannot_come_from_the_hub_is_said_to_be_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_network: None
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = fresh(hf_tokenizer_name="timm/ViT-B-16-SigLIP")
    with pytest.warns(UserWarning, match="not saved with the model.*the tokenizer of open_clip:ViT-B-32"):
        prisma.save(model, tmp_path / "saved")
    with pytest.raises(prisma.InputError, match="timm/ViT-B-16-SigLIP"):
        prisma.load(f"file:{tmp_path / 'saved'}").tokens("a cat")  # type: ignore[attr-defined]


def test_a_library_that_is_not_there_is_one_error(monkeypatch: pytest.MonkeyPatch, words: Path, tmp_path: Path) -> None:
    """The model is read all the same."""
    simple = again(fresh(), tmp_path / "simple")
    whole = again(fresh(hf_tokenizer_name=str(words)), tmp_path / "whole")
    find = importlib.util.find_spec

    def without(hidden: str, name: str, *rest: Any) -> Any:
        return None if name == hidden else find(name, *rest)

    for library, model in (("open_clip", simple), ("transformers", whole)):
        monkeypatch.setattr(importlib.util, "find_spec", functools.partial(without, library))
        with pytest.raises(PluginError, match=rf'needs {library}, which is not.*pip install "prisma-interp\[clip\]"'):
            model.tokens("a cat")
        assert model(torch.zeros(1, 3, 16, 16), torch.ones(1, 11, dtype=torch.long)).shape == (1, 1)


def test_the_default_tokenizers_are_those_of_open_clip(no_network: None) -> None:
    """What each model's configuration asks for, as far as it needs no network."""
    checked = 0
    for name in open_clip.list_models()[::20]:
        config = open_clip.get_model_config(name)["text_cfg"]
        if not config.get("hf_tokenizer_name"):
            assert torch.equal(Tokenizer(config)(TEXTS), open_clip.get_tokenizer(name)(TEXTS))
            checked += 1
    assert checked > 3


def test_broken_files_of_a_tokenizer_are_one_error(words: Path, tmp_path: Path) -> None:
    model = fresh(hf_tokenizer_name=str(words))
    prisma.save(model, tmp_path / "saved")
    (tmp_path / "saved" / "companions" / "tokenizer" / "files" / "tokenizer.json").write_text("{")
    with pytest.raises(LoadError, match="could not be read"):
        OpenClipSource().load_processor(tmp_path / "saved" / "companions" / "tokenizer")
