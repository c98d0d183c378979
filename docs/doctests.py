"""Examples of docstrings (``>>>``) as blocks of code: an extension of griffe, which reads docstrings for the site."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?P=indent)(?!\n).+)*", re.MULTILINE)


class Doctests(griffe.Extension):
    """Fences every example, so that Markdown does not take ``>>>`` for quotations."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(_fenced, obj.docstring.value)


def _fenced(match: re.Match[str]) -> str:
    indent = match["indent"]
    return f"{indent}```pycon\n{match[0]}\n{indent}```"
