"""Training toy models: repeatable, and the same after a kill as without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from prisma_toy import checkpoints
from prisma_toy.card import MODEL, command, finish
from prisma_toy.config import Config
from prisma_toy.training import Trainer, start
from safetensors.torch import load_file

import prisma_core as prisma
from prisma_core import InputError, LoadError, UnknownName
from prisma_core.cli.app import main
from prisma_core.plugin import holding

SMALL: dict[str, Any] = {
    "data": "circle-position", "layers": 2, "d_model": 16, "heads": 2, "steps": 24, "batch": 4, "seed": 5,
}  # fmt: skip


def train(folder: Path, **options: Any) -> Trainer:
    trainer = start({**SMALL, **options}, folder, resume=False)
    for _ in trainer.run():
        pass
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return train(tmp_path_factory.mktemp("runs") / "unbroken")


def test_a_seed_decides_the_weights(unbroken: Trainer, tmp_path: Path):
    torch.manual_seed(123)  # nobody's business
    assert same(weights(train(tmp_path / "again")), weights(unbroken))
    assert not same(weights(train(tmp_path / "other", seed=6)), weights(unbroken))


def test_training_moves_every_parameter_and_lowers_the_loss(unbroken: Trainer, tmp_path: Path):
    fresh = Trainer(unbroken.config, tmp_path / "fresh")
    before = weights(fresh)
    still = [name for name, tensor in weights(unbroken).items() if torch.equal(tensor, before[name])]
    # Adding the same vector to all keys changes no softmax; its bias moves by rounding alone, or not at all.
    assert not [name for name in still if "qkv" not in name]
    longer = train(tmp_path / "longer", data="circle-size", layers=1, steps=60, batch=16, lr=0.01)
    losses = [row["loss"] for row in checkpoints.log_rows(longer.folder)]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("stop", [1, 7, 23])
def test_a_stopped_run_ends_as_an_unbroken_one(unbroken: Trainer, tmp_path: Path, stop: int):
    folder = tmp_path / "run"
    steps = start(SMALL, folder, resume=False).run(save_every=0)
    for _ in range(stop):
        next(steps)
    steps.close()
    resumed = start({}, folder, resume=True)
    assert resumed.step == stop
    for _ in resumed.run():
        pass
    assert same(weights(resumed), weights(unbroken))
    assert list(checkpoints.log_rows(folder)) == list(checkpoints.log_rows(unbroken.folder))
    assert files(folder) == files(unbroken.folder)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


KILLED = """
import json, os, signal, sys
from pathlib import Path
from prisma_toy.training import start

given, folder, moments = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]

def run(moment):
    when, number = moment.split("-")
    replace, count = os.replace, 0

    def replacing(source, target):
        nonlocal count
        count += 1
        if count == int(number) and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if count == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    if when == "time":
        signal.setitimer(signal.ITIMER_REAL, int(number) / 1000)  # SIGALRM ends a process at once
    else:
        os.replace = replacing
    for _ in start(given, folder / moment, False).run(save_every=0):
        pass

for moment in moments:  # nothing has run yet, so forks are clean, and torch is imported once
    child = os.fork()
    if not child:
        run(moment)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert moment.startswith("time") or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL), moment
"""
TIMES = [f"time-{1 << at}" for at in range(10)]  # in milliseconds, wherever the run is then
MOMENTS = ["before-1", "before-2", "before-3", "after-3", "before-6", "after-11", "before-20", *TIMES]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs killed with SIGKILL just before or just after the n-th time that a file or folder is moved into place."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(SMALL), str(folder), *MOMENTS], capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork and no kill -9")
@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_in_the_middle_of_writing_loses_nothing(unbroken: Trainer, killed: Path, moment: str):
    folder = killed / moment
    assert moment in TIMES or files(folder) != files(unbroken.folder)
    begun = (folder / checkpoints.CONFIG).is_file()
    if not begun:
        assert moment in ("before-1", *TIMES)
        with pytest.raises(LoadError, match="start one without --resume"):
            start({}, folder, resume=True)
    resumed = start({} if begun else SMALL, folder, resume=begun)
    for _ in resumed.run():
        pass
    assert files(folder) == files(unbroken.folder)


def test_a_log_cut_short_is_written_again(unbroken: Trainer, tmp_path: Path):
    folder = tmp_path / "run"
    steps = start(SMALL, folder, resume=False).run(save_every=0, log_every=1)
    for _ in range(9):
        next(steps)
    steps.close()
    log = folder / checkpoints.LOG
    log.write_bytes(log.read_bytes() + b'{"step": 10, "lo')
    resumed = start({}, folder, resume=True)
    for _ in resumed.run(log_every=1):
        pass
    assert [row["step"] for row in checkpoints.log_rows(folder)] == list(range(1, SMALL["steps"] + 1))


def test_checkpoints_are_dense_early_and_load(unbroken: Trainer):
    kept = sorted(path.name for path in (unbroken.folder / checkpoints.CHECKPOINTS).iterdir())
    assert kept == [f"step-{step:06d}" for step in (0, 1, 2, 4, 8, 16, 24)]
    first = prisma.load(f"file:{unbroken.folder / checkpoints.CHECKPOINTS / kept[0]}")
    last = prisma.load(f"file:{unbroken.folder / checkpoints.CHECKPOINTS / kept[-1]}")
    assert same(last.state_dict(), weights(unbroken))
    assert not same(first.state_dict(), weights(unbroken))
    assert last.labels == unbroken.task.labels
    logits, cache = last.run_with_cache(unbroken.task.batch(2, "held-out", 0, 0).image * 2 - 1)
    assert logits.shape == (2, 16)
    assert "blocks.1.attn.hook_pattern" in cache


def test_which_steps_are_kept():
    kept = [step for step in range(5001) if checkpoints.due(step, 5000)]
    assert kept[:9] == [0, 1, 2, 4, 8, 16, 32, 64, 72]
    assert kept[-1] == 5000
    gaps = [right - left for left, right in pairwise(kept[7:-1])]
    assert gaps == sorted(gaps)
    assert len(kept) < 70


def test_a_folder_in_use_is_not_overwritten(unbroken: Trainer):
    before = files(unbroken.folder)
    with pytest.raises(InputError, match="--resume"):
        start(SMALL, unbroken.folder, resume=False)
    with pytest.raises(InputError, match=r"--lr 0\.002"):
        start({"lr": 0.5, "layers": 2}, unbroken.folder, resume=True)
    assert files(unbroken.folder) == before


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"data": "scene"}, UnknownName, "scenes"),
        ({"layers": 0}, InputError, "--layers"),
        ({"lr": -1.0}, InputError, "--lr"),
        ({"d_model": 30, "heads": 4}, InputError, "multiple of heads=4"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(tmp_path: Path, options: dict[str, Any], error: type, says: str):
    with pytest.raises(error, match=says) as caught:
        start(options, tmp_path / "run", resume=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["truncated", "not json", "missing tensor"])
def test_a_damaged_run_is_said(unbroken: Trainer, tmp_path: Path, damage: str):
    folder = tmp_path / "run"
    train(folder, steps=1)
    state = folder / checkpoints.STATE
    if damage == "truncated":
        state.write_bytes(state.read_bytes()[:-40])
    elif damage == "not json":
        (folder / checkpoints.CONFIG).write_text("{")
    else:
        tensors = load_file(state)
        del tensors["model.head.bias"]
        checkpoints.save_state(folder, tensors, {"step": 1})
    with pytest.raises(LoadError):
        start({}, folder, resume=True)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("mlp_ratio", [0.0, 1.5])
def test_with_and_without_norms_and_mlps(tmp_path: Path, norm: bool, mlp_ratio: float):
    trainer = train(tmp_path / "run", steps=2, layers=1, norm=norm, mlp_ratio=mlp_ratio, data="scenes", batch=2)
    points = trainer.model.hook_points()
    assert ("blocks.0.mlp.hook_post" in points) == bool(mlp_ratio)
    assert ("ln_final.hook_scale" in points) == norm
    image = trainer.task.batch(2, "held-out", 0, 0).image * 2 - 1
    logits, cache = trainer.model.run_with_cache(image)
    added = cache["full_embed"] + cache["attn_out", 0] + (cache["mlp_out", 0] if mlp_ratio else 0)
    torch.testing.assert_close(cache["resid_post", 0], added)
    torch.testing.assert_close(trainer.model(image), logits)


def test_patch_loss_is_the_images_loss_plus_the_patches(tmp_path: Path):
    config = Config(data="scenes", layers=1, d_model=16, patch_loss=0.0)
    trainer = Trainer(config, tmp_path / "run")
    batch, objective = trainer.task.batch(4, "train", 0, 0), trainer.task.objective
    loss, right = objective.loss(trainer.model, batch, config)
    both, same = objective.loss(trainer.model, batch, config.model_copy(update={"patch_loss": 1.0}))
    twice, _ = objective.loss(trainer.model, batch, config.model_copy(update={"patch_loss": 2.0}))
    assert torch.equal(right, same)
    assert both > loss
    torch.testing.assert_close(twice - both, both - loss)


def test_bfloat16_trains_float32_weights(tmp_path: Path):
    trainer = train(tmp_path / "run", bf16=True, steps=3)
    assert {tensor.dtype for tensor in weights(trainer).values()} == {torch.float32}
    assert same(weights(train(tmp_path / "again", bf16=True, steps=3)), weights(trainer))
    assert not same(weights(train(tmp_path / "full", steps=3)), weights(trainer))


def test_the_card_says_how_to_make_it_again(tmp_path: Path):
    trainer = train(tmp_path / "tiny", steps=2, mlp_ratio=0.0, norm=False)
    score = finish(trainer, n=50)
    card = (tmp_path / "tiny" / MODEL / "card.md").read_text()
    line = command(trainer.config, "tiny")
    assert line in card
    assert "--attention-only" in line
    assert "--no-norm" in line
    assert "--seed 5" in line
    assert f"{score}" in card
    assert torch.__version__.partition("+")[0] in card
    assert same(prisma.load(f"file:{tmp_path / 'tiny' / MODEL}").state_dict(), weights(trainer))


def test_the_command_trains_resumes_and_explains(tmp_path: Path):
    from prisma_toy.commands import add
    from typer import Typer
    from typer.testing import CliRunner

    app = Typer()
    app.callback()(lambda: None)
    add(app)
    options = ["--data", "circle", "--layers", "1", "--d-model", "8", "--heads", "2", "--steps", "3", "--batch", "2"]
    folder = tmp_path / "run"
    done = CliRunner().invoke(app, ["train", *options, "--out", str(folder)])
    assert done.exit_code == 0, done.output
    assert "Held-out accuracy: " in done.output
    assert (folder / MODEL / "model.safetensors").exists()
    again = CliRunner().invoke(app, ["train", "--out", str(folder), "--resume"])
    assert again.exit_code == 0, again.output
    assert "is finished: all 3 steps" in again.output
    assert "measuring" in done.output
    assert "measuring" not in again.output
    (folder / MODEL / "card.md").unlink()  # killed before it was measured
    assert "after step 3 of 3" in CliRunner().invoke(app, ["train", "--out", str(folder), "--resume"]).output
    refused = CliRunner().invoke(app, ["train", *options, "--out", str(folder)])
    assert isinstance(refused.exception, InputError)
    listed = CliRunner().invoke(app, ["train", "--list"])
    assert "induction" in listed.output


def test_averages_of_a_run_that_goes_on_start_from_its_log(unbroken: Trainer, tmp_path: Path):
    assert checkpoints.recent(tmp_path) == (None, None)
    rows = [json.loads(line) for line in (unbroken.folder / checkpoints.LOG).read_text().splitlines()]
    loss, score = checkpoints.recent(unbroken.folder, rows=2)
    assert loss == pytest.approx((rows[-1]["loss"] + rows[-2]["loss"]) / 2)
    assert score == pytest.approx((rows[-1]["score"] + rows[-2]["score"]) / 2)


def test_threads_are_part_of_the_run_not_of_the_machine(unbroken: Trainer, tmp_path: Path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert same(weights(train(tmp_path / "run")), weights(unbroken))
        assert torch.get_num_threads() == unbroken.config.threads
    finally:
        torch.set_num_threads(before)


def test_a_run_has_one_writer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "run"
    train(folder, steps=1)
    before = files(folder)
    with holding(folder):
        assert main(["train", "--out", str(folder), "--resume"]) == 1
    assert "another process" in capsys.readouterr().err
    assert files(folder) == before


@pytest.mark.parametrize("line", [b"\xff\xfe", b"[]", b'{"loss": 1.0}', b'{"step": "x"}', b"3"])
def test_a_log_with_a_line_that_is_none_is_cut_there(tmp_path: Path, line: bytes):
    folder = tmp_path / "run"
    train(folder, steps=1)
    log = folder / checkpoints.LOG
    log.write_bytes(log.read_bytes() + line + b"\n")
    assert [row["step"] for row in checkpoints.log_rows(folder)] == [1]
    start({}, folder, resume=True)
    assert [json.loads(each)["step"] for each in log.read_text().splitlines()] == [1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_log_on_a_full_disk(tmp_path: Path):
    trainer = start({**SMALL, "steps": 4}, tmp_path, resume=False)
    log = tmp_path / "log.jsonl"
    log.unlink(missing_ok=True)
    log.symlink_to("/dev/full")
    with pytest.raises(LoadError, match=r"log\.jsonl cannot be written: No space left on device.*--resume"):
        list(trainer.run(log_every=1))
    log.unlink()
    assert list(Trainer.resume(tmp_path).run())[-1].step == 4
