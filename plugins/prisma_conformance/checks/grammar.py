"""Grammar of the formulas behind the ``=`` of a hook map's rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple, cast

from prisma_core.plugin import PrismaError

_TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z_]\w*(?:\.\w+)*)|(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)|(?P<sign>[-+*.()]))")


class Prose(PrismaError):
    """A text that is no formula, with the word that is none."""


class Node(NamedTuple):
    """A formula or a part of one: an operator, a function, or a name, with its operands."""

    kind: str
    name: str
    operands: tuple[Node, ...] = ()


def parse(text: str) -> Node:
    """Parse a formula.

    Raises:
        Prose: it is none.
    """
    return _Parser(text).formula()


def nodes(node: Node) -> Iterator[Node]:
    """Yield a formula and all of its parts."""
    yield node
    for operand in node.operands:
        yield from nodes(operand)


class _Parser:
    """Recursive descent over the tokens of a text."""

    def __init__(self, text: str):
        self.text = text
        self.tokens: list[tuple[str, str]] = []
        at = 0
        while text[at:].strip():
            match = _TOKEN.match(text, at)
            if match is None:
                raise Prose(f"{text[at:].strip()[0]!r} has no meaning in a formula")
            kind = cast(str, match.lastgroup)
            self.tokens.append((kind, match[kind]))
            at = match.end()
        self.at = 0

    def formula(self) -> Node:
        node = self._sum()
        if self.at < len(self.tokens):
            raise Prose(f"{self.tokens[self.at][1]!r} stands where the formula ends")
        return node

    def _next(self, *signs: str) -> str | None:
        """Take the next token if it is one of these signs."""
        if self.at < len(self.tokens) and self.tokens[self.at] in [("sign", sign) for sign in signs]:
            self.at += 1
            return self.tokens[self.at - 1][1]
        return None

    def _sum(self) -> Node:
        node = self._product()
        while sign := self._next("+", "-"):
            node = Node(sign, "", (node, self._product()))
        return node

    def _product(self) -> Node:
        node = self._dot()
        while sign := self._next("*"):
            node = Node(sign, "", (node, self._dot()))
        return node

    def _dot(self) -> Node:
        node = self._atom()
        if self._next("."):
            return Node(".", "", (node, self._atom()))
        if self.at < len(self.tokens) and self.tokens[self.at][0] == "name":
            return Node("of", "", (node, self._atom()))
        return node

    def _atom(self) -> Node:
        if self._next("("):
            return self._closed()
        if self.at == len(self.tokens) or self.tokens[self.at][0] == "sign":
            raise Prose(f"{self.text!r} lacks an operand")
        kind, name = self.tokens[self.at]
        self.at += 1
        if kind == "name" and self._next("("):
            return Node("call", name, (self._closed(),))
        return Node(kind, name)

    def _closed(self) -> Node:
        node = self._sum()
        if self._next(")") is None:
            raise Prose(f"a bracket of {self.text!r} is not closed")
        return node


__all__ = ["Node", "Prose", "nodes", "parse"]
