"""Tokens of a text as words."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def words_in(model: Any, tokens: Tensor) -> tuple[list[str], int]:
    """Return a word for each token ``[pos]`` of a text tower, and how many come before the padding at the end.

    Where the tokenizer has no ``decode``, a token's number stands for it.
    """
    ids: list[int] = tokens.tolist()
    n = len(ids)
    while n > 1 and ids[n - 1] == ids[-1]:
        n -= 1
    if ids[-1] not in (0, model.spec.pad_id):  # the end of the text, and what is filled up with it
        n += 1
    decode = getattr(model.tokenizer, "decode", None)
    words = [(decode([each]).strip() if decode else "") or f"token {each}" for each in ids]
    if decode and not decode([ids[n - 1]]).strip():
        words[n - 1] = "end of text"
    if model.spec.suffix:  # a token that the tower itself puts behind the text, so that nothing can be cut off
        return [*words, "class token"], len(words) + 1
    return [*words[:n], *["padding"] * (len(words) - n)], n
