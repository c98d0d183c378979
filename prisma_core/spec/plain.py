"""Facts by name, each given to the part of a model that has a field of that name: for specs said in one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from prisma_core.errors import InputError, suggest
from prisma_core.errors.arguments import LARGEST, expect, number
from prisma_core.spec.parts import AttentionSpec, BlockSpec, MlpSpec, NormSpec

LN = NormSpec(eps=1e-6)
PARTS = (BlockSpec, AttentionSpec, MlpSpec)


def facts_by_part(
    facts: Mapping[str, Any], parts: Iterable[type[BaseModel]], hidden: Iterable[tuple[type[BaseModel], str]] = ()
) -> dict[type[BaseModel], dict[str, Any]]:
    """Return the facts of each part, by field; one that several parts have goes to each of them.

    Fields in ``hidden`` are not given by name. A name that no part has is an ``InputError``; the nearest are suggested.
    """
    names = {part: [name for name in part.model_fields if (part, name) not in set(hidden)] for part in parts}
    known = {name for fields in names.values() for name in fields}
    for name in facts:
        if name not in known:
            raise InputError(f"No fact {name!r} in {', '.join(part.__name__ for part in names)}.{suggest(name, known)}")
    return {part: {name: facts[name] for name in fields if name in facts} for part, fields in names.items()}


def plain_block(
    d_model: int, heads: int, norm: NormSpec | None, facts: Mapping[type[BaseModel], Mapping[str, Any]]
) -> BlockSpec:
    """Return a pre-norm block whose heads share ``d_model`` and whose GELU MLP is four times as wide."""
    expect(norm, (NormSpec, type(None)), "norm as a NormSpec or None")
    given = facts[AttentionSpec].get("d_head")
    number(heads, "how many heads", 1, number(d_model, "d_model", 1, LARGEST) if given is None else LARGEST)
    d_head = given or d_model // heads
    attn = {"n_heads": heads, "n_kv_heads": heads, "d_head": d_head, "scale": d_head**-0.5, **facts[AttentionSpec]}
    mlp = {"d_mlp": 4 * d_model, "act": "gelu", **facts[MlpSpec]}
    block: dict[str, Any] = {"attn": attn, "mlp": mlp, "ln1": norm, "ln2": norm, **facts[BlockSpec]}
    if (block["mlp"] is None or block.get("kind") == "parallel") and "ln2" not in facts[BlockSpec]:
        block["ln2"] = None
    return BlockSpec(**block)
