"""Top examples: what sorting everything finds, ties and all, from a harvest, a pass, and a search that was stopped."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import MARK, SOURCE, marked, planted
from prisma_harvest import Pass, harvest, resuming, top, top_examples
from prisma_harvest.scoring import Units
from safetensors import safe_open
from safetensors.torch import save_file

from prisma_core import HookedViT, InputError, LoadError, Result

RESID, Z, PATTERN = "blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern"


def images() -> list[Any]:
    """41 images, of which many are equal, so that scores tie."""
    seeds = [*(index // 2 for index in range(24)), *range(17)]
    return [
        (torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), seed)
        for seed in seeds
    ]


def sources(model: HookedViT, tmp_path: Path, names: list[str]) -> dict[str, Any]:
    how = {"preprocess": None, "batch": 4, "workers": 0}
    return {
        "harvest": harvest(model, images(), names, out=tmp_path / "out", dtype="float32", shard=8, **how),
        "pass": Pass(model, images(), names, **how),
        "stream": Pass(model, iter(images()), names, **how),
    }


def by_sorting(scores: torch.Tensor, k: int, per: str) -> list[list[tuple[float, int, int]]]:
    """Return ``(value, example, token)`` of the k largest of each unit, by sorting all of them."""
    found = []
    for unit in range(scores.shape[2]):
        rows = [
            [(-scores[example, token, unit].item(), example, token) for token in range(scores.shape[1])]
            for example in range(scores.shape[0])
        ]
        every = [min(row) for row in rows] if per == "image" else [one for row in rows for one in row]
        found.append([(-value, example, token) for value, example, token in sorted(every)[:k]])
    return found


def found_by(result: Result) -> list[list[tuple[float, int, int]]]:
    parts = (result.values, result.tensors["example"], result.tensors["token"])
    return [
        [(value.item(), int(example), int(token)) for value, example, token in zip(*row, strict=True)]
        for row in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize("per", ["image", "patch"])
@pytest.mark.parametrize("over", ["feature", "head", "direction"])
def test_it_is_what_sorting_everything_finds(model: HookedViT, tmp_path: Path, per: Any, over: str) -> None:
    name = Z if over == "head" else RESID
    directions = torch.randn(3, 24, generator=torch.Generator().manual_seed(5)) if over == "direction" else None
    how = {"over": "head" if over == "head" else "feature", "directions": directions, "per": per}
    for kind, source in sources(model, tmp_path, [RESID, Z]).items():
        result = top_examples(source, name, 7, **how)
        x = harvest(
            model, images(), [RESID, Z], out=tmp_path / "out", dtype="float32", shard=8, preprocess=None, batch=4
        )
        values = x.read(name, 0, 41)
        scores = values.norm(dim=-1) if over == "head" else values
        if directions is not None:
            scores = torch.cat([part @ directions.T for part in values.split(4)])
        expected = by_sorting(scores, 7, per)
        found = found_by(result)
        for mine, theirs in zip(found, expected, strict=True):
            assert [one[0] for one in mine] == pytest.approx([one[0] for one in theirs], rel=1e-6)
            assert [one[1:] for one in mine] == [one[1:] for one in theirs], kind
        assert result.axes == (over, "rank")
        assert torch.allclose(result.tensors["mean"], scores.mean((0, 1)), atol=1e-6)
        assert result.tensors["positive"].tolist() == (scores > 0).sum((0, 1)).tolist()
        edges = [-torch.inf, *result.tensors["edges"].tolist(), torch.inf]
        counts = torch.tensor(
            [
                [((low < each) & (each <= high)).sum() for low, high in pairwise(edges)]
                for each in scores.flatten(0, 1).T
            ]
        )
        assert torch.equal(result.tensors["histogram"], counts)
        best = int(result.tensors["example"][0, 0])
        assert result.facts["examples"][str(best)]["label"] == images()[best][1]


def test_ties_go_to_the_first_and_a_search_without_that_rule_fails(
    model: HookedViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources(model, tmp_path, [RESID])["harvest"]
    result = top_examples(source, RESID, 7)
    expected = by_sorting(source.read(RESID, 0, 41), 7, "image")
    assert [[one[1:] for one in row] for row in found_by(result)] == [[one[1:] for one in row] for row in expected]
    assert all(len({value for value, *_ in row}) < 7 for row in expected)  # there are ties
    first = top.largest
    monkeypatch.setattr(top, "largest", lambda values, k: values.shape[1] - 1 - first(values.flip(1), k))
    assert found_by(top_examples(source, RESID, 7)) != expected


def test_a_planted_direction_is_found() -> None:
    """The mark of the first patch is written to one direction of the stream: the brightest mark is on top, there."""
    model = planted()
    brightness = [0.3, -2.0, 1.7, 0.1, 2.4, -0.6, 0.9]
    data = [marked(each, seed)[0] for seed, each in enumerate(brightness)]
    names = ["blocks.0.hook_resid_pre"]
    for sign, best in ((1.0, 4), (-1.0, 1)):
        direction = torch.zeros(1, 24)
        direction[0, MARK] = sign
        source = Pass(model, data, names, preprocess=None, batch=3, workers=0)
        result = top_examples(source, names[0], 3, directions=direction, labels=["mark"])
        assert int(result.tensors["example"][0, 0]) == best
        assert int(result.tensors["token"][0, 0]) == SOURCE
        assert result.values[0, 0] == pytest.approx(abs(brightness[best]), abs=0.2)
        assert result.names("direction") == ("mark",)


@pytest.mark.parametrize("kind", ["harvest", "pass", "stream"])
def test_a_search_goes_on_where_it_was(
    model: HookedViT, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = top_examples(sources(model, tmp_path, [RESID])[kind], RESID, 5, per="patch")
    path = tmp_path / "search.safetensors"
    monkeypatch.setattr(resuming, "SAVE_EVERY", 0.0)
    add, calls = top._Search.add, []

    def stopped(search: Any, *group: Any) -> None:
        calls.append(group[0])
        if len(calls) == 6:
            raise KeyboardInterrupt
        add(search, *group)

    monkeypatch.setattr(top._Search, "add", stopped)
    with pytest.raises(KeyboardInterrupt):
        top_examples(sources(model, tmp_path, [RESID])[kind], RESID, 5, per="patch", resume=path)
    firsts: list[int] = []
    monkeypatch.setattr(top._Search, "add", lambda search, *group: (firsts.append(group[0]), add(search, *group)))
    result = top_examples(sources(model, tmp_path, [RESID])[kind], RESID, 5, per="patch", resume=path)
    assert firsts[0] == 20
    assert torch.equal(result.values, whole.values)
    for name, tensor in whole.tensors.items():
        assert torch.equal(result.tensors[name], tensor), name
    assert result.facts == whole.facts
    with pytest.raises(LoadError, match="another search"):
        top_examples(sources(model, tmp_path, [RESID])[kind], RESID, 6, per="patch", resume=path)


@pytest.mark.parametrize("change", ["seen", "lines", "no seen", "values", "no sum"])
def test_a_search_whose_file_was_changed_is_refused(model: HookedViT, tmp_path: Path, change: str) -> None:
    """Gone on from, it would leave images out, or name others."""
    path, source = tmp_path / "search.safetensors", sources(model, tmp_path, [RESID])["harvest"]
    whole = top_examples(source, RESID, 2, resume=path)
    assert torch.equal(top_examples(source, RESID, 2, resume=path).values, whole.values)
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["top_examples"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if change.startswith("no "):
        (facts if change == "no seen" else state).pop(change.removeprefix("no "))
    elif change == "values":
        state["values"][0, 0] += 1
    else:
        facts[change] = {"seen": 4, "lines": {"0": {"path": "another"}}}[change]
    save_file(state, path, {"top_examples": json.dumps(facts)})
    with pytest.raises(LoadError, match=r"not what was written.*begin anew"):
        top_examples(source, RESID, 2, resume=path)


@pytest.mark.parametrize("how", [{"directions": torch.ones(2, 24) * 1j}, {"encode": lambda rows: rows * 1j}])
def test_complex_scores_are_refused(model: HookedViT, tmp_path: Path, how: Any) -> None:
    with pytest.raises(InputError, match="real"):
        top_examples(sources(model, tmp_path, [RESID])["harvest"], RESID, 2, **how)


def test_memory_is_bounded_by_k(model: HookedViT) -> None:
    data = [each for each, _ in images()] * 3
    source = Pass(model, data, [RESID], preprocess=None, batch=4, workers=0)
    search = top._Search(source.points[0], Units(), 2, "image")
    sizes = set()
    for first, x, lines in top._groups(source, source.points[0], search):
        search.add(first, x, lines)
        sizes.add(sum(each.numel() for each in search.state.values()))
    assert search.seen == 123
    assert sizes == {24 * (3 * 2 + len(top.EDGES) + 1 + 2)}
    search._forget()
    assert len(search.lines) <= 24 * 2


def test_fewer_images_than_k_and_what_does_not_fit(model: HookedViT, tmp_path: Path) -> None:
    source = Pass(model, [each for each, _ in images()[:3]], [RESID, Z, PATTERN], preprocess=None, workers=0)
    result = top_examples(source, RESID, 10)
    assert result.shape == {"feature": 24, "rank": 3}
    assert Result.load(result.save(tmp_path / "top.safetensors")).facts == result.facts
    with pytest.raises(InputError, match=r"expected directions \[direction 24\], got \[2, 8\]"):
        top_examples(source, RESID, directions=torch.zeros(2, 8))
    with pytest.raises(InputError, match="without heads"):
        top_examples(source, RESID, over="head")
    with pytest.raises(InputError, match="head query_pos key_pos"):
        top_examples(source, PATTERN)
    with pytest.raises(InputError, match="24 units and 1 labels"):
        top_examples(source, RESID, labels=["one"])
