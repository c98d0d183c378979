"""Weight maps account for every tensor on both sides, and run both ways."""

from __future__ import annotations

import pytest
import torch
from prisma_conformance.gradients import pull_back

from prisma_core import PrismaError, WeightMapError
from prisma_core.maps.places import HookMap
from prisma_core.maps.rule import Rule
from prisma_core.maps.weights import WeightMap

pytestmark = pytest.mark.usefixtures("in_float64")


def shapes(**named):
    return {name.replace("__", "."): torch.Size(shape) for name, shape in named.items()}


def sized(sizes):
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in sizes.items()}


def test_lines_are_left_out_by_what_they_make():
    table = WeightMap.parse("a.{l} -> b.{l}\nc -> [d, e]\nf -> g")
    assert [str(rule) for rule in table.without("b.{l}", "e").rows] == ["f -> g"]
    assert [str(rule) for rule in table.without("b.3", "g").rows] == ["a.{l} -> b.{l}", "c -> [d, e]"]
    assert table.without() == table


def test_what_is_copied_is_what_shares_no_memory_with_upstream():
    table = WeightMap.parse("a -> b\n[c, d] -> e\nzeros -> g\nh -> i : x y -> y x")
    upstream = sized({"a": (2,), "c": (1, 2), "d": (2, 2), "h": (2, 3)})
    canonical = table.forward(upstream, shapes(b=(2,), e=(3, 2), g=(4,), i=(3, 2)))
    assert table.copied(upstream, canonical) == {"e": "[c, d] -> e"}


@pytest.mark.parametrize("table", [WeightMap, HookMap])
@pytest.mark.parametrize("text", [b"a -> b", None, ["a -> b"], 3])
def test_a_table_is_a_text(table, text):
    with pytest.raises(PrismaError, match=f"expected a text with a (rule|row) a line, got {type(text).__name__}"):
        table.parse(text)


@pytest.mark.parametrize("functions", [{"f": None}, ["f"], {"g": len, "f": "len"}, "f"])
def test_what_is_no_function_is_none_that_was_given(functions):
    known = "there are g" if isinstance(functions, dict) and "g" in functions else "none were given"
    with pytest.raises(WeightMapError, match=rf"no function \{{f\}} was given; {known}\."):
        WeightMap.parse("a -> b : {f}", functions)


@pytest.mark.parametrize("table", [WeightMap, HookMap])
@pytest.mark.parametrize(("odd", "came"), [("a -> b", "a str"), (None, "None"), (Rule, "the class Rule")])
def test_what_is_no_line_makes_no_table(table, odd, came):
    with pytest.raises(PrismaError, match=rf"Expected lines, as {table.__name__}\.parse reads them; got {came}\."):
        table((*WeightMap.parse("a -> b").rows, odd))


CASES = {
    "as it is": ("a.weight -> b.weight", {"a.weight": (3, 2)}, {"b.weight": (3, 2)}),
    "scalar": ("temperature -> scale", {"temperature": ()}, {"scale": ()}),
    "numbered": ("old.{l}.w -> new.{l}.v", {"old.0.w": (2,), "old.11.w": (3,)}, {"new.0.v": (2,), "new.11.v": (3,)}),
    "a number named twice": ("a.{l}.b.{l} -> c.{l}.d.{l}", {"a.3.b.3": (2,)}, {"c.3.d.3": (2,)}),
    "any rest": (
        "norm.{*} -> ln.{*}",
        {"norm.weight": (2,), "norm.a.bias": (3,)},
        {"ln.weight": (2,), "ln.a.bias": (3,)},
    ),
    "rearranged": ("p -> q : 1 n d -> n d", {"p": (1, 4, 3)}, {"q": (4, 3)}),
    "rearranged by size": ("p -> q : (h d) m -> h m d", {"p": (6, 5)}, {"q": (2, 5, 3)}),
    "joined": ("[q, k, v] -> qkv", {"q": (2, 3), "k": (1, 3), "v": (4, 3)}, {"qkv": (7, 3)}),
    "joined, rearranged": ("[c, p] -> prefix : 1 n d -> n d", {"c": (1, 1, 3), "p": (1, 2, 3)}, {"prefix": (3, 3)}),
    "split": ("w12 -> [gate, in]", {"w12": (6, 2)}, {"gate": (4, 2), "in": (2, 2)}),
    "joined and split": ("[a, b] -> [c, d]", {"a": (2, 2), "b": (4, 2)}, {"c": (5, 2), "d": (1, 2)}),
    "zeros alone": ("zeros -> bias\na -> b", {"a": (2,)}, {"bias": (3,), "b": (2,)}),
    "ones alone": ("ones -> w\na -> b", {"a": (2,)}, {"w": (3, 2), "b": (2,)}),
    "zeros in a list": ("[q, zeros, v] -> qkv", {"q": (2,), "v": (3,)}, {"qkv": (7,)}),
    "zeros where there are none": (
        "a.bias | zeros -> b.bias\na.w -> b.w",
        {"a.w": (2,)},
        {"b.bias": (3,), "b.w": (2,)},
    ),
    "no zeros where there are some": ("a.bias | zeros -> b.bias", {"a.bias": (3,)}, {"b.bias": (3,)}),
    "the second name": ("old | new -> x", {"new": (3,)}, {"x": (3,)}),
    "one for two": ("a -> b\na -> c", {"a": (3,)}, {"b": (3,), "c": (3,)}),
    "ignored": ("a -> b\nignore t.{*} : a table of positions", {"a": (3,), "t.index": (2,)}, {"b": (3,)}),
    "rules for parts this model lacks": ("a -> b\nc -> d", {"a": (3,)}, {"b": (3,)}),
}


@pytest.mark.parametrize("case", CASES)
def test_both_ways(case):
    table, sources, targets = CASES[case]
    table = WeightMap.parse(table, h=2)
    upstream = sized(sources)
    made = table.forward(upstream, {name: torch.Size(shape) for name, shape in targets.items()})
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == targets
    back = table.backward(made, upstream)
    assert list(back) == list(upstream)
    assert all(torch.equal(back[name], tensor) for name, tensor in upstream.items())
    # Upstream's shapes are enough to run it backwards: its numbers come from the canonical tensors.
    bare = {name: tensor if name.startswith("t.") else tensor.to("meta") for name, tensor in upstream.items()}
    assert all(torch.equal(tensor, upstream[name]) for name, tensor in table.backward(made, bare).items())


def test_a_source_in_a_list_has_a_pattern_of_its_own():
    row = "[cls : 1 n d -> n d, registers] -> embed.prefix"
    assert str(Rule.parse(row)) == row
    table = WeightMap.parse(f"{row}\n[zeros, grid : r c d -> (r c) d] -> pos")
    upstream = {"cls": torch.randn(1, 1, 4), "registers": torch.randn(2, 4), "grid": torch.randn(2, 3, 4)}
    canonical = {"embed.prefix": torch.Size((3, 4)), "pos": torch.Size((9, 4))}
    made = table.forward(upstream, canonical)
    assert torch.equal(made["embed.prefix"], torch.cat([upstream["cls"][0], upstream["registers"]]))
    assert torch.equal(made["pos"][3:], upstream["grid"].flatten(0, 1))
    # r and c of the way back are upstream's own shape: no keyword of parse says them.
    assert all(torch.equal(tensor, upstream[name]) for name, tensor in table.backward(made, upstream).items())
    inside = {f"a.{name}": tensor for name, tensor in upstream.items()}
    there = table.prefixed("a.", "b.").forward(inside, {f"b.{name}": shape for name, shape in canonical.items()})
    assert torch.equal(there["b.pos"], made["pos"])


def test_what_a_rule_makes():
    upstream = {"q": torch.ones(1, 2), "v": 3 * torch.ones(2, 2), "w": torch.arange(12.0).view(6, 2)}
    table = WeightMap.parse("[q, zeros, v] -> qkv\nw -> [a, b] : (h d) m -> (d h) m", h=2)
    made = table.forward(upstream, shapes(qkv=(5, 2), a=(2, 2), b=(4, 2)))
    assert made["qkv"][:, 0].tolist() == [1, 0, 0, 3, 3]
    assert made["a"][:, 0].tolist() == [0, 6]
    assert made["b"][:, 0].tolist() == [2, 8, 4, 10]


def test_storage_is_shared_where_nothing_has_to_move():
    upstream = sized({"a": (4, 3), "p": (1, 4, 3), "w": (6, 2)})
    table = WeightMap.parse("a -> b\np -> q : 1 n d -> n d\nw -> [c, d]")
    made = table.forward(upstream, shapes(b=(4, 3), q=(4, 3), c=(2, 2), d=(4, 2)))
    owned = {tensor.untyped_storage().data_ptr() for tensor in upstream.values()}
    assert {tensor.untyped_storage().data_ptr() for tensor in made.values()} == owned


@pytest.mark.parametrize(
    ("table", "sources", "targets", "words"),
    [
        (
            "a -> b",
            {"a": (2,), "extra": (3,)},
            {"b": (2,)},
            r"1 upstream tensors are neither mapped nor ignored: extra",
        ),
        ("a -> b", {"a": (2,)}, {"b": (2,), "c": (2,)}, r"1 canonical tensors cannot be filled: c \(no rule\)"),
        ("a -> b\nx -> c", {"a": (2,)}, {"b": (2,), "c": (2,)}, r"c \(needs x\)"),
        ("[a, x] -> b", {"a": (2,)}, {"b": (3,)}, r"b \(needs x\)"),
        (
            "a -> b",
            {"a": (2, 3)},
            {"b": (3, 2)},
            r"b: expected shape \[3, 2\], got \[2, 3\] from \{'a': \[2, 3\]\} by 'a -> b'",
        ),
        ("a -> b : 1 n -> n", {"a": (2, 3)}, {"b": (3,)}, "(?s)a -> b : 1 n -> n: .*Shape mismatch"),
        ("a -> b\nc -> b", {"a": (2,), "c": (2,)}, {"b": (2,)}, "b is made by 2 rules: a -> b; c -> b"),
        ("a.{l} -> b.{l}\na.0 -> b.0", {"a.0": (2,)}, {"b.0": (2,)}, "b.0 is made by 2 rules"),
        ("a -> [b, c]", {"a": (4,)}, {"b": (2,), "c": (3,)}, r"4 rows cannot be split into \[2, 3\]"),
        ("a -> [b, c]", {"a": (4,)}, {"b": (4,)}, "makes c, which the canonical model does not have"),
        ("[a, c] -> b", {"a": (2, 3), "c": (2, 4)}, {"b": (4, 3)}, r"cannot be joined"),
        ("[a, zeros] -> b", {"a": (4,)}, {"b": (3,)}, "cannot be joined"),
    ],
)
def test_what_is_not_accounted_for_is_an_error(table, sources, targets, words):
    with pytest.raises(WeightMapError, match=words):
        WeightMap.parse(table).forward(sized(sources), {name: torch.Size(shape) for name, shape in targets.items()})


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("a b", "is not a rule: expected 'SOURCE -> TARGET : HOW'"),
        ("-> b", "is not a rule"),
        ("a ->", "is not a rule"),
        ("ignore a", "expected 'ignore KEYS : REASON'"),
        ("ignore a :  ", "expected 'ignore KEYS : REASON'"),
        ("a -> b : {gather}", r"no function \{gather\} was given; none were given\. .*functions=\{'gather': gather\}"),
        ("[a, b] -> [c, d] : {f}", r"^\[a, b\] -> \[c, d\] : \{f\}: no function"),
        ("{f} -> b", r"^\{f\} -> b: no function \{f\} was given"),
        ("{f} -> b : n -> n", "a function without sources"),
        ("a -> b -> c", "a second arrow"),
        ("a -> b: n d -> d n", "a second arrow"),
        ("a -> b | zeros", r"stands on the left: 'SOURCE \| zeros -> TARGET : HOW'"),
        ("a -> b : n d -> d n | zeros", "stands on the left"),
        ("a -> b : transposed", "neither an einops pattern"),
        ("a -> []", "a name is missing"),
        ("[a, ] -> b", "a name is missing"),
        ("[a, b -> c", "is no name of a tensor"),
        ("[a : n -> n, b] -> c : n -> n", "patterns stand behind single sources or behind all"),
        ("[a : transposed, b] -> c", "a pattern of a source is 'LEFT -> RIGHT'"),
        ("a b -> c", "'a b' is no name of a tensor"),
        ("a.{l} -> b", r"\{l\} stands in a source but not in b"),
        ("a.{*} -> [b.{*}, c]", r"\{\*\} stands in a source but not in c"),
    ],
)
def test_tables_that_are_none(table, words):
    with pytest.raises(WeightMapError, match=words):
        WeightMap.parse(table)


@pytest.mark.parametrize("given", [{"function": {"f": abs}}, {"h": 2.0}])
def test_keywords_that_are_no_lengths(given):
    with pytest.raises(WeightMapError, match=r"is no length of an axis: WeightMap\.parse takes .*functions="):
        WeightMap.parse("a -> b", **given)


def test_a_join_of_nothing_is_refused_where_it_is_needed():
    table = WeightMap.parse("[] -> b\na -> c")
    assert list(table.forward(sized({"a": (2,)}), shapes(c=(2,)))) == ["c"]
    with pytest.raises(WeightMapError, match=r"\[\] -> b: it makes b of nothing"):
        table.forward(sized({"a": (2,)}), shapes(b=(2,), c=(2,)))


def test_what_upstream_lacks_by_design_is_told_how_to_fill():
    with pytest.raises(WeightMapError, match=r"b \(needs a\).*'SOURCE \| zeros -> TARGET'"):
        WeightMap.parse("a -> b\nc -> d").forward(sized({"c": (2,)}), shapes(b=(2,), d=(2,)))


def _broken(*given):
    raise KeyError("table")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (_broken, r"a -> b : \{f\}: \{f\} raised KeyError: 'table' \(test_weights\.py, line \d+\)"),
        (lambda: 1, r"\{f\} raised TypeError: .*takes 0 positional arguments"),
        (lambda a: None, r"\{f\} returned None; expected Tensor"),
    ],
)
def test_a_function_that_fails_is_named(function, words):
    table = WeightMap.parse("a -> b : {f}", functions={"f": function})
    with pytest.raises(PrismaError, match=words):
        table.forward(sized({"a": (2,)}), shapes(b=(2,)))


def test_a_function_without_sources_makes_what_upstream_keeps_in_no_tensor():
    fixed = torch.randn(3, 2, dtype=torch.float64)
    table = WeightMap.parse("{fixed} -> pos\na -> b", functions={"fixed": lambda: fixed}).prefixed("trunk.", "vision.")
    upstream = {"trunk.a": torch.randn(2, dtype=torch.float32)}
    wanted = shapes(vision__pos=(3, 2), vision__b=(2,))
    made = table.forward(upstream, wanted)
    assert torch.equal(made["vision.pos"], fixed.float())  # as what upstream's own tensors are
    bare = {name: tensor.to("meta") for name, tensor in upstream.items()}
    assert all(torch.equal(tensor, upstream[name]) for name, tensor in table.backward(made, bare).items())
    grads = {name: torch.ones(shape) for name, shape in wanted.items()}
    assert pull_back(table, upstream, grads)["trunk.a"].tolist() == [1, 1]
    with pytest.raises(WeightMapError, match=r"vision\.pos was changed, and '\{fixed\} -> vision\.pos'"):
        table.backward(made | {"vision.pos": made["vision.pos"] + 1}, bare)


def test_joined_tables_keep_their_own_functions():
    tables = [WeightMap.parse(f"a -> {name} : {{f}}", {"f": f}) for name, f in (("b", torch.neg), ("c", torch.exp))]
    made = (tables[0] | tables[1]).forward({"a": torch.ones(2)}, shapes(b=(2,), c=(2,)))
    assert made["b"].tolist() == [-1, -1]
    assert torch.equal(made["c"], torch.ones(2).exp())


def test_functions_run_forwards_and_give_their_sources_back_unchanged():
    index = torch.tensor([2, 0, 1, 1])
    table = WeightMap.parse("table.{l} -> bias.{l} : {gather}", {"gather": lambda table: table[index]})
    upstream = sized({"table.0": (3, 2)})
    made = table.forward(upstream, shapes(bias__0=(4, 2)))
    assert torch.equal(made["bias.0"], upstream["table.0"][index])
    assert table.function_sources(upstream) == {"table.0"}
    assert torch.equal(table.backward(made, upstream)["table.0"], upstream["table.0"])
    made["bias.0"][0] += 1
    with pytest.raises(
        WeightMapError, match=r"bias.0 was changed, and 'table.0 -> bias.0 : \{gather\}' cannot be run back"
    ):
        table.backward(made, upstream)


def test_edits_come_back_where_upstream_can_hold_them():
    table = WeightMap.parse("[q, zeros, v] -> qkv\np -> pos : 1 n d -> n d\nones -> w")
    upstream = sized({"q": (2,), "v": (2,), "p": (1, 2, 3)})
    made = table.forward(upstream, shapes(qkv=(5,), pos=(2, 3), w=(2,)))
    edited = {name: tensor.clone() for name, tensor in made.items()}
    edited["qkv"][[0, 4]] = 7.0
    edited["pos"][1, 2] = 8.0
    back = table.backward(edited, upstream)
    assert back["q"][0] == back["v"][1] == 7
    assert back["p"][0, 1, 2] == 8
    for name, at, word in (("qkv", 2, "zeros"), ("w", 0, "ones")):
        spoiled = {each: tensor.clone() for each, tensor in made.items()}
        spoiled[name][at] = 5.0
        with pytest.raises(
            WeightMapError, match=rf"{name} was changed where upstream has no tensor \(it stands for {word}\)"
        ):
            table.backward(spoiled, upstream)


def test_one_upstream_tensor_for_two_can_only_be_changed_alike():
    table = WeightMap.parse("a -> b\na -> c")
    upstream = sized({"a": (3,)})
    made = {name: tensor.clone() for name, tensor in table.forward(upstream, shapes(b=(3,), c=(3,))).items()}
    made["b"] += 1
    with pytest.raises(WeightMapError, match="a makes several canonical tensors, and they were changed differently"):
        table.backward(made, upstream)
    made["c"] += 1
    assert torch.equal(table.backward(made, upstream)["a"], upstream["a"] + 1)


def test_gradients_pulled_back_equal_autograds():
    index = torch.tensor([2, 0, 1, 1])
    text = """
        [q, zeros, v] -> qkv
        t -> bias : {gather}
        p -> pos : 1 n d -> n d
        a -> b
        a -> c
        w -> [x, y]
        ignore i : an index
    """
    table = WeightMap.parse(text, {"gather": lambda t: t[index] ** 2})
    upstream = sized({"q": (2, 2), "v": (2, 2), "t": (3,), "p": (1, 2, 3), "a": (3,), "w": (4,)})
    upstream["i"] = index
    sizes = shapes(qkv=(6, 2), bias=(4,), pos=(2, 3), b=(3,), c=(3,), x=(1,), y=(3,))
    torch.manual_seed(1)
    gradients = {name: torch.randn(shape) for name, shape in sizes.items()}
    leaves = {name: tensor.clone().requires_grad_(tensor.is_floating_point()) for name, tensor in upstream.items()}
    made = {
        "qkv": torch.cat([leaves["q"], torch.zeros(2, 2), leaves["v"]]),
        "bias": leaves["t"][index] ** 2,
        "pos": leaves["p"][0],
        "b": leaves["a"],
        "c": leaves["a"],
        "x": leaves["w"][:1],
        "y": leaves["w"][1:],
    }
    sum((made[name] * gradients[name]).sum() for name in made).backward()
    found = pull_back(table, upstream, gradients)
    assert set(found) == set(upstream) - {"i"}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, leaves[name].grad)
    assert not any(tensor.requires_grad for tensor in upstream.values())


def test_a_number_cannot_be_split() -> None:
    table = WeightMap.parse("alpha -> [a, b]")
    with pytest.raises(WeightMapError, match=r"alpha -> \[a, b\]: 1 rows cannot be split into \[2, 2\]"):
        table.forward({"alpha": torch.tensor(0.5)}, shapes(a=(2,), b=(2,)))
