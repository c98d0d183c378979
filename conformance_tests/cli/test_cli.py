"""The ``prisma`` command: what it lists, what it says when something is wrong, and that it says it in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, version
from pathlib import Path

import pytest
import torch
from cli_runs import OURS, Run
from rich.console import Console

import prisma_core as prisma
from prisma_core import HookedViT, LoadError
from prisma_core.cli.app import main
from prisma_core.cli.info import _points


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_lists_every_command_in_one_line(run: Run, arguments: tuple[str, ...]) -> None:
    ran = run(*arguments)
    assert (ran.status, ran.err) == (0, [])
    commands = [line.strip("│ ").split(None, 1) for line in ran.out.splitlines() if line.startswith("│")]
    told = {line[0]: line[1] for line in commands if len(line) == 2}
    assert {*OURS, "greet"} <= set(told)
    assert all(told[name].endswith(".") for name in (*OURS, "greet")), "a help text that takes two lines"


def test_the_installed_command_has_the_commands_of_its_plugins(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert all(f"│ {name} " in out for name in (*OURS, "demo", "train"))


@pytest.mark.parametrize("command", OURS)
def test_each_command_has_help(run: Run, command: str) -> None:
    ran = run(command, "--help")
    assert ran.status == 0
    assert f"prisma {command}" in ran.out


def test_version(run: Run) -> None:
    ran = run("--version")
    assert (ran.status, ran.out.strip()) == (0, f"prisma {version('prisma-interp')}")


def test_as_a_program() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "prisma_core.cli.app", "info", "nothing"], capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 1
    said = [line for line in ran.stderr.splitlines() if not line.startswith("waiting for: ")]  # of a slow machine
    assert len(said) == 1
    assert ran.stdout == ""


def test_models(run: Run) -> None:
    ran = run("models")
    assert ran.status == 0
    assert [line.split()[0] for line in ran.out.splitlines()] == ["reference", "tiny:one", "tiny:two"]
    assert ran.err[0] == "models: 2 of 3. 1 more match that no installed adapter takes: --all lists them."
    assert ran.err[1] == "not installed: the source 'hungry': pip install \"prisma[hungry]\""
    assert all(line == line.rstrip() for line in ran.out.splitlines())  # not padded to a screen nobody looks at


def test_tables_are_not_padded_and_leave_out_defaults(run: Run) -> None:
    lines = run("info", "tiny:any").out.splitlines()
    assert all(line == line.rstrip() for line in lines)
    facts = [line.split()[0] for line in lines[: lines.index("")]]
    assert "d_model" in facts
    assert "ln_pre" not in facts  # has none, as by default
    assert not any(line.endswith(("False", "none")) for line in lines)


def test_hook_points_on_a_narrow_screen() -> None:
    """Each name whole, nothing cut."""
    row = {
        "name": "blocks.{0-11}.attn.hook_attn_scores", "axes": "batch head query_pos key_pos",
        "shape": [1, 12, 197, 197], "equation": "q . k * scale", "derived": True,
    }  # fmt: skip
    console = Console(width=80, force_terminal=False)
    with console.capture() as captured:
        console.print(_points([row], narrow=True))
    words = " ".join(captured.get().split())
    for text in (row["name"], "query_pos key_pos", "(1 12 197 197)", "q . k * scale", "(only when asked for by name)"):
        assert text in words
    assert "…" not in words


def test_a_question_has_one_mark(run: Run) -> None:
    assert "?." not in run("modles").err[0]


def test_models_that_no_adapter_takes(run: Run) -> None:
    ran = run("models", "--all")
    assert [line.split()[0] for line in ran.out.splitlines()[1:]] == ["tiny:one", "tiny:two", "tiny:huge"]
    assert "no adapter" in ran.out.splitlines()[3]
    assert ran.err[0] == "models: 3 of 3."
    loads = {info["reference"]: info["loads"] for info in json.loads(run("models", "--all", "--json").out)["models"]}
    assert loads == {"tiny:one": True, "tiny:two": True, "tiny:huge": False}
    alone = run("models", "huge")
    assert (alone.status, alone.out) == (0, "")
    assert "1 more match that no installed adapter takes" in alone.err[0]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("one",), ["tiny:one"]),
        (("SMALL", "tags"), ["tiny:one"]),
        (("t?o",), ["tiny:two"]),
        (("--pretrained",), ["tiny:one"]),
        (("--family", "small*"), ["tiny:one", "tiny:two"]),
        (("--family", "smaller"), ["tiny:two"]),
        (("--source", "tiny", "tw"), ["tiny:two"]),
    ],
)
def test_models_filtered(run: Run, arguments: tuple[str, ...], found: list[str]) -> None:
    answer = json.loads(run("models", "--json", *arguments).out)
    assert [model["reference"] for model in answer["models"]] == found
    assert answer["missing"] == [{"source": "hungry", "install": 'pip install "prisma[hungry]"'}]


def test_plugins(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("broken", "no_such_module_for_tests", "prisma")
    assert run("plugins").status == 0
    ran = run("plugins", more=(broken,))
    assert ran.status == 1
    assert run("plugins", "--json", more=(broken,)).status == 1
    assert "broken: ModuleNotFoundError: No module named 'no_such_module_for_tests'" in ran.out
    assert 'needs pip install "prisma[hungry]"' in ran.out
    told = {info["name"]: info for info in json.loads(run("plugins", "--json", more=(broken,)).out)}
    assert told["greeter"]["error"] is None
    assert told["tiny"]["missing"] == 'pip install "prisma[hungry]"'
    assert told["broken"]["module"] == "no_such_module_for_tests"


def test_info_shows_every_hook_point_as_it_is(run: Run, make: Callable[..., HookedViT]) -> None:
    model = make(scale=True, registers=2)
    _, cache = model.run_with_cache(torch.randn(1, 3, 8, 12), names=list(model.hook_points()))
    answer = json.loads(run("info", "tiny:any", "--json").out)
    shown = {row["name"]: row for row in answer["hook_points"]}
    assert list(shown) == list(model.hook_points())
    for name, point in model.hook_points().items():
        assert shown[name]["shape"] == list(cache[name].shape)
        assert (shown[name]["axes"], shown[name]["equation"]) == (point.axes, point.equation)
        assert len(shown[name]["axes"].split()) == len(shown[name]["shape"])
    assert answer["spec"] == model.spec.model_dump(mode="json")
    assert answer["tokens"]["total"] == 9
    assert answer["parameters"] == sum(parameter.numel() for parameter in make(scale=True, registers=2).parameters())


def test_info_as_tables(run: Run) -> None:
    ran = run("info", "tiny:any")
    assert (ran.status, ran.err) == (0, [])
    assert "9: 1 class token, 2 registers, 2 x 3 patches" in ran.out
    row = next(line for line in ran.out.splitlines() if line.startswith("blocks.{0-1}.attn.hook_pattern"))
    assert "batch head query_pos key_pos" in row
    assert "1 4 9 9" in row
    assert "softmax(attn_scores)" in row


def test_info_filtered(run: Run) -> None:
    rows = json.loads(run("info", "tiny:any", "--json", "--filter", "*hook_z").out)["hook_points"]
    assert [row["name"] for row in rows] == ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
    assert run("info", "tiny:any", "--filter", "z").out.count("hook_z") == 2


def test_info_of_a_saved_model_reads_no_weights(run: Run, vit: HookedViT, tmp_path: Path) -> None:
    folder = prisma.save(vit, tmp_path)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    weights.write_bytes(data[:header] + bytes(len(data) - header))
    with pytest.raises(LoadError):
        prisma.load(f"file:{folder}")
    answer = json.loads(run("info", f"file:{folder}", "--json").out)
    assert answer["spec"] == vit.spec.model_dump(mode="json")


def test_info_of_a_timm_model_needs_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    assert main(["info", "timm:vit_giant_patch14_dinov2", "--json"]) == 0  # 1.1 billion parameters, were they made
    answer = json.loads(capsys.readouterr().out)
    assert answer["parameters"] > 1e9
    shapes = {row["name"]: row["shape"] for row in answer["hook_points"]}
    assert shapes["blocks.39.attn.hook_pattern"] == [1, 24, 1370, 1370]
