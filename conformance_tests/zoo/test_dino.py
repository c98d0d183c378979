"""DINOv2 and DINOv3 as transformers has them come through with the same numbers."""

from __future__ import annotations

import prisma_dino
import pytest
from prisma_conformance.pytest import suite
from prisma_dino.canonical.meta_adapter import V1, V2, V3

from prisma_core.host import installed

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'prisma-interp[hf]'"
)

test_conformance = suite("dino")


def test_every_class_has_a_case() -> None:
    cases = [case.build() for case, _ in installed().cases({"dino"})]
    built = {f"{type(case).__module__}.{type(case).__qualname__}" for case in cases}
    claimed = {name for adapter in prisma_dino.prisma_adapters() for name in adapter.types}
    assert built == {name for name in claimed if name.startswith(("transformers.", "prisma_dino."))}
    # The classes of repositories that are no packages; their layout is tested by a module with their keys.
    assert claimed - built == {V1, V2, V3}
