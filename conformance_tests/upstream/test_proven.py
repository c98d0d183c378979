"""Proof of hook maps: formulas in rows, points that no equation proves, and what an adapter may leave out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from prisma_conformance import CHECKS, Case
from prisma_conformance.checks.formulas import Formula, Scope
from prisma_conformance.checks.grammar import Prose, parse
from prisma_conformance.report.results import CheckResult
from prisma_conformance.run import run_check
from prisma_conformance.subject import Subject
from torch import Tensor, nn

from prisma_core.contract.adapter import MapAdapter
from prisma_core.maps.places import HookMap
from prisma_core.maps.reader import Reader
from prisma_core.spec import MapSpec

pytestmark = pytest.mark.usefixtures("in_float64")

D, HEADS = 6, 2


class Attention(nn.Module):
    """Heads are mixed after the softmax ("talking heads")."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))
        self.mix = nn.Linear(HEADS, HEADS, bias=False)
        self.scale = 0.7

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        pattern = (self.scale * q @ k.transpose(-2, -1)).softmax(-1)
        pattern = self.mix(pattern.movedim(1, -1)).movedim(-1, 1)
        return self.out((pattern @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(D), nn.LayerNorm(D), Attention()
        self.fc1, self.act, self.fc2 = nn.Conv1d(D, 9, 1), nn.GELU(), nn.Conv1d(9, D, 1)
        self.gamma = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x).mT))).mT * self.gamma


class Upstream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.pos = nn.Linear(3, D), nn.Parameter(torch.zeros(1, 5, D))
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x) + self.pos))[:, 0])


STREAM, HEADWISE, FOLDED = (
    "batch pos d_model",
    "batch head pos d -> batch pos head d",
    "batch pos (head d) -> batch pos head d",
)
SQUARE, MLP = "batch head query_pos key_pos", "batch d_mlp pos -> batch pos d_mlp"


def block_rows(at: str) -> str:
    return f"""
        {at} : in           ->  {at}.hook_resid_pre       : {STREAM}
        {at}.norm1          ->  {at}.ln1.hook_normalized  : {STREAM}  = {at}.norm1(resid_pre)
        {at}.attn.q         ->  {at}.attn.hook_q          : {FOLDED}  = {at}.attn.q(ln1.normalized)
        {at}.attn.k         ->  {at}.attn.hook_k          : {FOLDED}  = {at}.attn.k(ln1.normalized)
        {at}.attn.v         ->  {at}.attn.hook_v          : {FOLDED}  = {at}.attn.v(ln1.normalized)
        {at}.attn @ softmax : in  ->  {at}.attn.hook_attn_scores  : {SQUARE}  = {at}.attn.scale * q . k
        {at}.attn @ softmax ->  {at}.attn.hook_softmax    : {SQUARE}  = softmax(attn_scores)
        {at}.attn.mix       ->  {at}.attn.hook_pattern    : batch query_pos key_pos head -> batch head query_pos key_pos
        {at}.attn @ matmul#1 -> {at}.attn.hook_z          : {HEADWISE}
        {at}.attn           ->  {at}.hook_attn_out        : {STREAM}  = {at}.attn.out(attn.z)
        {at} @ add          ->  {at}.hook_resid_mid       : {STREAM}
        {at}.norm2          ->  {at}.ln2.hook_normalized  : {STREAM}  = {at}.norm2(resid_mid)
        {at}.fc1            ->  {at}.mlp.hook_pre         : {MLP}     = {at}.fc1(ln2.normalized)
        {at}.act            ->  {at}.mlp.hook_post        : {MLP}     = gelu(pre)
        {at}.fc2            ->  {at}.mlp.hook_out         : batch d_model pos -> batch pos d_model  = {at}.fc2(post)
        {at} @ mul          ->  {at}.hook_mlp_out         : {STREAM}  = mlp.out * {at}.gamma
        {at}                ->  {at}.hook_resid_post      : {STREAM}
    """


ROWS = f"""
    embed       ->  hook_embed       : {STREAM}  = embed(input)
    @ add       ->  hook_full_embed  : {STREAM}  = embed + pos
    {block_rows("blocks.0")}
    {block_rows("blocks.1")}
    norm        ->  hook_ln_final    : {STREAM}  = norm(blocks.1.resid_post)
    head : in   ->  hook_pooled      : batch d_model  = first(ln_final)
    head        ->  hook_logits      : batch class  = head(pooled)
"""
MIXED = {f"blocks.{n}.attn.hook_pattern = {text}": "heads are mixed after the softmax" for n in (0, 1)
         for text in ("softmax(attn_scores)", "rows that sum to 1")}  # fmt: skip


class Adapter(MapAdapter):
    types = (f"{__name__}.Upstream",)

    def __init__(self, rows: str = ROWS, exempt: Mapping[str, str] = MIXED):
        self.rows, self.exemptions = rows, dict(exempt)

    def spec(self, upstream: Reader) -> MapSpec:
        return MapSpec(shape=(5, 3), n_classes=4)

    def hooks(self, upstream: Reader, spec: MapSpec) -> HookMap:
        return HookMap.parse(self.rows, head=HEADS)

    def exempt(self, upstream: Reader) -> dict[str, str]:
        return self.exemptions

    def equations(self, upstream: Reader, acts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        for n, block in enumerate(upstream.blocks):
            at = f"blocks.{n}.attn"
            mixed = block.attn.mix.module(acts[f"{at}.hook_softmax"].movedim(1, -1)).movedim(-1, 1)
            yield f"{at}: pattern = mixed softmax", acts[f"{at}.hook_pattern"], mixed


def result(adapter: MapAdapter, check: str = "maps.proven") -> CheckResult:
    return run_check(CHECKS[check], Subject(Case("toy", Upstream), adapter, Upstream().eval()))


def changed(old: str, new: str) -> Adapter:
    assert ROWS.count(old) == 1, ROWS.count(old)
    return Adapter(ROWS.replace(old, new))


def test_a_map_whose_equations_hold_is_proven() -> None:
    found = result(Adapter())
    assert found.passed, str(found)
    assert found.detail.startswith("39 of 39 hook points proven by equations")
    assert result(Adapter(), "algebra").passed
    assert result(Adapter(), "hooks.live").passed


PLACES: dict[str, tuple[str, str, str]] = {
    "the neighbouring layer": (
        "blocks.1.norm1          ->",
        "blocks.0.norm1          ->",
        "blocks.1.ln1.hook_normalized = blocks.1.norm1(resid_pre): off by",
    ),
    "keys for queries": ("blocks.0.attn.q         ->", "blocks.0.attn.k         ->", "blocks.0.attn.hook_q ="),
    "values for z": ("blocks.0.attn @ matmul#1 ->", "blocks.0.attn @ matmul#1 : in1 ->", "blocks.0.hook_attn_out ="),
    "scores after the softmax": ("blocks.1.attn @ softmax : in", "blocks.1.attn @ softmax", "hook_attn_scores ="),
    "a norm's input": ("blocks.1.norm2          ->", "blocks.1.norm2 : in     ->", "blocks.1.ln2.hook_normalized ="),
    "the last norm's input": ("    norm        ->", "    norm : in   ->", "hook_ln_final = norm(blocks.1.resid_post)"),
    "an activation's input": ("blocks.0.act            ->", "blocks.0.act : in       ->", "blocks.0.mlp.hook_post ="),
    "an activation's output": ("blocks.0.fc1            ->", "blocks.0.act            ->", "blocks.0.mlp.hook_pre ="),
    "the MLP before its scale": ("blocks.0 @ mul          ->", "blocks.0 @ mul : in     ->", "hook_mlp_out ="),
}


@pytest.mark.parametrize(("old", "new", "says"), PLACES.values(), ids=PLACES)
def test_a_wrong_place_is_caught(old: str, new: str, says: str) -> None:
    found = result(changed(old, new))
    assert not found.passed
    assert says in found.detail


def test_a_place_that_not_everything_reads_is_caught_while_it_is_edited() -> None:
    found = result(changed("blocks.0 : in           ->", "blocks.0.norm1 : in     ->"), "algebra")
    assert "blocks.0.hook_resid_mid = resid_pre + attn_out, with every hook point edited: off by" in found.detail
    # The place holds the same numbers as the one that everything reads.
    found = result(changed("embed       ->", "@ add : in  ->"))
    assert found.passed, str(found)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_stream_goes_from_block_to_block(layer: int) -> None:
    found = result(
        Adapter(f"""
            blocks.0          ->  blocks.0.hook_resid_post  : {STREAM}
            blocks.{layer} : in     ->  blocks.1.hook_resid_pre   : {STREAM}
        """),
        "algebra",
    )
    assert found.passed == (layer == 1)
    assert found.passed or "blocks.1.hook_resid_pre = blocks.0.resid_post: off by" in found.detail


UNPROVEN = {
    "prose": ("= gelu(pre)", "= act(pre)", "blocks.0.mlp.hook_post ('act(pre)' is prose: 'act' is no function"),
    "no text": ("= blocks.0.norm1(resid_pre)", "", "blocks.0.ln1.hook_normalized"),
}


@pytest.mark.parametrize(("old", "new", "says"), UNPROVEN.values(), ids=UNPROVEN)
def test_a_point_that_no_equation_proves_is_named(old: str, new: str, says: str) -> None:
    rows = ROWS.replace(old, new)
    # What reads them says nothing either.
    for reader in ("blocks.0.fc2(post)", *(f"blocks.0.attn.{x}(ln1.normalized)" for x in "qkv")):
        rows = rows.replace(f"= {reader}", "")
    found = result(Adapter(rows))
    assert "could hold anything, for no equation fails when they are changed" in found.detail
    assert says in found.detail
    assert "exempt()" in found.detail


def test_an_equation_that_reads_a_point_without_effect_proves_nothing() -> None:
    rows = ROWS.replace("= embed(input)", "").replace("= embed + pos", "= 0 * embed + full_embed")
    found = result(Adapter(rows))
    assert "2 hook points could hold anything" in found.detail
    assert "hook_embed, hook_full_embed" in found.detail


def test_a_formula_that_cannot_be_evaluated_is_a_problem() -> None:
    found = result(changed("= head(pooled)", "= blocks.0.attn.mix(pooled)"))
    assert "hook_logits = blocks.0.attn.mix(pooled) cannot be evaluated: RuntimeError" in found.detail


@pytest.mark.parametrize(
    ("exempt", "says"),
    [
        ({}, ""),
        (
            MIXED | {"blocks.0.mlp.hook_pre": "no reason"},
            "names 'blocks.0.mlp.hook_pre', which is proven by 'blocks.0.mlp",
        ),
        (MIXED | {"*.hook_z = pattern v": "no reason"}, "names '*.hook_z = pattern v', which holds: take it out"),
        (MIXED | {"blocks.9.hook_x": "no reason"}, "names 'blocks.9.hook_x', which is no hook point and no equation"),
    ],
)
def test_exemptions_are_needed_and_needless_ones_are_named(exempt: Mapping[str, str], says: str) -> None:
    found = result(Adapter(exempt=exempt), "maps.proven" if exempt else "algebra")
    assert not found.passed
    assert (says or "blocks.0.attn.hook_pattern = rows that sum to 1: off by") in found.detail


def test_an_exempt_point_is_counted_apart() -> None:
    rows = ROWS.replace("= first(ln_final)", "").replace("= head(pooled)", "")
    assert not result(Adapter(rows)).passed
    found = result(Adapter(rows, MIXED | {"hook_pooled": "upstream picks a token by chance"}))
    assert found.passed, str(found)
    assert found.detail.startswith("38 of 39 hook points proven by equations; exempt: hook_pooled")


class Wrapped(Upstream):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": super().forward(x)}


class Unwrapping(Adapter):
    def output(self, result: dict[str, Tensor]) -> Tensor:
        return result["out"]


def test_an_output_that_only_the_adapter_can_read_has_its_reference_in_the_case() -> None:
    case = Case("toy", Wrapped)
    found = run_check(CHECKS["parity.logits"], Subject(case, Unwrapping(), Wrapped().eval()))
    assert "Case('toy', ..., forward=lambda model, x: model(x)[...])" in found.detail
    case = Case("toy", Wrapped, forward=lambda model, x: model(x)["out"])
    assert run_check(CHECKS["parity.logits"], Subject(case, Unwrapping(), Wrapped().eval())).passed


# -------------------------------------------------------------------- formulas


@pytest.fixture
def formula() -> Callable[[str, str], Formula]:
    upstream = Upstream().eval()
    table = HookMap.parse(ROWS, head=HEADS)
    rows = {row.hook: row for row in table.rows}
    scope = Scope(rows, {"head": HEADS, "batch": 2}, upstream, (torch.randn(2, 5, 3),))
    return lambda point, text: Formula(point, text, scope)


def test_names_are_looked_for_outwards(formula: Callable[[str, str], Formula]) -> None:
    inside = formula("blocks.1.mlp.hook_pre", "blocks.1.fc1(ln2.normalized) + post - attn.q")
    assert inside.reads == {"blocks.1.ln2.hook_normalized", "blocks.1.mlp.hook_post", "blocks.1.attn.hook_q"}
    assert formula("hook_logits", "head(blocks.0.resid_post) + embed").reads == {
        "blocks.0.hook_resid_post",
        "hook_embed",
    }


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("patches times weights", "'weights' stands where the formula ends"),
        ("two convolutions", "'two' is no hook point near blocks.0.mlp.hook_pre"),
        ("ln(resid_pre)", "'ln' is no function and no module of upstream"),
        ("resid_pre (or shortcut) + attn_out", "'resid_pre' is no function and no module"),
        ("four neighbours, normed", "',' has no meaning"),
        ("resid_pre +", "lacks an operand"),
        ("softmax(pre", "is not closed"),
        ("pre) + pre", "')' stands where the formula ends"),
    ],
)
def test_any_other_text_is_prose(formula: Callable[[str, str], Formula], text: str, word: str) -> None:
    with pytest.raises(Prose, match=word.replace("(", r"\(").replace(")", r"\)")):
        formula("blocks.0.mlp.hook_pre", text)


def test_operators_bind_as_they_are_read() -> None:
    node = parse("a + 0.5 * q . k - f(b c)")
    assert [node.kind, node.operands[0].kind, node.operands[1].kind] == ["-", "+", "call"]
    assert node.operands[0].operands[1].kind == "*"
    assert node.operands[0].operands[1].operands[1].kind == "."
    assert node.operands[1].operands[0].kind == "of"
