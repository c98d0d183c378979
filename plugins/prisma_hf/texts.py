"""A model's own tokenizer, for models that read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from prisma_core.errors import LoadError

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")


class Tokenizer:
    """Makes tokens ``[text pos]`` of texts, cut and filled up to the longest that the model reads.

    SigLIP reads the last token, and was trained with texts filled up. It is made at first use.
    """

    def __init__(self, folder: Path, config: Any, common: dict[str, Any]):
        self.folder = folder
        self.config = getattr(config, "text_config", config)
        self.common = common
        self._made: Any = None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        if self._made is None:
            self._made = self._make()
        positions = getattr(self.config, "max_position_embeddings", self._made.model_max_length)
        longest = min(positions, self._made.model_max_length)
        options = {"padding": "max_length", "truncation": True, "max_length": longest, "return_tensors": "pt"}
        return self._made(list(texts), **options).input_ids

    def _make(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, **self.common)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise LoadError(f"The tokenizer in {self.folder} could not be read: {error}") from error


def tokenizer(folder: Path, config: Any, common: dict[str, Any]) -> Tokenizer | None:
    """Return the tokenizer whose files lie in a folder, or None if there are none."""
    return Tokenizer(folder, config, common) if any((folder / name).is_file() for name in FILES) else None
