"""Sizes that upstream's modules carry as plain numbers beside their tensors: they must be those that the spec has.

An adapter reads each size in one place, and upstream's code may read it in another: heads of an attention that were
pruned, a patch size that was set since.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

from pydantic import BaseModel
from torch import nn

from prisma_core.spec import AnySpec, AttentionSpec, EmbedSpec
from prisma_core.spec.layout import TokenLayout

HEADS = ("num_heads", "num_attention_heads", "num_kv_heads", "num_key_value_heads", "n_heads", "n_head", "heads")
WIDTHS = ("head_dim", "attention_head_size", "head_size", "head_width")
T = TypeVar("T")


def sizes_of(spec: AnySpec) -> dict[str, set[object]]:
    """Return the sizes of a spec, by the names that libraries give them."""
    attentions = list(_inside(spec, AttentionSpec))
    heads: set[object] = {n for one in attentions for n in (one.n_heads, one.n_kv_heads)}
    widths: set[object] = {one.d_head for one in attentions}
    return {
        **dict.fromkeys(HEADS, heads),
        **dict.fromkeys(WIDTHS, widths),
        "all_head_size": {one.n_heads * one.d_head for one in attentions},
        "patch_size": {one.patch for one in _inside(spec, EmbedSpec)},
        "num_prefix_tokens": {one.n_prefix for one in _inside(spec, TokenLayout)},
    }


def other_size(module: nn.Module, sizes: Mapping[str, set[object]]) -> str:
    """Name a size of a module that the spec does not have; empty where there is none."""
    for name in sizes.keys() & vars(module).keys():
        value: Any = vars(module)[name]
        if name == "patch_size":  # of a video's the first is that of frames
            value = (value, value) if isinstance(value, int) else tuple(value or ())[-2:]
        if name == "num_prefix_tokens":
            value = value or 0
        if sizes[name] and isinstance(value, int | tuple) and value not in sizes[name]:
            known = ", ".join(map(str, sorted(cast("Any", sizes[name]))))
            return f"{name}={vars(module)[name]!r}, where its tensors and the rest of it are of {known}"
    return ""


def _inside(value: object, kind: type[T]) -> Iterator[T]:
    """Yield the specs of a kind inside another."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _inside(getattr(value, name), kind)
    elif isinstance(value, tuple):
        for one in cast("Iterable[object]", value):
            yield from _inside(one, kind)
