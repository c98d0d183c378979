"""A model's own tokenizer, for models that read; kept with a saved one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from prisma_core.plugin import LoadError, read_json, without_code

FACTS = "positions.json"
FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")


class Tokenizer:
    """Makes tokens ``[text pos]`` of texts, cut and filled up to the longest that the model reads.

    SigLIP reads the last token, and was trained with texts filled up. It is made at first use.

    Args:
        folder: where its files lie.
        positions: how many tokens the model reads, if its configuration says so.
        common: what else ``from_pretrained`` takes; ``trust_remote_code`` is the user's word.
    """

    def __init__(self, folder: Path, positions: int | None, common: dict[str, Any]):
        self.folder = folder
        self.positions = positions
        self.common = common
        self._made: Any = None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        made = self.made()
        longest = made.model_max_length if self.positions is None else min(self.positions, made.model_max_length)
        options = {"padding": "max_length", "truncation": True, "max_length": longest, "return_tensors": "pt"}
        return made(list(texts), **options).input_ids

    def made(self) -> Any:
        """Return transformers' own object.

        Raises:
            LoadError: its files cannot be read.
        """
        if self._made is None:
            self._made = self._make()
        return self._made

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of some tokens, special ones included."""
        return str(self.made().decode(list(tokens)))

    def save_pretrained(self, folder: Path) -> None:
        """Write what makes it again.

        Raises:
            LoadError: its files cannot be read.
        """
        self.made().save_pretrained(folder)
        (folder / FACTS).write_text(json.dumps({"positions": self.positions}) + "\n", encoding="utf-8")

    def _make(self) -> Any:
        from transformers import AutoTokenizer

        try:
            with nullcontext(self.folder) if self.common["trust_remote_code"] else without_code(self.folder) as files:
                return AutoTokenizer.from_pretrained(files, **self.common)
        except Exception as error:  # the library below raises that very class
            raise LoadError(f"The tokenizer in {self.folder} could not be read: {error}") from error


def tokenizer(folder: Path, config: Any, common: dict[str, Any]) -> Tokenizer | None:
    """Return the tokenizer whose files lie in a folder, or None if there are none."""
    positions = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
    return Tokenizer(folder, positions, common) if any((folder / name).is_file() for name in FILES) else None


def load(folder: Path) -> Tokenizer:
    """Return the tokenizer that ``save_pretrained`` wrote; code that came with it is not run."""
    positions = read_json(folder / FACTS).get("positions")
    if positions is not None and (type(positions) is not int or positions < 1):
        raise LoadError(f"{folder / FACTS} says positions={positions!r}: expected a whole number of tokens, or null.")
    return Tokenizer(folder, positions, {"local_files_only": True, "trust_remote_code": False})
