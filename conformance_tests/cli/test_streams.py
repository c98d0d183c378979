"""What a command writes, where: pure JSON, no colours where none are wanted, nothing into a closed pipe."""

from __future__ import annotations

import json
import os
import re
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from prisma_toy import sample_scene

from prisma_core import InputError, LoadError
from prisma_core.cli.app import main
from prisma_core.toolbox import screen

TOY = "toy:scenes-3l"
STYLE = re.compile(r"\x1b\[[0-9;]*m")
ANSWERS = {
    "models": ["models", "--source", "toy"],
    "plugins": ["plugins"],
    "info": ["info", TOY],
    "cite": ["cite", "attribute"],
    "classes": ["classes", "VisionTransformer"],
    "lens": ["lens", TOY],
    "attribute": ["attribute", TOY],
    "heads": ["heads", TOY],
    "patch": ["patch", TOY, "--clean", "s0.png", "--corrupt", "s1.png", "--over", "layer"],
    "harvest info": ["harvest", "info", "acts"],
    "harvest verify": ["harvest", "verify", "acts"],
    "harvest top": ["harvest", "top", "acts", "--name", "resid_post:0"],
    "sae list": ["sae", "list", "scenes"],
    "sae load": ["sae", "load", "scenes-3l"],
    "sae eval": ["sae", "eval", "scenes-3l", "-n", "2"],
}


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with images and a harvest."""
    folder = tmp_path_factory.mktemp("streams")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "photos").mkdir()
        for seed in range(2):
            sample_scene(seed=seed).image.save(folder / f"s{seed}.png")
            sample_scene(seed=seed).image.save(folder / "photos" / f"{seed}.png")
        words = ["harvest", TOY, "--data", "photos", "--names", "resid_post:0", "--out", "acts", "--workers", "0"]
        assert main(words) == 0
        yield folder


@pytest.mark.parametrize("command", ANSWERS)
def test_json_is_all_there_is(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main([*ANSWERS[command], "--json"]) == 0
    out = capsys.readouterr().out
    assert isinstance(json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON")), dict | list)


@pytest.mark.parametrize("command", ["models", "info", "lens", "patch", "harvest info"])
def test_no_colours_where_none_are_wanted(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    capsys.readouterr()
    assert main(ANSWERS[command]) == 0
    styles = STYLE.findall("".join(capsys.readouterr()))
    assert not [style for style in styles if re.search(r"\b(3[0-9]|4[0-9]|9[0-9])\b", style)]


@pytest.mark.parametrize("command", ["models", "lens", "attribute", "heads", "patch", "harvest info"])
def test_on_forty_columns_no_word_is_cut(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(ANSWERS[command]) == 0
    wide = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    assert main(ANSWERS[command]) == 0
    narrow = STYLE.sub("", capsys.readouterr().out)
    assert "…" not in narrow
    assert sorted(re.sub(r"\s", "", wide)) == sorted(re.sub(r"\s", "", narrow))


@pytest.mark.parametrize("command", ["models", "info", "sae list"])
def test_a_reader_who_has_seen_enough_gets_no_traceback(
    command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with TextIOWrapper(os.fdopen(writing, "wb")) as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(ANSWERS[command]) == 1
        monkeypatch.undo()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("words", [["lens", TOY, "--of", ""], ["demo", "--out", ""], ["", "x"]])
def test_an_empty_argument_is_a_variable_that_is_not_set(
    words: list[str], capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    before = sorted(place.rglob("*"))
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"Error: Empty argument {f'behind {words[-2]}' if words[-1] == '' else ''}")
    assert sorted(place.rglob("*")) == before


def test_names_are_no_markup_and_steer_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    name = "[bold]a[/x] :cat: \x1b]0;title\x07\x9b2J"
    rows = screen.table(name, title=name)
    rows.add_row(name)
    screen.show(rows)
    screen.out().print(name)
    screen.note(name, name)
    with screen.working(name):
        pass
    written = "".join(capsys.readouterr())
    assert written.count("[bold]a[/x] :cat: \\x1b]0;title\\x07\\x9b2J") == 6
    assert "\x1b" not in written


@pytest.mark.parametrize("folder", [False, True])
def test_where_a_command_will_write_is_tried_first(tmp_path: Path, folder: bool) -> None:
    (tmp_path / "text.txt").write_text("mine")
    for wrong in ("text.txt/deep/x.html", "x" * 300 + ".html", "a\0b.html", "text.txt" if folder else "."):
        with pytest.raises((InputError, LoadError), match=r"cannot be written|Expected"):
            screen.check_output(tmp_path / wrong, "" if folder else ".html", folder=folder)
    screen.check_output(tmp_path / "new" / "x.html", ".html", folder=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_no_device_is_replaced_by_a_page() -> None:
    with pytest.raises(LoadError, match="what is there is no file"):
        screen.check_output(Path(os.devnull))
