"""A tokenizer of whole words, for captions of a small world."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from prisma_core.plugin import Count, InputError, LoadError, checked, read_json, several, write_text

PAD, UNKNOWN, END = "<pad>", "<unknown>", "<end>"
FILE = "words.json"


class Words:
    """From texts to tokens, a word each, and back.

    Capitals and punctuation do not count. A text is followed by ``<end>``, the largest id, and filled up with
    ``<pad>``; what is longer is cut before its ``<end>``.

    Args:
        words: the vocabulary, in the order of their ids behind ``<pad>`` and ``<unknown>``.
        length: tokens of each text, ``<end>`` among them.

    >>> words = Words(("a", "red", "circle"), length=6)
    >>> words(["A red circle."]).tolist()
    [[2, 3, 4, 5, 0, 0]]
    >>> words.decode(words(["A red circle."]))
    ['a red circle']
    """

    @checked
    def __init__(self, words: Sequence[str], length: Count):
        self.words = tuple(words)
        self.length = length
        self.tokens = (PAD, UNKNOWN, *self.words, END)
        self._ids = {word: index for index, word in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    @checked
    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Return tokens ``[text pos]``; words that are not in the vocabulary become ``<unknown>``."""
        split = [_words(text) for text in ([texts] if isinstance(texts, str) else texts)]
        rows = torch.zeros(len(split), self.length, dtype=torch.long)
        for row, text in zip(rows, split, strict=True):
            ids = [self._ids.get(word, 1) for word in text[: self.length - 1]] + [self._ids[END]]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    @checked
    def unknown(self, texts: str | Sequence[str]) -> list[str]:
        """Return the words of texts that are not in the vocabulary.

        >>> Words(("a", "red", "circle"), length=6).unknown("a crimson circle")
        ['crimson']
        """
        split = (_words(text) for text in ([texts] if isinstance(texts, str) else texts))
        return sorted({word for text in split for word in text} - set(self.words))

    @overload
    def decode(self, tokens: Tensor) -> list[str]: ...
    @overload
    def decode(self, tokens: Sequence[int]) -> str: ...

    @checked
    def decode(self, tokens: Tensor | Sequence[int]) -> list[str] | str:
        """Return the texts of tokens ``[text pos]``, or the text of one row of ids, up to ``<end>``.

        Raises:
            InputError: an id that is not in the vocabulary.
        """
        if isinstance(tokens, Tensor) and tokens.ndim == 2:
            return [self.decode(row.tolist()) for row in tokens]
        ids = several(tokens, "tokens [text pos], or a row of them")
        if wrong := [each for each in ids if not 0 <= each < len(self)]:
            raise InputError(f"Expected tokens from 0 to {len(self) - 1}, got {wrong[0]}.")
        until = ids.index(len(self) - 1) if len(self) - 1 in ids else len(ids)
        return " ".join(self.tokens[each] for each in ids[:until] if each)

    @checked
    def save_pretrained(self, folder: str | Path) -> None:
        """Write the vocabulary into a folder, which is made if it is not there.

        Raises:
            LoadError: the disk refuses.
        """
        facts = {"words": self.words, "length": self.length}
        write_text(Path(folder) / FILE, json.dumps(facts, indent=1) + "\n")

    @classmethod
    @checked
    def from_pretrained(cls, folder: str | Path) -> Words:
        """Return what ``save_pretrained`` wrote.

        Raises:
            LoadError: it is missing or corrupt.
        """
        try:
            return cls(**read_json(Path(folder) / FILE))
        except (ValueError, TypeError) as error:
            raise LoadError(f"{folder} holds no vocabulary: expected {FILE} with words and length.") from error


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
