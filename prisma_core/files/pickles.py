"""Pickles, read without Python's unpickler: nothing that they name is imported or run.

A small machine follows the instructions that ``pickletools`` reads. It makes numbers, texts and containers; the
caller says what stands for a name and for a persistent identity. It changes nothing in the process.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable
from types import FunctionType, MethodType
from typing import IO, Any, cast

_VALUES = ("INT", "BININT", "LONG", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BIN", "UNICODE", "BINUNICODE")
_KEYS = (str, int, float, bytes, type(None))
Find = Callable[[str, str], Any]


class Inert:
    """Stands for an object that is neither a number, a text, a container nor a plain tensor."""


class SavedObject:
    """An object of a file, without behaviour: its class's full name and its attributes.

    Args:
        path: the full name of its class, or of the function that made it.
    """

    def __init__(self, path: str):
        self.path = path
        self.states: list[dict[str, Any]] = []

    def __repr__(self) -> str:
        return f"<saved {self.path[:200]}>"

    @property
    def name(self) -> str:
        """The name of its class alone."""
        return self.path.rpartition(".")[2]

    @property
    def attributes(self) -> dict[str, Any]:
        """Its attributes by name."""
        return {key: value for state in self.states for key, value in state.items()}

    def build(self, state: Any) -> None:
        """Take attributes: a dictionary, or the two of an object with slots."""
        parts: tuple[Any, ...] = cast("tuple[Any, ...]", state) if isinstance(state, tuple) else (state,)
        self.states.extend(cast("dict[str, Any]", part) for part in parts if isinstance(part, dict))

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or a part, parameter or buffer of a module, by its name or dotted path."""
        first, _, rest = name.partition(".")
        attributes = self.attributes
        value = attributes.get(first)
        for kind in ("_modules", "_parameters", "_buffers"):
            held: Any = attributes.get(kind)
            value = cast("dict[str, Any]", held).get(first) if value is None and isinstance(held, dict) else value
        if rest:
            return value.get(rest, default) if isinstance(value, SavedObject) else default
        return default if value is None else value


class Refused(Exception):
    """The reason why a file is not read, as a text that follows its path."""


def inert(*_: Any) -> Inert:
    return Inert()


def maker(path: str) -> Callable[..., SavedObject]:
    """Return the function that stands for a class of this full name."""

    def make(*_: Any) -> SavedObject:
        return SavedObject(path)

    make.__qualname__ = path  # of a function that is named and not called
    return make


def call(make: Any, given: Any) -> Any:
    if not isinstance(make, FunctionType | MethodType):  # all that ``find`` returns to be called
        raise Refused("is corrupt: it calls what is no function.")
    return make(*given)


def put(target: Any, pairs: Iterable[Any] = ()) -> Any:
    """Put pairs into a dictionary; keys other than plain values become inert, since hashing them may never end."""
    if isinstance(target, dict):
        plain = ((key if isinstance(key, _KEYS) else Inert(), value) for key, value in pairs)
        cast("dict[Any, Any]", target).update(plain)
    return cast(Any, target)


def read_pickle(file: IO[bytes], find: Find, stored: Callable[[Any], Any]) -> Any:
    """Return the object of one pickle; the file then stands behind the pickle.

    Args:
        file: at the pickle's first instruction.
        find: returns what stands for a name in a module: a function or method, which is called where the pickle says
            so, or anything else, which is not.
        stored: returns what stands for a persistent identity.

    Raises:
        Refused: it holds an instruction that ``torch.save`` does not write, or calls what is no function.
        Exception: of any other type, where it is truncated or corrupt.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []
    memo: dict[int, Any] = {}
    for code, argument, _ in pickletools.genops(file):
        value: Any = argument
        items: list[Any] = []
        if code.name in ("TUPLE", "LIST", "DICT", "APPENDS", "SETITEMS", "ADDITEMS", "FROZENSET", "POP_MARK"):
            items, stack = stack, below.pop()  # all above the last mark
        match code.name:
            case "STOP":
                return stack.pop()
            case "PROTO" | "FRAME" | "POP_MARK":
                pass
            case "MARK":
                below.append(stack)
                stack = []
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[code.name])
            case "EMPTY_LIST" | "EMPTY_SET" | "LIST":  # of a set nothing but its items is wanted, and not their hashes
                stack.append(items)
            case "EMPTY_TUPLE" | "TUPLE" | "FROZENSET":
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(code.name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "EMPTY_DICT" | "DICT":
                stack.append(put({}, zip(items[::2], items[1::2], strict=True)))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = [stack.pop()] if code.name == "APPEND" else items
                if isinstance(stack[-1], list):
                    cast("list[Any]", stack[-1]).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                put(stack[-1], [(key, value)])
            case "SETITEMS":
                put(stack[-1], zip(items[::2], items[1::2], strict=True))
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if value is None else value] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "POP":
                stack.pop()
            case "BUILD":
                value = stack.pop()
                if isinstance(stack[-1], SavedObject):  # of any other object, what it is built of is left out
                    stack[-1].build(value)
            case "DUP":
                stack.append(stack[-1])
            case "GLOBAL":
                stack.append(find(*value.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(find(module, name))
            case "REDUCE" | "NEWOBJ":
                given, make = stack.pop(), stack.pop()
                stack.append(call(make, given))
            case "BINPERSID":
                stack.append(stored(stack.pop()))
            case name if name.startswith((*_VALUES, "BINBYTES")):
                stack.append(value)
            case name:
                raise Refused(f"is a pickle of an instruction that torch.save does not write ({name}): refused.")
    raise Refused("is truncated: its pickle has no end.")
