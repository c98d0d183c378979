"""The upstream models of the plugins' cases, by name."""

from __future__ import annotations

from typing import Any

import pytest

from prisma_core.plugin import installed

LIBRARIES = {"timm": ["timm"], "clip": ["open_clip", "transformers"], "dino": ["transformers"], "hf": ["transformers"]}


def case(plugin: str, name: str) -> Any:
    """Return a new upstream of a case, in evaluation; a skip where its library is not installed."""
    for library in LIBRARIES[plugin]:
        pytest.importorskip(library)
    return next(one for one, _ in installed().cases({plugin}) if one.name == name).build().eval()
