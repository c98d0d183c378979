"""Fields of transformers' configurations: which are read, other values for each, and models built with them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any, get_args

import pytest
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'prisma-interp[hf]'")

from transformers import PreTrainedConfig  # noqa: E402
from transformers.activations import ACT2FN  # noqa: E402

Config = type[PreTrainedConfig]
Move = tuple[Config, str, Any]  # a class of configurations, a field of it, and its new value
# What configurations take without declaring it.
UNDECLARED = ("num_labels", "attn_implementation")
APART = {
    "transformers_version": "of the file",
    "architectures": "of the file",
    "label2id": "id2label, the other way round",
    "dtype": "of the weights, which every test gives itself",
    "return_dict": "how outputs are handed over, not what they are",
}


@contextmanager
def moved(moves: Sequence[Move]) -> Iterator[None]:
    """Give fields these values in every configuration that is made in the scope."""
    changes: dict[Config, dict[str, Any]] = {}
    for kind, name, value in moves:
        changes.setdefault(kind, {})[name] = value
    with ExitStack() as stack:
        for kind, fields_of_kind in changes.items():
            stack.enter_context(_overridden(kind, fields_of_kind))
        yield


@contextmanager
def _overridden(kind: Config, changes: Mapping[str, Any]) -> Iterator[None]:
    defined_here, init = "__init__" in vars(kind), kind.__init__

    def override(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **{**options, **changes})

    kind.__init__ = override
    try:
        yield
    finally:
        if defined_here:
            kind.__init__ = init
        else:
            del kind.__init__


@contextmanager
def recording(reads: dict[Config, dict[str, None]]) -> Iterator[None]:
    """Record the names that are read off configurations, present or not, by class."""
    before = PreTrainedConfig.__getattribute__

    def get(self: Any, name: str) -> Any:
        reads.setdefault(type(self), {})[name.removeprefix("_")] = None
        return before(self, name)

    PreTrainedConfig.__getattribute__ = get
    try:
        yield
    finally:
        PreTrainedConfig.__getattribute__ = before


def configurations(upstream: nn.Module) -> dict[Config, list[Any]]:
    """Return the configurations in a model, those inside others too."""
    unique: dict[int, Any] = {}

    def add(config: Any) -> None:
        if isinstance(config, PreTrainedConfig) and id(config) not in unique:
            unique[id(config)] = config
            for inner in vars(config).values():
                add(inner)

    for module in upstream.modules():
        add(getattr(module, "config", None))
    return {kind: [one for one in unique.values() if type(one) is kind] for kind in map(type, unique.values())}


def names(kind: Config, config: Any, reads: Mapping[str, None], code: str) -> Iterator[str]:
    """Yield the fields of a configuration that something reads, by their keywords.

    Args:
        code: the source that must name undeclared fields too; the library reads many of them in general.
    """
    declared = {one.name.removeprefix("_") for one in fields(kind)}
    read = [name for name in reads if name in declared or re.search(rf"\b{name}\b", code)]
    for name in (*read, *(name for name in UNDECLARED if name not in read)):
        # What all classes share beside fields is methods, and how they are saved.
        shared = hasattr(PreTrainedConfig, name) and name not in declared and name not in UNDECLARED
        value = getattr(config, name, None)
        if not (shared or name in APART or callable(value) or isinstance(value, PreTrainedConfig)):
            yield name


def values(kind: Config, name: str, value: Any, code: str) -> Iterator[Any]:
    """Yield other values for a field, the likeliest to be valid first."""
    hint = next((one.type for one in fields(kind) if one.name.removeprefix("_") == name), None)
    seen = [value]
    for other in others(name, value, hint, code):
        if not any(type(other) is type(one) and other == one for one in seen):
            seen.append(other)
            yield other


def others(name: str, value: Any, hint: Any, code: str) -> Iterator[Any]:
    """Yield values of the kind of a field's own, or of what its type says where it has none."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (2 * value, value + 1, 1, value // 2, 0)
        yield from ([value, 2 * value], (value, value)) if "list" in str(hint) else ()
    elif isinstance(value, float):
        yield from (2 * value + 0.05, 0.0)
    elif isinstance(value, str):
        yield from ACTIVATIONS if value in ACT2FN else _words(name, hint, code)
    elif isinstance(value, dict):
        yield from ({i: str(i) for i in range(len(value) + 2)},) if name == "id2label" else _inside(value, code)
    elif isinstance(value, list | tuple):
        kind = type(value)
        if value and all(isinstance(one, int | float) for one in value):
            yield from (kind(2 * one for one in value), value[0])
        yield from (kind(reversed(value)), kind(value[:1]), kind([]))
        yield from (["stage1"], ["stem"], ["stem", "stage2"]) if "features" in name else ()
    if name == "attn_implementation":
        yield from ("eager", "sdpa")
    elif value is None:
        yield from _instead_of_nothing(name, hint, code)
    elif "None" in str(hint):
        yield None


ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh", "relu", "silu", "hardswish", "gelu_10", "prelu")


def _inside(value: dict[Any, Any], code: str) -> Iterator[dict[Any, Any]]:
    for key, one in value.items():
        yield from ({**value, key: other} for other in others(str(key), one, None, code))


def _instead_of_nothing(name: str, hint: Any, code: str) -> Iterator[Any]:
    kinds = str(hint)
    yield from _words(name, hint, code) if "str" in kinds or "Literal" in kinds else ()
    yield from (True,) if "bool" in kinds or hint is None else ()
    yield from (2, 1) if "int" in kinds else ()
    yield from (0.5,) if "float" in kinds else ()
    yield from ([0], [0, 1], [1, 2]) if "list" in kinds else ()


def _words(name: str, hint: Any, code: str) -> list[str]:
    """Return the words that upstream's code has in lines about a field, or its type lists."""
    lines = [line for line in code.splitlines() if re.search(rf"\b{name}\b", line)]
    words = [word for line in lines for word in re.findall(r"[\"']([\w/-]+)[\"']", line)]
    tables = [word for line in lines for word in re.findall(rf"(\w+)\[(?:self\.)?config\.{name}\]", line)]
    for table in tables:
        words += re.findall(r"[\"'](\w+)[\"']:", code.partition(f"\n{table} = {{")[2].partition("}")[0])
    return [*(word for word in get_args(hint) if isinstance(word, str)), *(word for word in words if word != name)]
