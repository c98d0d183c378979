"""A training that was killed goes on to the same coder; from a harvest by command to a coder in the model."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prisma_harvest import open_harvest
from prisma_sae import SparseCoder, TrainConfig, checkpoint, evaluate, read, splice, train, training
from torch import Tensor

import prisma_core as prisma
from prisma_core import InputError, LoadError
from prisma_core.cli.app import main

pytest.importorskip("overcomplete.sae", reason="needs pip install 'prisma-interp[sae-train]'")

FORK = multiprocessing.get_context("fork")
KINDS = ["topk", "batchtopk", "jumprelu", "matryoshka", "archetypal"]


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 0.0)


def batches(seed: int = 0) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(64, 6, generator=generator) @ torch.diag(torch.arange(1.0, 7.0)) + 0.5


def config(kind: str = "topk", **options: Any) -> TrainConfig:
    return TrainConfig.model_validate({"kind": kind, "d_sae": 16, "k": 3, "points": 200, "lr": 1e-2, **options})


def killed(path: Path, kind: str, at: int, steps: int = 30) -> None:
    """Train in a process of its own, which is killed behind a step."""

    def work() -> None:
        def kill(step: int, losses: Any) -> None:
            if step == at:
                os.kill(os.getpid(), signal.SIGKILL)

        train(batches(), config(kind), steps=steps, progress=kill, resume=path)

    process = FORK.Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def same(one: SparseCoder, other: SparseCoder) -> bool:
    tensors = other.tensors()
    return one.facts == other.facts and all(torch.equal(x, tensors[name]) for name, x in one.tensors().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_ends_in_the_same_coder(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "training.pt"
    whole = train(batches(), config(kind), steps=30)
    for at in (1, 11, 23):
        killed(path, kind, at)
    steps: list[int] = []
    coder = train(batches(), config(kind), steps=30, resume=path, progress=lambda step, losses: steps.append(step))
    assert steps == list(range(24, 31))
    assert same(coder, whole)
    again = train(batches(), config(kind), steps=30, resume=path, progress=lambda step, losses: steps.append(step))
    assert len(steps) == 7
    assert same(again, whole)


@pytest.mark.parametrize(("part", "kind"), [("optimizer", "topk"), ("schedule", "topk"), ("beside", "batchtopk")])
def test_without_one_part_of_the_state_it_would_be_another_coder(
    part: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(batches(), config(kind), steps=30)
    killed(tmp_path / "training.pt", kind, 24)
    restore = training._Run.restore

    def partly(run: Any, state: Any) -> None:
        fresh = run.state()
        restore(run, {**state, part: fresh[part]})

    monkeypatch.setattr(training._Run, "restore", partly)
    assert not same(train(batches(), config(kind), steps=30, resume=tmp_path / "training.pt"), whole)


def test_several_coders_go_on_together(tmp_path: Path) -> None:
    configs = {"small": config(d_sae=8), "large": config("batchtopk")}

    def stop(step: int, losses: Any) -> None:
        if step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(batches(), configs, steps=20, progress=stop, resume=tmp_path / "training.pt")
    together = train(batches(), configs, steps=20, resume=tmp_path / "training.pt")
    for name, each in configs.items():
        assert same(together[name], train(batches(), each, steps=20))


def test_another_training_other_rows_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "training.pt"
    killed(path, "topk", 9)
    for rows, options, steps in (
        (batches(), config(k=4), 30),
        (batches(), config(), 31),
        (batches(seed=1), config(), 30),
    ):
        with pytest.raises(LoadError, match="another training or other rows"):
            train(rows, options, steps=steps, resume=path)

    def reordered() -> Iterator[Tensor]:
        rows = batches()
        yield next(rows)
        next(rows)
        yield from rows

    with pytest.raises(LoadError, match="order"):
        train(reordered(), config(), steps=30, resume=path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(LoadError, match=r"training\.pt"):
        train(batches(), config(), steps=30, resume=path)
    with pytest.raises(InputError, match=r"\.pt"):
        train(batches(), config(), steps=30, resume=tmp_path / "training.zip")


@pytest.mark.parametrize("change", ["step", "lr", "weight", "beside", "no runs", "a tensor"])
def test_a_training_whose_file_was_changed_is_refused(tmp_path: Path, change: str) -> None:
    """Gone on from, it would end in another coder."""
    path = tmp_path / "training.pt"
    killed(path, "batchtopk", 9)
    kept: Any = torch.load(path, weights_only=False)
    if change == "step":
        kept["step"] = 99
    elif change == "lr":
        kept["runs"][""]["optimizer"]["param_groups"][0]["lr"] = 5.0
    elif change == "weight":
        next(iter(kept["runs"][""]["model"].values())).view(-1)[0] += 1
    elif change == "beside":
        kept["runs"][""]["beside"]["elsewhere/top_k"] = 1
    elif change == "no runs":
        del kept["runs"]
    torch.save(torch.ones(2) if change == "a tensor" else kept, path)
    with pytest.raises(LoadError, match=r"not what was written.*begin anew"):
        train(batches(), config("batchtopk"), steps=30, resume=path)


def test_from_a_harvest_to_a_coder_in_the_model_by_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "blocks.1.hook_resid_post"
    harvests, out, kept = (str(tmp_path / name) for name in ("harvests", "coder", "training.pt"))
    words = ["--data", "samples:24", "--names", "resid_post:1", "--pos", "patches", "--out", harvests]
    assert main(["harvest", "toy:scenes-3l", *words]) == 0
    words = ["--harvest", harvests, "--hook", place, "--d-sae", "64", "--k", "8", "--batch", "512", "--steps", "60"]
    words = ["sae", "train", "toy:scenes-3l", *words, "--lr", "5e-3", "--resume", kept, "--out", out]
    step = training._Run.step
    calls: list[int] = []

    def stopped(run: Any, batch: Tensor) -> float:
        calls.append(1)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return step(run, batch)

    monkeypatch.setattr(training._Run, "step", stopped)
    assert main(words) == 130
    assert not Path(out).exists()
    assert main(words) == 0
    assert len(calls) == 40 + 21  # the step that was stopped is taken again
    coder = read(out)
    assert (coder.facts.model, coder.facts.hook, coder.facts.tokens) == ("toy:scenes-3l", place, "patches")
    whole = str(tmp_path / "whole")
    assert main([*words[: words.index("--resume")], "--out", whole]) == 0
    assert same(read(whole), coder)

    capsys.readouterr()
    assert main(["sae", "eval", out, "-n", "4", "--json"]) == 0
    measures = json.loads(capsys.readouterr().out)
    assert measures["l0"]["here"] <= 8
    assert measures["explained_variance_total"]["here"] > 0.3
    model = prisma.load("toy:scenes-3l")
    rows = next(open_harvest(harvests).rows(place, 144))
    zeros = torch.zeros(1, 3, 96, 96)
    with splice(model, coder):
        _, cache = model.run_with_cache(zeros, names="sae.features")
    assert cache["sae.features", 1].shape == (1, 144, 64)
    assert (cache["sae.features", 1] > 0).sum(-1).max() <= 8
    assert coder(rows.float()).shape == rows.shape
    assert evaluate(model, coder, zeros).facts["tokens"] == 144

    for more, said in ((["--tokens", "all"], "'patches'"), (["--batch", "4000"], "4000")):
        assert main([*words[: words.index("--resume")], *more]) == 1
        assert said in capsys.readouterr().err
    assert main(["sae", "train", "toy:scenes-reg", *words[3 : words.index("--resume")]]) == 1
    assert "weights" in capsys.readouterr().err
