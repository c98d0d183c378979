"""Hook maps name places in an upstream model; a recorder reads them."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from prisma_conformance.recording import Recorder
from torch import Tensor, nn

from prisma_core import PrismaError, UnknownName
from prisma_core.maps.places import HookMap, Place, Row
from prisma_core.toolbox.tables import check_rows, numbered

pytestmark = pytest.mark.usefixtures("in_float64")


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (2 * x).softmax(-1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        scores = x * scale
        first = F.softmax(scores, dim=-1)
        scores.mul_(0)  # upstream may go on to edit what it gave away
        inner = self.inner(x)
        second = torch.softmax(3 * x, dim=-1)
        product = first @ second.mT
        x.add_(100)
        return first + inner, product


class Upstream(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.norm = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x.clone(), torch.full((), 0.5))[0]
        return self.norm(x - 0.6)


@pytest.fixture
def x():
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


def read(model, x, *texts):
    places = [Place.parse(text) for text in texts]
    with Recorder(model, places) as seen:
        model(x)
    return [seen[place] for place in places]


def test_outputs_and_inputs(x):
    model = Upstream()
    given, second, out, normed, unnormed = read(
        model, x, "blocks.0 : in", "blocks.0 : in1", "blocks.0", "norm : out", "norm : in"
    )
    assert torch.equal(given, x)  # before the module edits it in place
    assert second == 0.5
    assert torch.equal(out, (x / 2).softmax(-1) + (2 * x).softmax(-1))
    assert torch.equal(normed, model(x))
    assert (unnormed < 0).any()
    assert torch.equal(unnormed.relu(), normed)


def test_functions_of_a_module(x):
    scores, pattern, second_in, second, inner, product = read(
        Upstream(),
        x,
        "blocks.0 @ softmax : in",
        "blocks.0 @ softmax",
        "blocks.0 @ softmax#1 : in",
        "blocks.0 @ softmax#1",
        "blocks.0.inner @ softmax",
        "blocks.0 @ matmul",
    )
    assert torch.equal(scores, x / 2)  # before the edit in place
    assert torch.equal(pattern, (x / 2).softmax(-1))
    assert torch.equal(second_in, 3 * x)
    assert torch.equal(second, (3 * x).softmax(-1))
    assert torch.equal(inner, (2 * x).softmax(-1))
    assert torch.equal(product, pattern @ second.mT)


def test_each_module_counts_its_own_calls(x):
    """The same function in two layers, and in a module inside: none is mistaken for another."""
    model = Upstream()
    (first,) = read(model, x, "blocks.0")
    scores = read(model, x, "blocks.1 @ softmax : in", "blocks.1 @ softmax#1 : in")
    assert torch.equal(scores[0], first / 2)
    assert torch.equal(scores[1], 3 * first)
    place = Place.parse("blocks.0 @ softmax#2")
    with Recorder(model, [place]) as seen:
        model(x)
    assert place not in seen


def test_what_was_recorded_stays_and_nothing_is_left(x):
    model = Upstream()
    place = Place.parse("blocks.0")
    with Recorder(model, [place, Place.parse("blocks.0 @ softmax")]) as seen:
        model(x)
    kept = seen[place].clone()
    model(x + 1)
    assert torch.equal(seen[place], kept)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError), Recorder(model, [Place.parse("blocks.0.inner @ softmax")]):
        model(torch.randn(2, 3, requires_grad=True).relu_().T @ torch.ones(5, 5))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_module_upstream_lacks_is_an_error(x):
    with pytest.raises(PrismaError, match=r"at 'blocks' .*no module '2'"):
        read(Upstream(), x, "blocks.2")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("blocks.{l}.attn", Place("blocks.{l}.attn")),
        ("a : in", Place("a", side="in")),
        ("a:in1", Place("a", side="in1")),
        ("a.b @ softmax", Place("a.b", "softmax")),
        ("a @ softmax#2 : in", Place("a", "softmax", 2, "in")),
        ("", Place("")),
    ],
)
def test_places(text, place):
    assert Place.parse(text) == place


@pytest.mark.parametrize("text", ["a : inn", "a b", "a @", "a @ f #x", "a : out : in", "@ softmax.b"])
def test_what_is_no_place(text):
    with pytest.raises(PrismaError, match="is not a place"):
        Place.parse(text)


def test_tables():
    table = """
        embed                  ->  hook_embed
        layers.{l} : in        ->  blocks.{l}.hook_resid_pre
        layers.{l}.q           ->  blocks.{l}.attn.hook_q        : b h p d -> b p h d
        layers.{l}.z           ->  blocks.{l}.attn.hook_z        : b p (h d) -> b p h d
        nothing.{l}            ->  blocks.{l}.ln9.hook_scale
    """
    names = ["hook_embed", "blocks.11.hook_resid_pre", "blocks.0.attn.hook_q", "blocks.1.attn.hook_z", "hook_logits"]
    rows = HookMap.parse(table, h=4).bound(names)
    assert rows == [
        Row(Place("embed"), "hook_embed"),
        Row(Place("layers.11", side="in"), "blocks.11.hook_resid_pre"),
        Row(Place("layers.0.q"), "blocks.0.attn.hook_q", "b h p d -> b p h d"),
        Row(Place("layers.1.z"), "blocks.1.attn.hook_z", "b p (h d) -> b p h d"),
    ]
    x = torch.randn(2, 3, 8)
    assert torch.equal(rows[0].read(x, {"h": 4}), x)
    assert torch.equal(rows[3].read(x, {"h": 4}), x.view(2, 3, 4, 2))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a b c", "is not a row"),
        ("a ->", "is not a row"),
        ("a b -> c", "is not a place"),
        ("layers.{l} -> hook_embed", r"\{l\} stands in the place but not in the hook point"),
        ("a -> hook_logits -> x", "a second arrow"),
        ("a -> hook_q: b p d -> b d p", "a second arrow"),
        ("a -> hook_q | zeros", "no name of a hook point"),
        ("a -> blocks.{*}.hook_q", "no name of a hook point"),
        ("a -> b : {f}", r"no function \{f\} was given; none were given\. Pass it: HookMap\.parse\(table, functions="),
        ("a -> b : x {f}", "neither an einops pattern nor a {function}"),
        ("a -> b : x y -> y x -> x y", "neither an einops pattern nor a {function}"),
        ("a -> b\nc -> b", "several rows for b: a hook point equals one place"),
    ],
)
def test_tables_that_are_none(line, words):
    with pytest.raises(PrismaError, match=words):
        HookMap.parse(line)


@pytest.mark.parametrize("given", [{"h": "3"}, {"h": 0}, {"h": True}, {"h": None}])
def test_keywords_that_are_no_lengths(given):
    with pytest.raises(PrismaError, match=r"is no length of an axis: HookMap\.parse takes the table"):
        HookMap.parse("a -> b", **given)


def test_functions_show_what_no_pattern_can():
    table = """
        layers.{l} : in  ->  blocks.{l}.hook_resid_pre : {front}
        layers.{l}       ->  blocks.{l}.hook_resid_post
    """
    table = HookMap.parse(table, {"front": lambda x: x.roll(1, 1)}).prefixed("trunk.", "vision.")
    row, plain = table.bound(["vision.blocks.3.hook_resid_pre", "vision.blocks.3.hook_resid_post"])
    assert str(row) == "trunk.layers.3 : in -> vision.blocks.3.hook_resid_pre : {front}"
    assert not row.axes
    x = torch.arange(6.0).view(1, 3, 2)
    assert row.read(x, {}).tolist() == [[[4, 5], [0, 1], [2, 3]]]
    assert plain.read(x, {}) is x


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x.roll(1, 7), r"a -> b : \{f\}: \{f\} raised IndexError"),
        (lambda x: [x], r"a -> b : \{f\}: \{f\} returned a list.*; expected Tensor"),
    ],
)
def test_a_function_that_fails_is_named(function, words):
    (row,) = HookMap.parse("a -> b : {f}", functions={"f": function}).rows
    with pytest.raises(PrismaError, match=words):
        row.read(torch.zeros(2, 3), {})


def test_one_axis_may_have_several_lengths() -> None:
    table = HookMap.parse("one -> a : b (head d) -> b head d\ntwo -> b : b (head2 d) -> b head2 d", head=2, head2=3)
    one, two = table.rows
    assert one.axes == two.axes == "b head d"
    x = torch.randn(1, 6)
    assert one.read(x, table.sizes).shape == (1, 2, 3)
    assert two.read(x, table.sizes).shape == (1, 3, 2)
    assert torch.equal(two.write(two.read(x, table.sizes), table.sizes), x)


def test_two_rows_that_speak_of_one_hook_point():
    table = HookMap.parse("a.{l} -> blocks.{l}.hook_x") | HookMap.parse("b -> blocks.0.hook_x")
    with pytest.raises(PrismaError, match=r"several rows for blocks\.0\.hook_x"):
        table.bound(["blocks.1.hook_x", "blocks.0.hook_x"])


@pytest.mark.parametrize("back", [False, True])
def test_einops_that_does_not_fit_names_its_row(back):
    (row,) = HookMap.parse("a.b @ softmax#1 : in -> hook_x : b (h d) -> b h d", h=3).rows
    with pytest.raises(PrismaError) as caught:
        row.write(torch.zeros(2, 2, 2), {"h": 3}) if back else row.read(torch.zeros(2, 4), {"h": 3})
    assert str(caught.value).startswith("a.b @ softmax#1 : in -> hook_x : b (h d) -> b h d: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a", "a : in1", "a @ softmax#2 : in", "@ f", ""])
def test_a_place_is_said_as_it_is_written(text):
    assert str(Place.parse(text)) == text


LACKING = {"ln_pre.hook_normalized", "blocks.{l}.attn.hook_rot_q"}


@pytest.mark.parametrize(
    ("hook", "suggested"),
    [
        ("blocks.{l}.attn.hook_attn_score", r"Did you mean blocks\.{l}\.attn\.hook_attn_scores"),
        ("blocks.7.attn.hook_q", r"Did you mean blocks\.1\.attn\.hook_q"),
        ("hook_logit", "Did you mean hook_logits"),
    ],
)
def test_a_hook_point_that_no_model_has(hook, suggested):
    points = [f"blocks.{n}.attn.{name}" for n in (0, 1) for name in ("hook_attn_scores", "hook_q")] + ["hook_logits"]
    sound = "x.{i} -> blocks.{i}.attn.hook_q\nn -> ln_pre.hook_normalized\nr.{i} -> blocks.{i}.attn.hook_rot_q"
    check_rows(HookMap.parse(sound), points, LACKING)  # of parts that this model lacks
    with pytest.raises(
        UnknownName, match=rf"'place -> {re.escape(hook)}': .* is no hook point of this model.*{suggested}"
    ):
        check_rows(HookMap.parse(f"{sound}\nplace -> {hook}"), points, LACKING)


def test_rows_with_marks_are_numbered_by_upstreams_modules():
    table = HookMap.parse("""
        stem                        ->  hook_embed
        stages.{s}.blocks.{l} : in  ->  stages.{s}.blocks.{l}.hook_resid_pre  : a b  = stages.{s}.pool(x)
        stages.{s}.blocks.{l}       ->  stages.{s}.blocks.{l}.hook_resid_post
        head                        ->  hook_logits
    """)

    def stage(depth: int) -> nn.Module:
        return nn.ModuleDict({"blocks": nn.ModuleList(nn.ReLU() for _ in range(depth))})

    upstream = nn.ModuleDict({"stem": nn.ReLU(), "stages": nn.ModuleList([stage(2), stage(11)]), "head": nn.ReLU()})
    rows = numbered(table, upstream)
    order = [*(f"stages.0.blocks.{n}" for n in range(2)), *(f"stages.1.blocks.{n}" for n in range(11))]
    points = [f"{block}.hook_resid_{side}" for block in order for side in ("pre", "post")]
    assert [row.hook for row in rows] == ["hook_embed", *points, "hook_logits"]
    assert rows[3].place == Place("stages.0.blocks.1", side="in")
    assert rows[5].equation == "stages.1.pool(x)"
    with pytest.raises(PrismaError, match="leaves numbers open"):
        numbered(table, nn.ModuleDict({"stem": nn.ReLU(), "head": nn.ReLU()}))
    twice = table | HookMap.parse("stem -> stages.0.blocks.0.hook_resid_pre")
    with pytest.raises(PrismaError, match="several rows for stages"):
        numbered(twice, upstream)
