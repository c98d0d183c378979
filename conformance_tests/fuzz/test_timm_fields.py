"""Every argument of timm's constructors, moved by itself: followed, refused in words, or not built by timm either.

Facts are read off built modules. This stands in for the constructors: whatever they are given, the numbers are timm's
own, or there are none. ``--every-field`` tries every value on every class.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from prisma_conformance.pytest import COUNTS
from prisma_timm.adapters import adapters
from prisma_timm.cases import case, types_of
from torch import nn

import prisma_core as prisma
from prisma_core import UnsupportedArchitecture
from prisma_core.contract.case import Case

from .hf_fields import moved
from .hf_sweep import Model, Verdict
from .timm_values import CLASSES, NAMES, arguments, values


def of(name: str) -> Case:
    """Return the small case of an architecture."""
    made = case(name, types_of(adapters()))
    assert made is not None
    return made


@contextmanager
def recording(kind: type[nn.Module], calls: list[dict[str, Any]]) -> Iterator[None]:
    """Record what a constructor is given."""
    init = kind.__init__

    def record(self: Any, *args: Any, **options: Any) -> None:
        calls.append(inspect.signature(init).bind(self, *args, **options).arguments)
        init(self, *args, **options)

    kind.__init__ = record
    try:
        yield
    finally:
        kind.__init__ = init


def swept(name: str, *, every: bool) -> Iterator[tuple[str, Any, Verdict]]:
    """Yield each argument of an architecture's class, a value of it, and the verdict."""
    model = Model(of(name))
    kind: Any = type(model.upstream)
    calls: list[dict[str, Any]] = []
    with recording(kind, calls):
        model.case.build()
    given = {**calls[-1], **calls[-1].get("kwargs", {})}
    for argument, parameter in arguments(kind).items():
        for value in values(kind, argument, given.get(argument, parameter.default)):
            verdict = model.judge([(kind, argument, value)], late=False)
            yield argument, value, verdict
            if not every and verdict.kind != "upstream fails" and not argument.endswith(tuple(CLASSES)):
                break


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_argument_is_followed_refused_or_not_built(
    name: str, record_property: Callable[[str, object], None], request: pytest.FixtureRequest
) -> None:
    verdicts = list(swept(name, every=bool(request.config.getoption("--every-field"))))
    assert not [f"{argument}={value!r}: {one.why}" for argument, value, one in verdicts if one.kind == "defect"]
    ran = [(argument, one) for argument, _, one in verdicts if one.kind != "upstream fails"]
    # Where nothing changes nothing is proven. NaFlexVit has its arguments in one object.
    assert len({argument for argument, one in ran if one.mattered}) >= (2 if name.startswith("naflexvit") else 5)
    kinds = Counter(one.kind for *_, one in verdicts)
    record_property(COUNTS, json.dumps(["arguments of timm's constructors", {"classes": 1, **kinds}]))


def test_every_class_is_moved() -> None:
    kinds = {type(part) for name in NAMES for part in of(name).build().modules()}  # an encoder may be adapted alone
    classes = {f"{kind.__module__}.{kind.__qualname__}" for kind in kinds}
    assert set(types_of(adapters())) <= classes


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "qwen3_vit_88m"])
def test_a_model_without_blocks_is_unsupported(name: str) -> None:
    build = of(name).build
    with moved([(type(build()), "depth", 0)]), pytest.raises(UnsupportedArchitecture, match="0 parts: there is no"):
        prisma.adapt(build())


@pytest.mark.parametrize("name", ["qwen3_vit_88m", "deepseek_vit_412m"])
def test_a_model_without_a_native_size_is_unsupported(name: str) -> None:
    build = of(name).build
    upstream: Any = build()
    with (
        moved([(type(upstream.encoder), "img_size", None)]),
        pytest.raises(UnsupportedArchitecture, match="no native image size"),
    ):
        prisma.adapt(build())
