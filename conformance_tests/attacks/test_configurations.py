"""Configurations that bring code along, or name code elsewhere: none is run, asked about, or handed on."""

from __future__ import annotations

import builtins
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import with_own_code
from loopback import Hub

import prisma_core as prisma
from prisma_core import LoadError, UnknownName
from prisma_core.files.code import code_in, without_code

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("open_clip", reason="open_clip is not installed: pip install 'prisma-interp[clip]'")

from prisma_clip.source import OpenClipSource  # noqa: E402
from prisma_hf.source import HfSource  # noqa: E402
from tokenizers import Tokenizer as Words  # noqa: E402
from tokenizers import models  # noqa: E402

VISION = {"width": 32, "layers": 1, "head_width": 16, "patch_size": 8, "image_size": 16}
TEXT = {"width": 16, "heads": 2, "layers": 1, "context_length": 8, "vocab_size": 64}
SIZES = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
VIT = {"model_type": "vit", "architectures": ["ViTModel"], "image_size": 32, "patch_size": 8, **SIZES}
OWN = {"auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}, "model_type": "its_own"}
WORDS = {"auto_map": {"AutoTokenizer": [None, "own.Words"]}, "tokenizer_class": "OwnWords", "pad_token": "<end>"}


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that code which ran would have made; modules are kept in a cache of the test's own."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "ran"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every question at the terminal, each answered with yes."""
    questions: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda question="": questions.append(question) or "y")
    return questions


def clip(folder: Path, **text: Any) -> str:
    folder.mkdir(exist_ok=True)
    config = {"model_cfg": {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": {**TEXT, **text}}}
    (folder / "clip.json").write_text(json.dumps(config))
    return f"open_clip:{folder / 'clip.json'}"


def disarmed(armed: Callable[[], object], mark: Path) -> None:
    """Show that a file would have run code by itself, and take the mark away."""
    armed()
    assert mark.exists()
    mark.unlink()


def test_a_tokenizers_settings_do_not_trust_code(tmp_path: Path, mark: Path, asked: list[str]) -> None:
    files = with_own_code(tmp_path / "words", mark, "tokenizer_config.json", **WORDS)
    made = Words(models.WordLevel({"?": 0, "<end>": 1}, unk_token="?"))
    made.save(str(files / "tokenizer.json"))
    disarmed(lambda: transformers.AutoTokenizer.from_pretrained(files, trust_remote_code=True), mark)
    trusting = {"tokenizer_kwargs": {"trust_remote_code": True}}
    model: Any = prisma.load(clip(tmp_path, hf_tokenizer_name=str(files), **trusting), pretrained=False)
    with pytest.raises(LoadError, match=r"no file may give \(trust_remote_code\).*model\.tokenizer"):
        model.tokens(["a cat"])
    with pytest.warns(UserWarning, match="tokenizer is not saved.*trust_remote_code"):
        prisma.save(model, tmp_path / "saved")
    model = prisma.load(clip(tmp_path, hf_tokenizer_name=str(files)), pretrained=False)
    assert model.tokens(["a cat"]).shape == (1, 8)  # by transformers' own class
    assert not mark.exists()
    assert asked == []


def test_a_tokenizer_of_the_hub_brings_no_code(
    tmp_path: Path, mark: Path, asked: list[str], loopback: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # "../../etc" is a folder where the checkout lies two folders deep
    files = with_own_code(loopback.repository("someone/words"), mark, "tokenizer_config.json", **WORDS)
    Words(models.WordLevel({"?": 0, "<end>": 1}, unk_token="?")).save(str(files / "tokenizer.json"))
    model: Any = prisma.load(clip(tmp_path, hf_tokenizer_name="someone/words"), pretrained=False)
    assert model.tokens(["a cat"]).shape == (1, 8)
    assert not [request for request in loopback.asked if request.endswith(".py")]
    model = prisma.load(clip(tmp_path, hf_tokenizer_name="../../etc"), pretrained=False)
    with pytest.raises(UnknownName, match=r"\.\./\.\./etc"):
        model.tokens(["a cat"])
    assert not mark.exists()
    assert asked == []


@pytest.mark.parametrize("key", ["trust_remote_code", "cache_dir", "code_revision", "token", "subfolder", "gguf_file"])
def test_a_saved_tokenizer_sets_what_open_clip_has_alone(key: str, tmp_path: Path) -> None:
    kind = "open_clip.tokenizer.HFTokenizer"
    (tmp_path / "tokenizer.json").write_text(json.dumps({"kind": kind, "context_length": 8, key: True}))
    with pytest.raises(LoadError, match=rf"no file may give \({key}\)"):
        OpenClipSource().load_processor(tmp_path)
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"kind": "open_clip.tokenizer.SimpleTokenizer", "bpe_path": str(tmp_path / "secret.gz")})
    )
    with pytest.raises(LoadError, match=r"no file may give \(bpe_path\)"):
        OpenClipSource().load_processor(tmp_path)


@pytest.mark.parametrize("kwargs", [5, ["clean"], {"clean": "no such way"}, {"context_length": "many"}])
def test_tokenizers_settings_of_other_kinds(kwargs: Any, tmp_path: Path) -> None:
    model: Any = prisma.load(clip(tmp_path, tokenizer_kwargs=kwargs), pretrained=False)
    with pytest.raises(LoadError, match="tokenizer"):
        model.tokens(["a cat"])


def test_a_text_tower_asks_nothing_at_the_terminal(tmp_path: Path, mark: Path, asked: list[str]) -> None:
    """open_clip reads its configuration without a word on trust, and transformers then asks."""
    files = with_own_code(tmp_path / "tower", mark, **OWN)
    disarmed(lambda: transformers.AutoConfig.from_pretrained(files), mark)
    assert len(asked) == 1
    with pytest.raises(LoadError, match=r"its_own.*own\.Config.*not run"):
        prisma.load(clip(tmp_path, hf_model_name=str(files), hf_proj_type="linear"), pretrained=False)
    assert len(asked) == 1
    assert not mark.exists()


def test_a_model_of_transformers_brings_no_code(tmp_path: Path, mark: Path, asked: list[str]) -> None:
    files = with_own_code(tmp_path / "model", mark, **OWN)
    disarmed(lambda: transformers.AutoConfig.from_pretrained(files, trust_remote_code=True), mark)
    for pretrained in (True, False):
        with pytest.raises(LoadError, match=r"own\.Config, own\.Model.*not run.*trust_remote_code=True"):
            prisma.load(f"hf:{files}", pretrained=pretrained)
    assert not mark.exists()
    assert asked == []


def test_a_part_of_a_configuration_brings_no_code(tmp_path: Path, mark: Path, asked: list[str]) -> None:
    """A class of transformers' own makes its towers by what their configurations say, without a word on trust."""
    inner = {"auto_map": {"AutoModel": f"{tmp_path / 'model'}--own.Model"}, "model_type": "blip_text_model"}
    config = {"model_type": "vision-text-dual-encoder", "vision_config": VIT, "text_config": inner}
    files = with_own_code(tmp_path / "model", mark, **config)
    read = transformers.AutoConfig.from_pretrained
    with contextlib.suppress(ValueError, TypeError, AttributeError):  # its code ran, and makes no model
        transformers.AutoModel.from_config(read(files, trust_remote_code=False), trust_remote_code=False)
    disarmed(lambda: None, mark)
    assert len(asked) == 1
    with pytest.raises(LoadError, match=r"own\.Model.*not run"):
        prisma.load(f"hf:{files}", pretrained=False)
    assert not mark.exists()
    assert len(asked) == 1


def test_an_image_processor_named_after_a_model(tmp_path: Path, mark: Path, asked: list[str]) -> None:
    """transformers looks its name up among all it exports, and forgets that code is not trusted."""
    files = with_own_code(tmp_path / "model", mark, **VIT, auto_map={"AutoModel": "own.Model"})
    (files / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "AutoConfig"}))
    settings = {"image_processor_type": "AutoConfig", "auto_map": {"AutoConfig": "own.Config"}, "model_type": "its_own"}
    with_own_code(tmp_path / "armed", mark, "preprocessor_config.json", **settings)
    (tmp_path / "armed" / "config.json").write_text(json.dumps(settings))
    disarmed(lambda: transformers.AutoImageProcessor.from_pretrained(tmp_path / "armed", trust_remote_code=False), mark)
    assert len(asked) == 1
    (files / "config.json").write_text(json.dumps({**VIT, **{"auto_map": settings["auto_map"]}}))
    model = prisma.load(f"hf:{files}", pretrained=False)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 17, 24)
    assert len(asked) == 1
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pipeline", "AutoModel", "AutoConfig", "ViTModel", "logging", "nothing", None, 5])
def test_a_saved_image_processor_is_one(name: Any, tmp_path: Path) -> None:
    """``transformers.pipeline(model=..., trust_remote_code=True)`` is one line of JSON away, where names are called."""
    settings = {"image_processor_type": name, "model": "./evil", "trust_remote_code": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(LoadError, match=r"no image.processor"):
        HfSource().load_processor(tmp_path)


def test_a_kernel_of_the_hub_is_not_fetched(tmp_path: Path) -> None:
    kernel = {"attn_implementation": "kernels-community/any", "experts_implementation": "someone/other"}
    config = {**VIT, **kernel, "_attn_implementation_internal": "someone/other"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ImportError, match="kernels"):
        transformers.ViTModel(transformers.AutoConfig.from_pretrained(tmp_path))
    assert prisma.load(f"hf:{tmp_path}", pretrained=False)(torch.zeros(1, 3, 32, 32)).shape == (1, 17, 24)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_folder_without_code(hidden: bool, tmp_path: Path, mark: Path) -> None:
    """Names of code are found at any depth, and behind escapes; all else stays, weights by links."""
    deep = {"a": [{"auto_map": {"AutoModel": ["x.Y", None]}, "b": 1.5}], "text": "ä", "attn_implementation": None}
    files = with_own_code(tmp_path / "model", mark, **deep)
    if hidden:
        (files / "config.json").write_text((files / "config.json").read_text().replace("auto_map", "auto\\u005fmap"))
    (files / "weights.bin").write_bytes(b"12")
    (files / "broken.json").write_text("{auto_map")
    with without_code(files) as clean:
        assert json.loads((clean / "config.json").read_text()) == {"a": [{"b": 1.5}], "text": "ä"}
        assert sorted(path.name for path in clean.iterdir()) == ["broken.json", "config.json", "weights.bin"]
        assert (clean / "weights.bin").read_bytes() == b"12"
    assert not clean.exists()
    assert (files / "weights.bin").exists()
    assert "(x.Y)" in code_in(files)
    (files / "config.json").write_text('{"a": 1}')
    with without_code(files) as clean:
        assert clean == files
    assert code_in(files) == ""
