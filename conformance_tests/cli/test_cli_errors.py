"""Bad input, broken plugins and failed checks at the command line."""

from __future__ import annotations

import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import typer
from cli_runs import Ran, Run, entry

from prisma_core import hookimpl

# ---------------------------------------------------------------- check and doctor


@pytest.fixture
def with_timm(run: Run) -> Run:
    pytest.importorskip("timm")

    def with_timm(*arguments: str) -> Ran:
        return run(*arguments, more=(EntryPoint("timm", "prisma_timm", "prisma"),))

    return with_timm


def test_check(with_timm: Run, tmp_path: Path) -> None:
    file = tmp_path / "certificate.json"
    ran = with_timm("check", "tiny:upstream", "--checks", "weights.*", "--device", "cpu", "--json", str(file))
    assert ran.status == 0, ran.err
    assert "passed" in ran.out
    answer = json.loads(file.read_text())
    assert answer["upstream"] == "timm.models.vision_transformer.VisionTransformer"
    assert {result["name"].split(".")[0] for result in answer["results"]} == {"weights"}
    assert all(result["passed"] for result in answer["results"])
    assert ran.err[-1].startswith("passed: ")


def test_doctor(with_timm: Run) -> None:
    ran = with_timm("doctor", "tiny:upstream")
    assert (ran.status, ran.err) == (0, [])
    assert "agree with upstream" in ran.out


def test_check_that_fails(with_timm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from prisma_timm.canonical.vision_transformer import VisionTransformerAdapter

    spec = VisionTransformerAdapter.spec

    def wrong(self: Any, upstream: Any) -> Any:
        found = spec(self, upstream)
        return found.model_copy(update={"ln_final": found.ln_final.model_copy(update={"eps": 0.1})})

    monkeypatch.setattr(VisionTransformerAdapter, "spec", wrong)
    ran = with_timm("check", "tiny:upstream", "--checks", "parity.logits")
    assert ran.status == 1
    assert "FAILED" in ran.out
    assert ran.err == [
        "running: tiny:upstream: parity.logits",
        "Error: 1 of 1 checks failed. `prisma doctor tiny:upstream` looks for the cause.",
    ]
    ran = with_timm("doctor", "tiny:upstream")
    assert ran.status == 1
    assert "ln_final" in ran.out


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (("chek",), 2, "No such command 'chek'"),
        (("info",), 2, "Missing argument"),
        (("info", "tiny:one", "--bogus"), 2, "No such option"),
        (("info", "tiny:one", "two"), 2, "unexpected extra argument"),
        (("info", "nothing"), 1, "'nothing' is not a reference"),
        (("info", "tony:one"), 1, "No source 'tony'. Sources: tiny, hungry, file. Did you mean tiny?"),
        (("info", "hungry:one"), 1, 'which is not installed: pip install "prisma[hungry]"'),
        (("info", "tiny:unreadable"), 1, "One line, and another."),
        (("info", "tiny:one", "--filter", "patern"), 1, "Did you mean pattern"),
        (("info", "file:/no/such/folder"), 1, "holds no spec.json"),
        (("models", "tiny:ona"), 1, "No model matches. Did you mean tiny:one"),
        (("models", "--family", "smal"), 1, "No family 'smal'. Did you mean small"),
        (("check", "file:somewhere"), 1, "was saved hooked: there is no upstream"),
        (("check", "tiny:one"), 1, "This model came hooked, from no library"),
        (("models", "--source", "tony"), 1, "Did you mean tiny?"),
        (("check", "nothing"), 1, "'nothing' is not a reference"),
        (("check", "tiny:upstream", "--checks", "parity.logit"), 1, "Did you mean parity.logits"),
        (("check", "tiny:upstream", "--device", "abacus"), 1, "got 'abacus'; there is cpu"),
        (("doctor", "tony:one"), 1, "Did you mean tiny?"),
        (("greet", "bug"), 1, "unexpected ZeroDivisionError: oh no"),
    ],
)
def test_bad_input_is_one_line_and_never_a_traceback(
    run: Run, arguments: tuple[str, ...], status: int, told: str
) -> None:
    ran = run(*arguments)
    assert ran.status == status
    assert len(ran.err) == 1, ran.err
    assert ran.err[0].startswith("Error: ")
    assert told in ran.err[0]
    assert "Traceback" not in ran.out


def test_an_interrupt_is_one_word(run: Run) -> None:
    ran = run("greet", "stop")
    assert (ran.status, ran.err) == (130, ["Error: interrupted."])


@pytest.mark.parametrize("arguments", [("--debug", "info", "nothing"), ("info", "nothing", "--debug")])
def test_debug_shows_the_traceback(run: Run, arguments: tuple[str, ...]) -> None:
    ran = run(*arguments)
    assert ran.status == 1
    assert ran.err[0] == "Traceback (most recent call last):"
    assert ran.err[-1].startswith("Error: 'nothing' is not a reference")


def test_debug_behind_two_dashes_is_an_argument(run: Run) -> None:
    assert run("greet", "--", "--debug").out == "hello --debug\n"


def test_a_broken_plugin_is_one_line_and_the_rest_works(run: Run) -> None:
    broken = EntryPoint("broken", "no_such_module_for_tests", "prisma")
    ran = run("greet", "you", more=(broken,))
    assert (ran.status, ran.out) == (0, "hello you\n")
    assert ran.err == [
        "plugin left out: broken (unknown distribution): "
        "ModuleNotFoundError: No module named 'no_such_module_for_tests'"
    ]


def test_commands_of_two_plugins_that_clash(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    @hookimpl
    def theirs(app: typer.Typer) -> None:
        app.command("greet")(lambda: None)
        app.command("info")(lambda: None)
        app.command("other")(lambda: sys.stdout.write("other\n") and None)

    ran = run("greet", "you", more=(entry(monkeypatch, "rival", prisma_commands=theirs),))
    assert (ran.status, ran.out) == (0, "hello you\n")
    assert ran.err == [
        "plugin left out: rival (unknown distribution): the command 'greet' is taken by the plugin 'greeter'"
    ]
    assert run("other", more=(entry(monkeypatch, "rival", prisma_commands=theirs),)).out == "other\n"


def test_a_plugin_whose_commands_fail_to_join(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(app: typer.Typer) -> None:
        raise RuntimeError("no commands today")

    ran = run("greet", "you", more=(entry(monkeypatch, "grumpy", prisma_commands=fails),))
    assert (ran.status, ran.out) == (0, "hello you\n")
    assert "prisma_commands: RuntimeError: no commands today" in ran.err[0]


@pytest.mark.parametrize("nonsense", [None, [None], ["greet"], 3])
def test_a_plugin_that_leaves_nonsense_among_the_commands(
    run: Run, monkeypatch: pytest.MonkeyPatch, nonsense: Any
) -> None:
    def breaks(app: typer.Typer) -> None:
        app.registered_commands = nonsense

    ran = run("greet", "you", more=(entry(monkeypatch, "vandal", prisma_commands=breaks),))
    assert (ran.status, ran.out) == (0, "hello you\n")
    assert "vandal (unknown distribution): its commands cannot be read: " in ran.err[0]


@pytest.mark.parametrize("group", ["sae", "harvest"])
def test_a_group_without_a_command_says_what_it_expects(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    from prisma_core.cli.app import main

    pytest.importorskip(f"prisma_{group}")
    assert main([group]) == 2
    shown = capsys.readouterr()
    assert "Error: Expected a command" in shown.err
    assert f"prisma {group} --help" in shown.err
