"""One rule for every file of facts: a number is a number, a flag is a flag, and each is said once and known.

Files that hold a digest of their facts refuse any change; those that hold none have to tell a text from a number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from coders import D_IN, D_SAE, standard
from prisma_sae import CoderFacts, SparseCoder, read, save
from written import SUBJECTS, Edit, Written, nodes

import prisma_core as prisma
from prisma_core import LoadError, PrismaError
from prisma_core.plugin import AttentionSpec, NormSpec, parse_json

# What no field of Prisma's reads: other libraries' own, or whatever a file says.
FREE = {
    "a sparse coder": r"facts\.more\..*",
    "an older sparse coder": r"facts\.(more|figures).*",
    "a tuned lens": r"unembed_hash|sha256|",
    "a circuit": r"|cfg|nodes.*|edges\.(?!.*\.(score|in_graph)$).*",
    "a result": r"facts.*",
}


def others(value: Any) -> list[Any]:
    """Return values of other types that Python, or a lenient reader, takes for the same."""
    if isinstance(value, bool):
        return [int(value), float(value), str(value).lower(), "yes"]
    if isinstance(value, int):
        return [str(value), value + 0.5] if value == 1 else [str(value), float(value), value + 0.5]
    if isinstance(value, float):
        return [str(value), True]
    if isinstance(value, str):
        return [5, True, [value]]
    return [{**value, "planted": 1}] if isinstance(value, dict) else []


def confusions(facts: Any) -> Iterator[Edit]:
    seen: set[tuple[Any, ...]] = set()
    for at in nodes(facts):
        value = facts
        for key in at:
            value = value[key]
        kind = (tuple(key for key in at if not isinstance(key, int)), type(value))
        if kind not in seen:  # of many alike, one
            yield from (Edit(at, repr(other)[:30], other) for other in others(value))
        seen.add(kind)


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.filterwarnings("ignore")
def test_a_value_of_another_type_is_refused(name: str, tmp_path: Path) -> None:
    written = Written(SUBJECTS[name], tmp_path)
    tried = 0
    for edit in confusions(written.facts):
        if not re.fullmatch(FREE.get(name, "(?!)"), ".".join(map(str, edit.at))):
            outcome = written.judge(edit)
            assert outcome.kind == "refused", f"{edit}: {outcome}"
            tried += 1
    assert tried >= 5


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.filterwarnings("ignore")
def test_a_field_that_is_said_twice_is_refused(name: str, tmp_path: Path) -> None:
    written = Written(SUBJECTS[name], tmp_path)
    first = next(iter(written.facts))
    twice = f"{{{json.dumps(first)}: null, {json.dumps(written.facts)[1:]}"
    assert json.loads(twice) == written.facts  # Python's own reader says nothing
    if written.binary:
        from safetensors.torch import save_file

        save_file(written.tensors, written.path, {written.key: twice})
    else:
        written.path.write_text(twice, encoding="utf-8")
    told = "changed since" if name == "an image processor" else f"it says '{first}' twice"  # by its folder's digest
    with pytest.raises(PrismaError, match=told):
        written.subject.read(tmp_path)


def test_a_field_is_said_once_at_any_depth() -> None:
    assert parse_json('{"a": {"b": 1}, "c": {"b": 1}}', "here") == {"a": {"b": 1}, "c": {"b": 1}}
    for text in ('{"a": {"b": 1, "b": 1}}', '{"a": [1, {"b": 1, "c": 2, "b": 3}]}'):
        with pytest.raises(LoadError, match="here is no readable JSON: it says 'b' twice"):
            parse_json(text, "here")


@pytest.mark.parametrize("eps", [0, -1e-6, 1, 1e9, float("nan"), float("inf")])
def test_an_eps_is_small_and_above_zero(eps: float) -> None:
    with pytest.raises(PrismaError, match="eps"):
        NormSpec(eps=eps)


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf")])
def test_scores_are_scaled_by_a_number_above_zero(scale: float) -> None:
    with pytest.raises(PrismaError, match="scale"):
        AttentionSpec(n_heads=2, n_kv_heads=2, d_head=4, scale=scale)


@pytest.mark.parametrize(("change", "told"), [({"schema": 2}, "schema 2"), ({"norm": "l2"}, "a field 'norm'")])
def test_a_coder_of_a_newer_prisma_is_refused(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    save(SparseCoder(CoderFacts(kind="standard", d_in=D_IN, d_sae=D_SAE, d_out=D_IN), standard()), tmp_path)
    path = tmp_path / "prisma.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(LoadError, match=f"has {told}, which this Prisma does not know: update Prisma"):
        read(tmp_path)


def test_a_model_of_a_newer_prisma_is_refused(tmp_path: Path) -> None:
    written = Written(SUBJECTS["an older model"], tmp_path)
    written.put({**written.facts, "gates": [1]})
    with pytest.raises(LoadError, match="gates: Extra inputs are not permitted"):
        prisma.load(f"file:{tmp_path}")
