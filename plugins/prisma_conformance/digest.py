"""Digest of a model's facts without its sizes: equal for architectures that differ in size alone."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, cast

from prisma_core import HookedModel
from prisma_core.plugin import AnySpec

_WIDTHS = {"d_model", "d_mlp", "d_head", "d_pool", "n_vocab"}
_LENGTHS = {"image_size", "patch", "in_channels", "rows", "columns", "n_ctx"}
_SIZES = {*_WIDTHS, *_LENGTHS, "eps", "scale"}
_COUNTS = {"cls", "distillation", "registers", "n_classes", "pad_id", "eos_id"}


def digest_of_spec(spec: AnySpec) -> str:
    """Digest of a spec: twelve hexadecimal digits."""
    return _digest(json.dumps(_without_sizes(spec.model_dump(mode="json")), sort_keys=True))


def digest_of_points(model: HookedModel) -> str:
    """Digest of the kinds of hook points, for a model whose spec says little: twelve hexadecimal digits."""
    kinds = {re.sub(r"\d+", "", f"{name} {point.axes}") for name, point in model.hook_points().items()}
    return _digest("\n".join(sorted(kinds)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _without_sizes(value: Any) -> Any:
    if isinstance(value, list):
        kinds = {json.dumps(_without_sizes(item), sort_keys=True) for item in cast("list[Any]", value)}
        return sorted(kinds)
    if not isinstance(value, dict):
        return value
    items = cast("dict[str, Any]", value)
    facts = {
        key: item not in (None, 0) if key in _COUNTS else _without_sizes(item)
        for key, item in items.items()
        if key not in _SIZES
    }
    if "n_heads" in facts:
        facts["grouped"] = facts.pop("n_heads") != facts.pop("n_kv_heads")
    return facts


__all__ = ["digest_of_points", "digest_of_spec"]
