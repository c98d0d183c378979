"""The ``prisma`` command: what it lists, what it says when something is wrong, and that it says it in one line."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable, Collection, Iterator
from importlib.metadata import EntryPoint, version
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console

import prisma_core as prisma
from prisma_core import HookedViT, LoadError, hookimpl
from prisma_core import host as plugins
from prisma_core.cli.app import main
from prisma_core.cli.info import _points
from prisma_core.contract.source import Loaded, ModelInfo, Source
from prisma_core.host import Host

OURS = ("models", "plugins", "info", "check", "doctor")
Run = Callable[..., "Ran"]


class Ran:
    """What a command left: exit status, stdout, and the lines of stderr."""

    def __init__(self, status: int, out: str, err: str):
        self.status, self.out, self.err = status, out, err.splitlines()


class Tiny(Source):
    name = "tiny"

    def __init__(self, model: HookedViT):
        self.model = model

    def load(self, rest: str, **options: Any) -> Loaded:
        if rest == "unreadable":
            raise LoadError("One line,\nand another.")
        if rest == "upstream":
            timm = pytest.importorskip("timm")
            kind = timm.models.vision_transformer.VisionTransformer
            return Loaded(kind(img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=2, num_classes=5))
        return Loaded(self.model)

    def models(self) -> Iterator[ModelInfo]:
        yield ModelInfo("tiny:one", "small", pretrained=True, note="tags: a, b")
        yield ModelInfo("tiny:two", "smaller", pretrained=False)
        yield ModelInfo("tiny:huge", "large", pretrained=False)

    def loadable(self, rests: Collection[str]) -> Collection[str] | None:
        return set(rests) - {"huge"}


class Hungry(Source):
    name, library, install = "hungry", "no_such_library_for_tests", 'pip install "prisma[hungry]"'

    def load(self, rest: str, **options: Any) -> Loaded: ...

    def models(self) -> Iterator[ModelInfo]:
        raise AssertionError("asked for models without its library")


def greet(name: str) -> None:
    """Greet somebody."""
    if name == "bug":
        raise ZeroDivisionError("oh\nno")
    if name == "stop":
        raise KeyboardInterrupt
    print(f"hello {name}")  # noqa: T201


@hookimpl
def prisma_commands(app: typer.Typer) -> None:
    app.command()(greet)


def entry(monkeypatch: pytest.MonkeyPatch, name: str, **hooks: Callable[..., Any]) -> EntryPoint:
    module = types.ModuleType(f"cli_plugin_for_tests_{name}")
    for hook, function in hooks.items():
        setattr(module, hook, hookimpl(function))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return EntryPoint(name, module.__name__, "prisma")


@pytest.fixture
def run(vit: HookedViT, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    found = [
        EntryPoint("conformance", "prisma_conformance.command", "prisma"),
        entry(monkeypatch, "tiny", prisma_sources=lambda: [Tiny(vit), Hungry()]),
        entry(monkeypatch, "greeter", prisma_commands=prisma_commands),
    ]

    def run(*arguments: str, more: tuple[EntryPoint, ...] = ()) -> Ran:
        host = Host([*found, *more])
        monkeypatch.setattr(plugins, "_host", host)
        monkeypatch.setattr("prisma_core.cli.app.installed", lambda: host)
        status = main(arguments)
        return Ran(status, *capsys.readouterr())

    return run


# ---------------------------------------------------------------- what it lists


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
        (("check", "tiny:upstream", "--device", "abacus"), 1, "No device 'abacus' here; there is cpu"),
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


def test_an_interrupt_is_quiet(run: Run) -> None:
    ran = run("greet", "stop")
    assert (ran.status, ran.err) == (130, [])


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
