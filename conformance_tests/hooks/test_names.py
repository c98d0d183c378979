"""The grammar of hook names."""

from __future__ import annotations

import operator
from typing import Any

import pytest
from torch import nn

from prisma_core import UnknownName
from prisma_core.hooks.point import HookPoint
from prisma_core.hooks.query import layer_of, resolve, resolve_one, short_name

NAMES = [
    "hook_embed",
    *(
        f"blocks.{layer}.{point}"
        for layer in range(12)
        for point in (
            "hook_resid_pre",
            "hook_q_input",
            "ln1.hook_scale",
            "attn.hook_q",
            "attn.hook_z",
            "attn.hook_result",
            "hook_attn_out",
            "ln2.hook_scale",
            "hook_resid_post",
        )
    ),
    "ln_final.hook_scale",
    "hook_logits",
]
DERIVED = frozenset(name for name in NAMES if name.endswith(("hook_result", "hook_q_input")))
DUAL = [
    f"{tower}.{name}"
    for tower, depth in (("vision", 12), ("text", 6))
    for name in NAMES
    if (layer_of(name) or 0) < depth
]


def found(query, names=NAMES):
    return resolve(query, names, DERIVED)


def layers(pattern, n=12):
    return [pattern.format(layer) for layer in range(n)]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("hook_embed", ["hook_embed"]),
        ("embed", ["hook_embed"]),
        ("blocks.11.attn.hook_z", ["blocks.11.attn.hook_z"]),
        ("z", layers("blocks.{}.attn.hook_z")),
        ("hook_z", layers("blocks.{}.attn.hook_z")),
        ("attn.z", layers("blocks.{}.attn.hook_z")),
        ("attn.hook_z", layers("blocks.{}.attn.hook_z")),
        ("ln2.scale", layers("blocks.{}.ln2.hook_scale")),
        ("ln_final.scale", ["ln_final.hook_scale"]),
        ("blocks.1?.hook_resid_post", ["blocks.10.hook_resid_post", "blocks.11.hook_resid_post"]),
        ("blocks.[02].*_z", ["blocks.0.attn.hook_z", "blocks.2.attn.hook_z"]),
        (("z", 3), ["blocks.3.attn.hook_z"]),
        (("resid_post", -1), ["blocks.11.hook_resid_post"]),
        (("ln1.scale", -12), ["blocks.0.ln1.hook_scale"]),
        (lambda name: name.endswith("logits"), ["hook_logits"]),
        (["logits", ("z", 0), "embed"], ["hook_embed", "blocks.0.attn.hook_z", "hook_logits"]),
        (("embed", "logits"), ["hook_embed", "hook_logits"]),
        ({"embed"}, ["hook_embed"]),
        ([lambda name: "embed" in name, "logits"], ["hook_embed", "hook_logits"]),
        ((name for name in ("embed", "embed")), ["hook_embed"]),
        ([], []),
        ("result", layers("blocks.{}.attn.hook_result")),
        (("q_input", 2), ["blocks.2.hook_q_input"]),
        ("blocks.0.attn.hook_result", ["blocks.0.attn.hook_result"]),
        ("*.hook_result", layers("blocks.{}.attn.hook_result")),
        (None, [name for name in NAMES if name not in DERIVED]),
        ("*", [name for name in NAMES if name not in DERIVED]),
        ("blocks.0.attn.*", ["blocks.0.attn.hook_q", "blocks.0.attn.hook_z"]),
        (lambda name: name.startswith("blocks.0.attn"), ["blocks.0.attn.hook_q", "blocks.0.attn.hook_z"]),
    ],
)
def test_what_a_query_selects(query, expected):
    assert found(query) == expected


def test_an_integer_may_come_from_numpy():
    np = pytest.importorskip("numpy")
    assert found(("z", np.int64(3))) == ["blocks.3.attn.hook_z"]
    assert operator.index(np.int64(3)) == 3


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("resid_pots", "Did you mean resid_post"),
        ("blocks.12.attn.hook_z", "Did you mean blocks"),
        ("blocks.*.hook_nothing", "No hook point matches"),
        ("atn.z", "No hook point matches"),
        ("*RESID*", "No hook point matches"),
        (("z", 12), r"No hook point 'z' in layer 12. Layers run from 0 to 11 \(or -1 for the last\)"),
        (("z", -13), "Layers run from 0 to 11"),
        (("zz", 0), r"No hook point matches \('zz', 0\)"),
        (("embed", 0), "hook_embed is in no layer: ask for 'embed' alone"),
        (("ln_final.scale", 0), r"ln_final\.hook_scale is in no layer: ask for 'ln_final\.scale' alone"),
        (["embed", "nothing"], "No hook point matches 'nothing'"),
        (lambda name: False, r"selects none of this model's 111 hook points\.$"),
        (lambda name: name.endswith("result"), "Derived points are asked for by name, and by no predicate"),
        ("", "No hook point matches"),
        (3, "3 is no name, glob"),
        (["embed", 3], "3 is no name, glob"),
        (HookPoint("batch pos", "x"), r"HookPoint\('batch pos'\) is no name"),
        ([HookPoint("batch pos", "x")], r"HookPoint\('batch pos'\) is no name"),
        (str.upper, "is no name, glob"),
        (nn.Linear(2, 3), r"Linear\(in_features=2.* is no name"),
        (nn.ModuleList([nn.ReLU()]), r"ReLU\(\) is no name"),
    ],
)
def test_what_selects_nothing_is_an_error(query, words):
    with pytest.raises(UnknownName, match=words):
        found(query)


def test_a_list_that_holds_itself_is_no_name():
    inner: list[Any] = []
    outer = [inner]
    inner.append(outer)
    for query in (inner, outer, ["embed", inner]):
        with pytest.raises(UnknownName, match=r"\[\.\.\.\].* is no name"):
            found(query)


def test_an_error_lists_the_shorthands():
    with pytest.raises(
        UnknownName, match=r"111 hook points; shorthands: attn_out, embed, logits, q, q_input, resid_post"
    ):
        found("xyz")


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("vision.embed", ["vision.hook_embed"]),
        ("embed", ["vision.hook_embed", "text.hook_embed"]),
        ("text.blocks.3.attn.hook_z", ["text.blocks.3.attn.hook_z"]),
        ("text.attn.z", layers("text.blocks.{}.attn.hook_z", 6)),
        (("text.z", 3), ["text.blocks.3.attn.hook_z"]),
        (("text.resid_post", -1), ["text.blocks.5.hook_resid_post"]),
        (("vision.resid_post", -1), ["vision.blocks.11.hook_resid_post"]),
        (("resid_post", -1), ["vision.blocks.11.hook_resid_post", "text.blocks.5.hook_resid_post"]),
        ("text.*_z", layers("text.blocks.{}.attn.hook_z", 6)),
    ],
)
def test_two_towers(query, expected):
    assert resolve(query, DUAL) == expected


def test_a_layer_one_tower_lacks():
    assert resolve(("z", 8), DUAL) == ["vision.blocks.8.attn.hook_z"]
    with pytest.raises(UnknownName, match="Layers run from 0 to 5"):
        resolve(("text.z", 8), DUAL)


def test_one():
    assert resolve_one("ln_final.scale", NAMES) == "ln_final.hook_scale"
    assert resolve_one(("z", -1), NAMES) == "blocks.11.attn.hook_z"
    with pytest.raises(UnknownName, match=r"'z' selects 12 hook points .* Name a layer, as in \('z', 0\)"):
        resolve_one("z", NAMES)
    with pytest.raises(
        UnknownName, match=r"selects 2 hook points \(vision.blocks.11.* Name a tower, as in \('vision.resid_post', -1\)"
    ):
        resolve_one(("resid_post", -1), DUAL)


def test_parts_of_names():
    assert layer_of("blocks.11.ln1.hook_scale") == 11
    assert layer_of("vision.blocks.3.hook_mlp_out") == 3
    assert layer_of("hook_embed") is None
    assert layer_of("superblocks.3.hook_z") is None
    assert short_name("vision.blocks.3.ln1.hook_scale") == "scale"
