"""open_clip's tokenizers: made as a configuration says, and kept with a saved model."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from prisma_core.plugin import LoadError, PluginError, qualified_name

FACTS, FILES = "tokenizer.json", "files"
SIMPLE, OF_TRANSFORMERS = "open_clip.tokenizer.SimpleTokenizer", "open_clip.tokenizer.HFTokenizer"
CLEANING = ("lower", "whitespace", "canonicalize")


class Tokenizer:
    """The tokenizer that a text tower's configuration asks for, made at first use: some come from the hub.

    Args:
        config: of the text tower.
        of: what the model is called, for errors.
        folder: where the tokenizer's files lie, if it needs any; default the hub.
    """

    def __init__(self, config: Mapping[str, Any] | None = None, of: str = "the model", folder: Path | None = None):
        self.config = dict(config or {})
        self.of = of
        self.folder = folder
        self._made: Any = None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self.made()(list(texts))

    def made(self) -> Any:
        """Return open_clip's own object.

        Raises:
            LoadError: its files cannot be reached or read.
        """
        if self._made is None:
            self._made = self._make()
        return self._made

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of some tokens, special ones included."""
        made = self.made()
        return str(getattr(made, "tokenizer", made).decode(list(tokens)))

    def _make(self) -> Any:
        from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer

        name = self.config.get("hf_tokenizer_name")
        facts: dict[str, Any] = {"context_length": DEFAULT_CONTEXT_LENGTH}
        facts |= {key: self.config[key] for key in ("context_length",) if key in self.config}
        facts |= self.config.get("tokenizer_kwargs") or {}
        if not name:
            return SimpleTokenizer(**facts)
        facts["tokenizer_mode"] = self.config.get("tokenizer_mode")
        folder = self.folder or (Path(name) if Path(name).is_dir() else None)
        if folder is not None:
            return _of_files(folder, facts)
        from prisma_core.plugin import hub

        reference = f"the tokenizer of {self.of}, {name},"
        if hub.cached(name, ["tokenizer_config.json", "tokenizer.json"]) is None:
            hub.reach(reference, instead="Set model.tokenizer, or give tokens [text pos].")
        return hub.asking(reference, partial(HFTokenizer, name, **facts))


def _of_files(folder: Path, facts: Mapping[str, Any]) -> Any:
    from open_clip.tokenizer import HFTokenizer

    if importlib.util.find_spec("transformers") is None:
        raise PluginError(
            f'The tokenizer in {folder} needs transformers, which is not installed: pip install "prisma-interp[clip]"'
        )
    try:
        return HFTokenizer(str(folder), local_files_only=True, trust_remote_code=False, **facts)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise LoadError(f"The tokenizer in {folder} could not be read: {error}") from error


# -------------------------------------------------------------------- saved


def save(made: Any, folder: Path) -> None:
    """Write one of open_clip's own tokenizers into a folder.

    Raises:
        LoadError: it holds what its facts do not say.
    """
    kind = qualified_name(made)
    facts: dict[str, Any] = {"kind": kind, "context_length": made.context_length, "clean": _cleaning(made)}
    if kind == OF_TRANSFORMERS:
        facts |= {"strip_sep_token": made.strip_sep_token, "tokenizer_mode": made.tokenizer_mode}
        made.tokenizer.save_pretrained(folder / FILES)
    elif kind == SIMPLE:
        facts["additional_special_tokens"] = [made.decoder[token] for token in made.all_special_ids[2:]]
        again = _simple(facts)
        if made.reduction_fn is not None:
            raise LoadError("it shortens texts at random (reduction_mask)")
        if (again.encoder, again.bpe_ranks) != (made.encoder, made.bpe_ranks):
            raise LoadError("its vocabulary is another than the one that comes with open_clip (bpe_path)")
    else:
        raise LoadError(f"{kind} is none of open_clip's tokenizers that can be saved")
    (folder / FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def load(folder: Path) -> Any:
    """Return the tokenizer that ``save`` wrote."""
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return _simple(facts) if facts["kind"] == SIMPLE else _of_files(folder / FILES, _without_kind(facts))


def _simple(facts: Mapping[str, Any]) -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(**_without_kind(facts))


def _without_kind(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name != "kind"}


def _cleaning(made: Any) -> str:
    from open_clip.tokenizer import get_clean_fn

    for name in CLEANING:
        if get_clean_fn(name) is made.clean_fn:
            return name
    raise LoadError("it cleans texts with a function of one's own (clean_fn)")
