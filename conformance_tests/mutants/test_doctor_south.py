"""More mistakes planted in third-party adapters: tokens, rotary positions, projections, norms, scales, pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from einops import rearrange
from prisma_conformance import randomise
from prisma_conformance.doctor.diagnosis import examine
from prisma_conformance.doctor.facts import facts
from prisma_conformance.doctor.numbers import Number
from prisma_conformance.subject import Subject
from torch import Tensor

from conformance_tests.helpers import cascade
from prisma_core import ModelSpec, TokenLayout
from prisma_core.plugin import NormSpec, PoolSpec, Reader, RopeSpec

from .mistakes import Planted, assert_named, edited
from .south import AT, CASE, HOOKS, PREFIX, WEIGHTS, SouthAdapter, SouthViT, kernel, norm, table


def subject_of(mistake: Planted) -> Subject:
    tables = (edited(WEIGHTS, mistake.weights), edited(HOOKS, mistake.hooks))
    return Subject(CASE, SouthAdapter(*tables, mistake.fact, mistake.functions), SouthViT(), seed=1)


def _layout(**changed: int) -> Callable[[Reader], TokenLayout]:
    return lambda upstream: TokenLayout(
        **{"cls": 1, "registers": 2, "rows": upstream.rows, "columns": upstream.columns, **changed}
    )


def _slower(turn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Angles as of another base: the first pair of an axis turns as fast, the second half as fast."""
    return lambda x: table(turn)(x * torch.tensor([1.0, 0.5, 1.0, 0.5]).to(x))


def _by_columns(turn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: table(turn)(x.roll(2, 1))


def _one_head(x: Tensor) -> Tensor:
    """The rows of a middle head with three channels in a cycle."""
    first, middle, last = x.chunk(3)
    return torch.cat([first, middle[[1, 2, 0, 3, 4, 5, 6, 7]], last])


def _each_head(x: Tensor) -> Tensor:
    """The columns of each head in a cycle that is one channel longer."""
    return torch.stack([head.roll(n, 1) for n, head in enumerate(x.chunk(3, 1), 1)], 1).flatten(1)


def _eps(reader: Reader, eps: float = 1e-5) -> NormSpec:
    return norm(reader).model_copy(update={"eps": eps})


QKV = f"[{AT}.attention.q.{{*}}, {AT}.attention.k.{{*}}, {AT}.attention.v.{{*}}]"
PLANTED = [
    Planted("a register too few", ("layout.registers=2 (it is 1)",), fact={"layout": _layout(registers=1)}),
    Planted("a register too many", ("layout.registers=2 (it is 3)",), fact={"layout": _layout(registers=3)}),
    Planted(
        "no class token", ("layout.registers=3 (it is 2) or layout.cls=1 (it is 0)",), fact={"layout": _layout(cls=0)}
    ),
    Planted(
        "the token alone for the prefix",
        ("layout.registers=2 (it is 0)",),
        fact={"layout": _layout(registers=0)},
        weights={"[token, registers]  ": "token"},
    ),
    Planted("rope by halves", ("rope.layout='interleaved'",), fact={"rope": lambda upstream: RopeSpec(layout="half")}),
    Planted(
        "another base of rope",
        ("rope_cos and rope_sin: angles of each pair times [1, 2, 1, 2]", "another base"),
        functions={"cos": _slower(torch.cos), "sin": _slower(torch.sin)},
    ),
    Planted(
        "rope by columns first",
        ("pairs of channels in the order [2, 3, 0, 1]",),
        functions={"cos": _by_columns(torch.cos), "sin": _by_columns(torch.sin)},
    ),
    Planted(
        "rope turned backwards", ("rope_sin with its sign changed",), functions={"sin": lambda x: -table(torch.sin)(x)}
    ),
    Planted(
        "the output projection transposed",
        ("attn.out.weight transposed",),
        functions={"t": lambda x: x.T if x.ndim == 2 else x},
        weights={"blocks.{l}.attn.out.{*}": "blocks.{l}.attn.out.{*} : {t}"},
    ),
    Planted(
        "an MLP's square weight transposed",
        ("mlp.fc_in.weight transposed",),
        functions={"t": lambda x: x.T if x.ndim == 2 else x},
        weights={"blocks.{l}.mlp.fc_in.{*}": "blocks.{l}.mlp.fc_in.{*} : {t}"},
    ),
    Planted(
        "keys and values exchanged",
        (f"'{QKV} -> blocks",),
        weights={QKV: f"[{AT}.attention.q.{{*}}, {AT}.attention.v.{{*}}, {AT}.attention.k.{{*}}]"},
    ),
    Planted(
        "queries last",
        ("blocks.{l}.attn.qkv",),
        weights={QKV: f"[{AT}.attention.k.{{*}}, {AT}.attention.v.{{*}}, {AT}.attention.q.{{*}}]"},
    ),
    Planted(
        "norms of a block exchanged",
        ("blocks.{l}.ln1", "blocks.{l}.ln2"),
        weights={f"{AT}.before_attention": f"{AT}.before_mlp", f"{AT}.before_mlp": f"{AT}.before_attention"},
    ),
    Planted("no scale of scores", ("attn.scale=0.353553 (it is 1)",), fact={"scale": lambda layer: 1.0}),
    Planted(
        "eps of 1e-5 in the last norm",
        ("ln_final.eps=", "upstream's norm.eps"),
        fact={"ln_final": lambda upstream: _eps(upstream.norm)},
    ),
    Planted("gelu by tanh", ("mlp.act='gelu'",), fact={"act": lambda layer: "gelu_tanh"}),
    Planted(
        "layer scale of attention dropped",
        ("attn_scale=True",),
        fact={"attn_scale": lambda layer: False},
        weights={
            f"{AT}.scale1.gamma                 ->  blocks.{{l}}.ls1.gamma": f"ignore {AT}.scale1.gamma : of training"
        },
    ),
    Planted(
        "the mean of all tokens",
        ("pool.with_prefix=False",),
        fact={"pool": lambda upstream: PoolSpec(kind="avg", with_prefix=True)},
    ),
    Planted(
        "the class token for the mean", ("pool.kind='avg'",), fact={"pool": lambda upstream: PoolSpec(kind="token")}
    ),
    Planted(
        "positions without rows for the prefix",
        ("the row '[zeros, positions : 1 b c -> b c] -> embed.pos_embed'", "and the logits"),
        weights={"[zeros, positions : 1 n d -> n d]": "positions"},
    ),
    Planted(
        "positions before those of the prefix",
        ("embed.pos_embed: those of the prefix behind those of the patches",),
        weights={"[zeros, positions : 1 n d -> n d]": "[positions : 1 n d -> n d, zeros]"},
    ),
    Planted(
        "patches column by column",
        ("column by column",),
        functions={"p": lambda x: torch.cat([x.new_zeros(PREFIX, 24), rearrange(x[0], "(r c) d -> (c r) d", r=3)])},
        weights={"[zeros, positions : 1 n d -> n d] ->  embed.pos_embed": "positions -> embed.pos_embed : {p}"},
    ),
    Planted(
        "rows and columns of a patch exchanged",
        ("patch kernels transposed",),
        functions={"kernel": lambda w, std: kernel(w, std).transpose(2, 3)},
    ),
    Planted(
        "channels of pixels first",
        ("Rows whose tensors act here first: '[stem.weight, std] -> embed.proj.weight : {kernel}'",),
        functions={"kernel": lambda w, std: rearrange(w, "d (c p q) -> d c p q", p=4, c=3) / std[:, None, None]},
    ),
    Planted(
        "blue for red",
        ("channels in the other order (bgr)",),
        functions={"kernel": lambda w, std: kernel(w, std).flip(1)},
    ),
    Planted(
        "pixels as they come",
        ("mean", "std"),
        functions={"plain": lambda w: rearrange(w, "d (p q c) -> d c p q", p=4, c=3)},
        weights={
            "[stem.weight, std]  ": "stem.weight",
            "{kernel}": "{plain}",
            "[stem.weight, stem.bias, mean, std]": "stem.bias",
            ": {offset}": "\n ignore mean : of the images\n ignore std : of the images",
        },
    ),
    Planted(
        "pixels without their mean",
        ("mean",),
        weights={"[stem.weight, stem.bias, mean, std]": "stem.bias", ": {offset}": "\n ignore mean : of the images"},
    ),
    Planted(
        "twice as many heads",
        ("at 'layers.0.attention' is not supported: heads=3",),
        fact={"heads": lambda layer: 6, "scale": lambda layer: 0.5, "rope": lambda upstream: None},
    ),
    Planted("one head", ("at 'layers.0.attention' is not supported: heads=3",), fact={"heads": lambda layer: 1}),
    Planted(
        "no rope",
        ("rotation.angles",),
        fact={"rope": lambda upstream: None},
        weights={
            "rotation.angles                   ->  rope_cos                   : {cos}": "",
            "rotation.angles                   ->  rope_sin                   : {sin}": "ignore rotation.angles : no",
        },
    ),
    Planted(
        "branches side by side",
        ("blocks.{l}.kind='pre', and blocks.{l}.ln2=NormSpec(kind='ln'", "'layers.{l}.before_mlp."),
        fact={"kind": lambda layer: "parallel", "ln2": lambda layer: norm(layer.before_mlp) and None},
        weights={
            f"{AT}.before_mlp.{{*}}               ->  blocks.{{l}}.ln2.{{*}}": f"ignore {AT}.before_mlp.* : not used"
        },
    ),
    Planted(
        "rows of one tensor in another order",
        ("blocks.{l}.attn.qkv.bias: another order of rows, (three d h), not (three h d)", "and the logits"),
        functions={"turned": lambda *qkv: torch.cat([rearrange(x, "(h d) -> (d h)", h=3) for x in qkv])},
        weights={
            f"{QKV} -> blocks.{{l}}.attn.qkv.{{*}}": f"{QKV.replace('{*}', 'weight')} -> blocks.{{l}}.attn.qkv.weight\n"
            f"{QKV.replace('{*}', 'bias')} -> blocks.{{l}}.attn.qkv.bias : {{turned}}"
        },
    ),
    Planted(
        "heads of the output interleaved",
        ("blocks.{l}.attn.out.weight: columns in the order (h d), not (d h)", "and the logits"),
        functions={"turned": lambda x: rearrange(x, "o (d h) -> o (h d)", h=3) if x.ndim == 2 else x},
        weights={"blocks.{l}.attn.out.{*}": "blocks.{l}.attn.out.{*} : {turned}"},
    ),
    Planted(
        "classes in another order",
        ("Upstream's is ours in another order of class: [6, 5, 4, 3, 2, 1, 0].", "'head.{*} -> head.{*} : {turned}'"),
        functions={"turned": lambda x: x.flip(0)},
        weights={"head.{*}                          ->  head.{*}": "head.{*} -> head.{*} : {turned}"},
    ),
    Planted(
        "weights of a norm without the 1 that upstream adds",
        ("blocks.{l}.ln1.weight: 1 more than what its row makes", "and the logits"),
        functions={"less": lambda x: x - 1},
        weights={
            f"{AT}.before_attention.{{*}}         ->  blocks.{{l}}.ln1.{{*}}": f"{AT}.before_attention.weight -> "
            f"blocks.{{l}}.ln1.weight : {{less}}\n{AT}.before_attention.bias -> blocks.{{l}}.ln1.bias"
        },
    ),
    Planted(
        "channels of one head of queries in another order",
        (
            "They differ at head [1] alone, of 3.",
            "Upstream's is ours in another order of d_head at head 1: [2, 0, 1, 3, 4, 5, 6, 7].",
        ),
        functions={"turned": lambda q, k, v: torch.cat([_one_head(q), k, v])},
        weights={f"{QKV} -> blocks.{{l}}.attn.qkv.{{*}}": f"{QKV} -> blocks.{{l}}.attn.qkv.{{*}} : {{turned}}"},
    ),
    Planted(
        "channels of each head of the output in another order",
        (
            "Upstream's output projection reads z in another order of d_head at head 0: [7, 0, 1, 2, 3, 4, 5, 6]; "
            "1: [6, 7, 0, 1, 2, 3, 4, 5]; 2: [5, 6, 7, 0, 1, 2, 3, 4].",
        ),
        functions={"turned": lambda x: _each_head(x) if x.ndim == 2 else x},
        weights={"blocks.{l}.attn.out.{*}": "blocks.{l}.attn.out.{*} : {turned}"},
    ),
    Planted(
        "positions of patches one place on",
        ("embed.pos_embed: one place back",),
        functions={"p": lambda x: torch.cat([x.new_zeros(PREFIX, 24), x[0].roll(1, 0)])},
        weights={"[zeros, positions : 1 n d -> n d] ->  embed.pos_embed": "positions -> embed.pos_embed : {p}"},
    ),
    Planted(
        "the first norm of a block forgotten",
        (
            "blocks.0.ln1.bias (no rule)",
            f"the row '{AT}.before_attention.{{*}} -> blocks.{{l}}.ln1.{{*}}'",
            "and the logits",
        ),
        weights={f"{AT}.before_attention.{{*}}         ->  blocks.{{l}}.ln1.{{*}}": ""},
    ),
    Planted(
        "the last norm left out",
        (
            "ln_final=NormSpec(kind='ln', eps=...) (it is None): upstream's norm.eps",
            "the row 'norm.{*} -> ln_final.{*}'",
        ),
        fact={"ln_final": lambda upstream: None},
        weights={"norm.{*}                          ->  ln_final.{*}": "ignore norm.* : of training"},
    ),
    Planted(
        "a last norm whose class nobody asked for",
        ("at 'norm' is not supported: a class that the adapter has not recognised", "ln_final.eps="),
        fact={"ln_final": lambda upstream: _eps(upstream.layers[0].before_mlp)},
    ),
    Planted(
        "one head of keys",
        ("n_kv_heads=3 (it is 1)", "and the logits"),
        fact={"kv_heads": lambda layer: 1},
    ),
    Planted(
        "rows of queries and keys exchanged",
        ("blocks.{l}.attn.hook_q",),
        hooks={"attention.q    ": "attention.k    ", "attention.k    ": "attention.q    "},
    ),
    Planted(
        "the stream's row behind the norm",
        ("'layers.0 -> blocks.0.hook_resid_post'",),
        hooks={f"{AT}                            ->": f"{AT}.before_mlp : in                       ->"},
    ),
]


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name.replace(" ", "-"))
def test_the_doctor_names_the_mistake_and_the_place(planted: Planted) -> None:
    assert_named(planted, subject_of(planted))


def test_an_output_behind_the_softmax_is_named() -> None:
    case = replace(CASE, forward=lambda model, image: model(image).softmax(-1))
    answer = str(examine(Subject(case, SouthAdapter(), SouthViT(), seed=1)))
    assert "Upstream's is the softmax of ours." in answer


def test_the_doctor_finds_nothing_wrong_with_what_is_right() -> None:
    answer = examine(subject_of(Planted("nothing", ())))
    assert answer.healthy, str(answer)


def test_layers_whose_rows_do_not_fit_are_not_too_many() -> None:
    cut = Planted("", (), functions={"cut": lambda x: x[1:]}, weights={"mlp.fc_in.{*}": "mlp.fc_in.{*} : {cut}"})
    answer = str(examine(subject_of(cut)))
    assert "blocks.0.mlp.fc_in.weight: expected shape" in answer
    assert "too few blocks" not in answer


def test_a_scale_may_be_a_power_of_what_upstream_holds() -> None:
    spec = ModelSpec.plain()
    says = [change.says for change in facts(spec, "blocks.0.attn.hook_z", [Number("t", {-1: 4.0}, read=False)])]
    for value, power in (("4", ""), ("0.25", "**-1"), ("0.5", "**-0.5")):
        assert (
            f"blocks.{{l}}.attn.scale={value} (it is 0.408248): upstream's t{power}, which the adapter does not read"
            in says
        )
    assert len(says) == len(set(says))


def test_one_eps_for_all_norms_that_is_another_is_named_once() -> None:
    upstream = randomise(SouthViT(), torch.Generator().manual_seed(1))
    norms = [module for module in upstream.modules() if isinstance(module, torch.nn.LayerNorm)]
    for module in norms:
        module.eps = 1e-6
    fact = {
        "ln1": lambda layer: _eps(layer.before_attention),
        "ln2": lambda layer: _eps(layer.before_mlp),
        "ln_final": lambda upstream: _eps(upstream.norm),
    }
    answer = examine(Subject(CASE, SouthAdapter(fact=fact), upstream, draw=False))
    assert f"and the logits, with: eps=1e-06 in all {len(norms)} norms that have 1e-05" in str(answer), str(answer)


def test_an_equation_that_cannot_be_evaluated_is_said_once_and_no_place_is_looked_for() -> None:
    rows = cascade.ROWS.replace("conv_stage.{l}.gamma * ", "down.weight * ")
    answer = examine(Subject(cascade.CASE, cascade.CascadeAdapter(rows), cascade.Cascade(), seed=1))
    assert answer.tried == 0
    (said,) = answer.equations
    assert "stages.0.blocks.0.hook_mlp_out = down.weight * conv_stage.0.fc2(mlp.post) cannot be eval" in said
    assert "it reads down.weight [12, 10, 2, 2], mlp.post [2, 12, 12, 30]" in said
    assert said.endswith("(and 1 more like it)")


def test_a_row_of_a_hook_map_out_of_order_is_the_authors_to_move() -> None:
    lines = cascade.ROWS.splitlines()
    q, reduced = (next(n for n, line in enumerate(lines) if f"hook_{name} " in line) for name in ("q", "reduced"))
    lines[q], lines[reduced] = lines[reduced], lines[q]
    answer = examine(Subject(cascade.CASE, cascade.CascadeAdapter("\n".join(lines)), cascade.Cascade(), seed=1))
    assert "its row belongs before that one's. To do: a row's place is one that not everything" in str(answer)
    assert "please report it" not in str(answer)
