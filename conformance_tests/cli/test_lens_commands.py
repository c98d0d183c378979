"""``prisma lens``, ``prisma attribute`` and ``prisma heads`` say what the functions return, offline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import marked
from planted_dual import planted_dual
from prisma_lens import attribute, head_scores, logit_lens
from prisma_toy import sample_scene

import prisma_core as prisma
from prisma_core import HookedViT, Result
from prisma_core.cli.app import main
from prisma_core.plugin import installed

TOY = "toy:scenes-3l"


@pytest.fixture(scope="module")
def model() -> HookedViT:
    return prisma.load(TOY)


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "scene.png"
    sample_scene(seed=4).image.save(path)
    return str(path)


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command with ``--json`` and return what it wrote."""

    def run(*words: str) -> Any:
        capsys.readouterr()
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_lens_says_what_each_layer_reads(model: HookedViT, image: str, told: Any) -> None:
    found = told("lens", TOY, "--image", image, "--top", "2")
    lens = logit_lens(model, model.preprocess([image]))
    assert [row["layer"] for row in found["layers"]] == list(lens.names("layer"))
    best = lens.sel(layer="final_post", pos="cls", batch=0).top(2, by_size=False)
    assert found["layers"][-1]["cls"] == {place[0]: pytest.approx(value, abs=1e-3) for place, value in best}
    shares = found["layers"][-1]["patches"]
    common = lens.values[-1, 0, 1:].argmax(-1).mode().values.item()
    assert next(iter(shares)) == model.labels[common]  # type: ignore[index]


def test_lens_of_one_class_says_which_patches_read_it(model: HookedViT, image: str, told: Any) -> None:
    found = told("lens", TOY, "--image", image, "--of", "ladybird", "--against", "5")
    lens = logit_lens(model, model.preprocess([image]), "ladybird", against=5)
    patches = lens.values[-1, 0, 1:, 0]
    name = lens.names("pos")[1 + int(patches.argmax())]
    assert found["layers"][-1]["patches"][name] == pytest.approx(patches.max().item(), abs=1e-3)


@pytest.mark.parametrize("by", ["layer", "head", "neuron", "head source"])
def test_attribute_says_what_the_function_returns(model: HookedViT, image: str, told: Any, by: str) -> None:
    found = told("attribute", TOY, "--image", image, "--of", "ladybird", "--against", "bee", "--by", by, "--top", "4")
    result = attribute(model, model.preprocess([image]), "ladybird", against="bee", by=by).sel(batch=0)
    for row, (place, value) in zip(found["top"], result.top(4), strict=True):
        *names, shown = row.values()
        assert (tuple(names), shown) == (place, pytest.approx(value, abs=1e-4))
    assert found["constant"] == [pytest.approx(result.tensors["constant"].item(), abs=1e-4)]


def test_without_a_class_the_highest_logit_is_explained(model: HookedViT, told: Any) -> None:
    found = told("attribute", TOY)
    image = model.preprocess([installed().sources()["toy"].sample("scenes-3l", 0)])
    assert found["classes"] == [model.labels[int(model(image).argmax())]]  # type: ignore[index]


def test_heads_are_those_of_the_function_and_the_result_is_kept(
    model: HookedViT, image: str, told: Any, tmp_path: Path
) -> None:
    kept = tmp_path / "heads.safetensors"
    found = told("heads", TOY, "--image", image, "--image", image, "--top", "1", "--out", str(kept))
    scores = head_scores(model, model.preprocess([image, image]))
    assert found["images"] == 2
    for row in found["kinds"]:
        ((place, value),) = scores.sel(kind=row["kind"]).top(1, by_size=False)
        assert row["heads"] == {"".join(place): pytest.approx(value, abs=1e-3)}
    torch.testing.assert_close(Result.load(kept).values, scores.values)


def test_of_a_model_that_reads_every_token_the_class_they_read_highest_is_explained(told: Any) -> None:
    found = told("attribute", "toy:mae-scenes", "--by", "head", "--top", "2")
    model: Any = prisma.load("toy:mae-scenes")
    image = model.preprocess([installed().sources()["toy"].sample("mae-scenes", 0)])
    assert found["classes"] == [str(int(model(image).mean((0, 1)).argmax()))]
    assert [set(row) for row in found["top"]] == [{"layer", "head", "pos", "class", "value"}] * 2
    assert len(found["constant"]) == len(found["rest"]) == 1


@pytest.mark.parametrize("command", ["lens", "attribute", "heads"])
def test_tables_are_for_people(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, TOY]) == 0
    table = capsys.readouterr().out
    assert TOY in table
    assert {"lens": "final_post", "attribute": "2_mlp_out", "heads": "corner"}[command] in table


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["lens", TOY, "--of", "ladybrid"], "ladybird"),
        (["attribute", TOY, "--by", "heads"], "head source"),
        (["heads", TOY, "--out", "heads.csv"], ".safetensors"),
        (["lens", TOY, "--image", "nowhere.png"], "nowhere.png"),
    ],
)
def test_what_goes_wrong_is_one_line(words: list[str], fact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 1
    error = capsys.readouterr().err
    assert fact in error
    assert "Traceback" not in error


def test_a_dual_encoder_wants_texts(monkeypatch: pytest.MonkeyPatch, told: Any, capsys: Any) -> None:
    clip = planted_dual()
    clip.preprocess = lambda images: marked(1.0)
    monkeypatch.setattr(prisma, "load", lambda reference, **options: clip)
    monkeypatch.setattr("prisma_lens.commands._sample", lambda reference: None)
    found = told("attribute", "planted:dual", "--of", "a bright mark", "--by", "head", "--top", "1")
    assert found["top"][0]["head"] == "H2"
    seen = told("lens", "planted:dual", "--of", "a bright mark", "--of", "a dark mark")
    assert next(iter(seen["layers"][-1]["cls"])) == "a bright mark"
    assert main(["attribute", "planted:dual"]) == 1
    assert "--of" in capsys.readouterr().err
