"""Mistakes planted in a third-party adapter: the doctor names the fact, the row or the tensor, and the place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from prisma_conformance import randomise
from prisma_conformance.doctor.diagnosis import examine
from prisma_conformance.subject import Subject
from torch import Tensor

from prisma_core.host import installed
from prisma_core.plugin import NormSpec, PoolSpec, Reader

from .maps import MAP_MUTANTS, SWIN, MapMutant
from .mistakes import Planted, assert_named, edited
from .north import CASE, HOOKS, WEIGHTS, NorthAdapter, NorthViT, apart, grid_positions, rms_norm
from .table import MUTANTS


def subject_of(mistake: Planted) -> Subject:
    tables = (edited(WEIGHTS, mistake.weights), edited(HOOKS, mistake.hooks))
    return Subject(CASE, NorthAdapter(*tables, mistake.fact, mistake.functions), NorthViT(), seed=1)


def _chunks(*order: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat([apart(2)(x).chunk(3)[index] for index in order])


def _transposed(grid: Tensor) -> Tensor:
    return grid_positions(grid.transpose(0, 1))


LAYER = "layers.{l}"
PLANTED = [
    Planted(
        "final eps constant",
        ("ln_final.eps=", "upstream's norm.eps, which the adapter does not read"),
        fact={"ln_final": lambda upstream: NormSpec(kind="rms", eps=1e-6)},
    ),
    Planted(
        "ln2 takes ln1's eps",
        ("blocks.{l}.ln2.eps=that of each layer", "and the logits", "upstream's layers.{l}.norm2.eps"),
        fact={"ln2": lambda layer: rms_norm(layer.norm1)},
    ),
    Planted(
        "q and k rows exchanged",
        ("queries and keys exchanged", "blocks.{l}.attn.qkv"),
        functions={"apart": _chunks(1, 0, 2)},
    ),
    Planted(
        "qkv not taken apart",
        ("blocks.{l}.attn.qkv: q, k and v of each head side by side",),
        weights={" : {apart}": ""},
    ),
    Planted(
        "gate and up exchanged",
        ("'layers.{l}.ffn.w12.{*} -> [blocks.{l}.mlp.fc_gate.{*}, blocks.{l}.mlp.fc_in.{*}]'", "and the logits"),
        weights={"fc_gate": "fc_in", "fc_in": "fc_gate"},
    ),
    Planted(
        "positions transposed",
        ("embed.pos_embed: column by column",),
        functions={"positions": _transposed},
    ),
    Planted(
        "registers before the class token",
        ("'[cls, registers] -> embed.prefix'", "and the logits"),
        weights={"[cls, registers]": "[registers, cls]"},
    ),
    Planted("gelu for silu", ("mlp.act='silu' (it is 'gelu')", "blocks.{l}"), fact={"act": lambda ffn: "gelu"}),
    Planted(
        "hook rows of queries and keys exchanged",
        ("layers.{l}.attn.k_norm -> blocks.{l}.attn.hook_q", "'layers.0.attn.q_norm -> blocks.0.attn.hook_q"),
        hooks={"attn.q_norm": "attn.k_norm", "attn.k_norm": "attn.q_norm"},
    ),
    Planted(
        "layer scale dropped",
        (
            "blocks.{l}.attn_scale=True (it is False)",
            "'layers.{l}.gamma1 -> blocks.{l}.ls1.gamma'",
            "blocks.{l}.mlp_scale=True (it is False)",
            "'layers.{l}.gamma2 -> blocks.{l}.ls2.gamma'",
        ),
        fact={"attn_scale": lambda layer: False, "mlp_scale": lambda layer: False},
        weights={
            f"{LAYER}.gamma1            ->  blocks.{{l}}.ls1.gamma": f"ignore {LAYER}.gamma1 : makes no number",
            f"{LAYER}.gamma2            ->  blocks.{{l}}.ls2.gamma": f"ignore {LAYER}.gamma2 : makes no number",
        },
    ),
    Planted(
        "layer scale of the MLP dropped",
        ("blocks.{l}.mlp_scale=True (it is False)", "'layers.{l}.gamma2 -> blocks.{l}.ls2.gamma'", "and the logits"),
        fact={"mlp_scale": lambda layer: False},
        weights={f"{LAYER}.gamma2            ->  blocks.{{l}}.ls2.gamma": f"ignore {LAYER}.gamma2 : makes no number"},
    ),
    Planted(
        "the usual scale of scores",
        ("blocks.{l}.attn.scale=0.3", "upstream's layers.{l}.attn.logit_scale, which the adapter does not read"),
        fact={"scale": lambda attn: (attn.qkv.in_features // attn.heads) ** -0.5},
    ),
    Planted(
        "the mean over all tokens",
        ("pool.with_prefix=False (it is True)", "and the logits"),
        fact={"pool": lambda upstream: PoolSpec(kind="token_and_avg", with_prefix=True)},
    ),
    Planted(
        "norms of queries and keys exchanged",
        ("'layers.{l}.attn.q_norm.{*} -> blocks.{l}.attn.q_norm.{*}'", "and the logits"),
        weights={"attn.q_norm.{*}   ->": "attn.k_norm.{*}   ->", "attn.k_norm.{*}   ->": "attn.q_norm.{*}   ->"},
    ),
    Planted(
        "layer norm for root mean square",
        ("blocks.0.ln1.bias (no rule)", "kind='rms' in all 5 norms that are 'ln'", "and the logits"),
        fact={
            "ln1": lambda layer: NormSpec(eps=layer.norm1.eps),
            "ln2": lambda layer: NormSpec(eps=layer.norm2.eps),
            "ln_final": lambda upstream: NormSpec(eps=upstream.norm.eps),
        },
    ),
]


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name.replace(" ", "-"))
def test_the_doctor_names_the_mistake_and_the_place(planted: Planted) -> None:
    assert_named(planted, subject_of(planted))


def test_the_doctor_says_what_to_do_about_the_audit() -> None:
    attribute = Planted("k_norm's eps is not read", (), fact={"qk_norm": lambda attn: rms_norm(attn.q_norm)})
    answer = examine(subject_of(attribute))
    assert answer.agrees
    assert not answer.healthy
    assert "RMSNorm.eps = 0.00" in str(answer)
    assert "at 'layers.0.attn.k_norm' is neither read nor ignored" in str(answer)
    assert "To do: read it in spec() and refuse other values, reader.expect(NAME=VALUE)" in str(answer)


def test_the_doctor_names_the_row_behind_a_round_trip_that_fails() -> None:
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == "a tensor that export forgets")
    answer = examine(mutant.subject())
    assert answer.agrees
    assert "weights.roundtrip fails: export lacks norm.bias. Rows: 'norm.bias | zeros -> ln_final.bias'." in str(answer)
    assert "To do: rows run backwards too" in str(answer)


def _maps() -> list[MapMutant]:
    return [mutant for mutant in MAP_MUTANTS if mutant.places]


# Where several places hold the same tensor, the first of them in upstream's order, modules before functions.
SAME = {
    "another stage's downsampling": "stages.2.downsample.1",
    "the embedding behind its positions": "patch_embed.proj",
    "a norm's input for the stream": "layers.1.downsample",
}


@pytest.mark.parametrize("mutant", _maps(), ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_the_doctor_finds_the_place_of_a_row_of_a_hook_map(mutant: MapMutant) -> None:
    subject = mutant.subject()
    answer = examine(subject)
    assert answer.equations
    adapter = installed().adapter(subject.base)
    right = {row.hook: row.place for row in adapter.hooks(Reader(subject.base), subject.spec).rows}
    for hook, _ in mutant.places:
        place = SAME.get(mutant.name, right[hook])
        assert f"'{place} -> {hook}" in answer.places[0].partition(" (instead of")[0], str(answer)


def test_the_doctor_speaks_about_rows_that_nothing_proves() -> None:
    (mutant,) = (mutant for mutant in MAP_MUTANTS if mutant.equations)
    answer = examine(mutant.subject())
    assert answer.agrees
    assert not answer.healthy
    assert "maps.proven fails: 1 hook points could hold anything" in str(answer)


@pytest.mark.parametrize("place", ["layers.0.blocks.0.norm_1", "layers.0.blocks.0 @ add#7"])
def test_the_doctor_names_places_near_one_that_upstream_never_passes(place: str) -> None:
    hook = "stages.0.blocks.0.ln1.hook_normalized"
    answer = str(examine(MapMutant("", SWIN, "", ((hook, place),)).subject()))
    assert f"The row '{place} -> {hook} : batch row column d_model' names a place that upstream never passes." in answer
    assert "Did you mean layers.0.blocks.0" in answer


def test_the_doctor_finds_nothing_wrong_with_what_is_right() -> None:
    answer = examine(subject_of(Planted("nothing", ())))
    assert answer.healthy, str(answer)


def test_the_doctor_says_where_one_field_would_have_to_hold_two_values() -> None:
    upstream = randomise(NorthViT(), torch.Generator().manual_seed(1))
    for layer in upstream.layers:
        layer.attn.k_norm.eps = 0.05
    adapter = NorthAdapter(fact={"qk_norm": lambda attn: rms_norm(attn.q_norm)})
    answer = examine(Subject(CASE, adapter, upstream, draw=False))
    assert answer.first == "blocks.0.attn.hook_k"
    assert not answer.remedies
    assert "attn.qk_norm.eps=0.05" in str(answer)
    assert "upstream's layers.{l}.attn.k_norm.eps, which the adapter does not read" in str(answer)
    assert "it agrees, and blocks.0.attn.hook_q does not: one field stands for both." in str(answer)
