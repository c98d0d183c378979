"""Tokenizers of other libraries: saved beside a model's weights by their source, or said to be lost."""

from __future__ import annotations

import json
import shutil
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from prisma_conformance.randomise import randomise
from torch import Tensor

import prisma_core as prisma
from prisma_core import InputError, LoadError, PluginError, UnknownName, hookimpl
from prisma_core import host as hosting
from prisma_core.contract.source import Loaded, ModelInfo, Source
from prisma_core.host import Host
from prisma_core.model import MissingProcessor
from prisma_core.saving.folder import SPEC
from prisma_core.saving.processors import ProcessorFolder
from prisma_core.spec import NormSpec, TextSpec
from prisma_core.transformer import HookedText, build

TEXTS = ["a cat", "two dogs"]
Plugins = Callable[..., None]


class Letters:
    """A third-party tokenizer: letters, counted from a number that is a fact of its own."""

    def __init__(self, first: int):
        self.first = first

    def __call__(self, texts: Sequence[str]) -> Tensor:
        rows = [[self.first + ord(letter) % 20 for letter in text[:8]] for text in texts]
        return torch.tensor([row + [0] * (9 - len(row)) for row in rows])

    def save_pretrained(self, folder: Path) -> None:
        (folder / "first.json").write_text(json.dumps(self.first))


class LetterSource(Source):
    """A third-party source."""

    name = "letters"
    install = 'pip install "letters"'

    def load(self, rest: str, **options: Any) -> Loaded:
        raise NotImplementedError  # it only makes processors again

    def models(self) -> Iterator[ModelInfo]:
        yield from ()

    def load_processor(self, folder: Path) -> Letters:
        return Letters(json.loads((folder / "first.json").read_text()))


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Plugins:
    """Return a function that makes these sources the only ones installed."""

    def install(*sources: Source) -> None:
        module = types.ModuleType("plugin_for_tests_of_companions")
        module.prisma_sources = hookimpl(lambda: list(sources))  # type: ignore[attr-defined]
        module.prisma_sources.__name__ = "prisma_sources"  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(hosting, "_host", Host([EntryPoint("stranger", module.__name__, "prisma")]))

    install(LetterSource())
    return install


@pytest.fixture
def reader() -> HookedText:
    facts = {"norm": NormSpec(eps=1e-3), "scale": 0.4, "d_mlp": 20, "ln_final": None, "n_classes": None}
    spec = TextSpec.plain(layers=1, n_vocab=50, n_ctx=9, **facts)
    return randomise(build(spec), torch.Generator().manual_seed(0)).eval()  # type: ignore[return-value]


@torch.no_grad()
def read(model: Any) -> Tensor:
    return model(model.tokens(TEXTS))


def again(model: Any, folder: Path) -> Any:
    with warnings.catch_warnings(action="error"):
        return prisma.load(f"file:{prisma.save(model, folder)}")


def test_what_a_source_knows_is_saved(reader: HookedText, plugins: Plugins, tmp_path: Path) -> None:
    reader.tokenizer = Letters(5)
    first = again(reader, tmp_path / "first")
    assert isinstance(vars(first)["tokenizer"], ProcessorFolder), "made before it was used"
    assert torch.equal(read(first), read(reader))
    second = again(prisma.load(f"file:{tmp_path / 'first'}"), tmp_path / "second")  # not made in between
    over = again(second, tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    assert torch.equal(read(over), read(reader))
    assert torch.equal(read(second), read(reader))
    assert sorted(path.name for path in (tmp_path / "second" / "companions").rglob("*")) == ["first.json", "tokenizer"]


def test_a_model_without_one_leaves_none(reader: HookedText, plugins: Plugins, tmp_path: Path) -> None:
    reader.tokenizer = Letters(5)
    again(reader, tmp_path)
    reader.tokenizer = None
    bare = again(reader, tmp_path)
    assert bare.tokenizer is None
    assert not (tmp_path / "companions").exists()
    with pytest.raises(InputError, match="no tokenizer: an adapted model comes without"):
        bare.tokens("cat")


def test_a_function_of_ones_own_is_said_to_be_lost(reader: HookedText, plugins: Plugins, tmp_path: Path) -> None:
    def spelled(texts: Sequence[str]) -> Tensor:
        return Letters(3)(texts)

    reader.tokenizer = spelled
    with pytest.warns(UserWarning, match="not saved with the model: no source of an installed plugin saves .*spelled"):
        prisma.save(reader, tmp_path / "first")
    model: Any = prisma.load(f"file:{tmp_path / 'first'}")
    assert isinstance(model.tokenizer, MissingProcessor)
    with pytest.warns(UserWarning, match="saves .*spelled"):
        prisma.save(model, tmp_path / "second")
    model = prisma.load(f"file:{tmp_path / 'second'}")
    with pytest.raises(InputError, match=r"was not saved with this model: no source.*spelled\. Set model\.tokenizer"):
        model.tokens("cat")
    tokens = torch.ones(1, 9, dtype=torch.long)
    assert torch.equal(model(tokens), reader(tokens))
    model.tokenizer = spelled
    assert torch.equal(read(model), read(reader))


def test_a_plugin_or_a_library_that_is_not_there_is_named(reader: HookedText, plugins: Plugins, tmp_path: Path) -> None:
    reader.tokenizer = Letters(5)
    model = again(reader, tmp_path)
    plugins()
    with pytest.raises(UnknownName, match="No source 'letters'"):
        model.tokens("cat")

    class Absent(LetterSource):
        library = "library_that_nobody_has"

    plugins(Absent())
    with pytest.raises(PluginError, match=r'needs library_that_nobody_has.*pip install "letters"'):
        model.tokens("cat")
    plugins(LetterSource())
    assert torch.equal(read(model), read(reader))


class Forgetful(LetterSource):
    def load_processor(self, folder: Path) -> Letters:
        return Letters(6)


class Broken(LetterSource):
    def save_processor(self, processor: Any, folder: Path) -> None:
        raise ZeroDivisionError("of its own")


@pytest.mark.parametrize(
    ("source", "why"),
    [(Forgetful(), "'letters' does not read back what it wrote"), (Broken(), "ZeroDivisionError: of its own")],
)
def test_what_does_not_come_back_the_same_is_lost(
    source: Source, why: str, reader: HookedText, plugins: Plugins, tmp_path: Path
) -> None:
    reader.tokenizer = Letters(5)
    again(reader, tmp_path)
    plugins(source)
    with pytest.warns(UserWarning, match=why):
        prisma.save(reader, tmp_path)
    assert not (tmp_path / "companions").exists()
    with pytest.raises(InputError, match=why):
        prisma.load(f"file:{tmp_path}").tokens("cat")  # type: ignore[attr-defined]


def without_digests(folder: Path) -> None:
    """Make a folder as it was written before there were digests."""
    facts = json.loads((folder / SPEC).read_text())
    del facts["weights"]
    for record in facts["companions"].values():
        record.pop("sha256", None)
    (folder / SPEC).write_text(json.dumps(facts))


def test_files_that_change_or_vanish_are_not_used(reader: HookedText, plugins: Plugins, tmp_path: Path) -> None:
    reader.tokenizer = Letters(5)
    early, made = again(reader, tmp_path), prisma.load(f"file:{tmp_path}")
    before = read(made)
    reader.tokenizer = Letters(7)
    prisma.save(reader, tmp_path)
    with pytest.raises(LoadError, match="changed since the model was loaded"):
        early.tokens("cat")
    assert torch.equal(read(made), before)
    (tmp_path / "companions" / "tokenizer" / "first.json").write_text("{")
    with pytest.raises(LoadError, match="changed since the model was loaded or saved"):
        prisma.load(f"file:{tmp_path}").tokens("cat")  # type: ignore[attr-defined]
    without_digests(tmp_path)
    with pytest.raises(LoadError, match="'letters' cannot read"):
        prisma.load(f"file:{tmp_path}").tokens("cat")  # type: ignore[attr-defined]
    shutil.rmtree(tmp_path / "companions")
    with pytest.raises(LoadError, match="is not there"):
        prisma.load(f"file:{tmp_path}").tokens("cat")  # type: ignore[attr-defined]


@pytest.mark.parametrize("record", [["letters"], {"tokenizer": "letters"}, {"tokenizer": {}}, 3])
def test_facts_that_are_none_are_refused(record: Any, reader: HookedText, plugins: Plugins, tmp_path: Path) -> None:
    facts = json.loads((prisma.save(reader, tmp_path) / SPEC).read_text())
    (tmp_path / SPEC).write_text(json.dumps(facts | {"companions": record}))
    with pytest.raises(LoadError, match="does not describe a model"):
        prisma.load(f"file:{tmp_path}")
