"""Every option of every command with wrong values: one sentence, nothing on stdout, no file lost and none left.

The commands and their options are read off the command itself: a new one fails here until it has a call that works.
What an option takes beside is listed (``TAKES``); a value that is taken and not listed is a fault, as is one refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import pytest
import typer
from prisma_toy import sample_scene

from prisma_core import host
from prisma_core.cli.app import build, main

TOY = "toy:scenes-3l"
TIMM = "timm:vit_tiny_patch16_224"
POINT = ["--name", "resid_post:0"]
# A call of each command that works in the folder of the tests.
CALLS: dict[str, list[str]] = {
    "models": ["--source", "toy"],
    "plugins": [],
    "info": [TOY],
    "cite": ["attribute"],
    "check": [TIMM, "--checks", "weights.accounted", "--device", "cpu"],
    "doctor": [TIMM, "--device", "cpu"],
    "classes": ["VisionTransformer"],
    "new-plugin": ["acme"],
    "lens": [TOY, "--of", "1", "--against", "2"],
    "attribute": [TOY],
    "heads": [TOY],
    "patch": [TOY, "--clean", "s0.png", "--corrupt", "s1.png", "--over", "layer"],
    "registers": [TOY, "s0.png"],
    "train": ["--steps", "1", "--layers", "1", "--d-model", "8", "--heads", "2"],
    "demo": ["--no-open"],
    "attention": [TOY, "--no-open"],
    "report": [TOY],
    "gallery": ["top.safetensors", "--data", "photos", "--no-open"],
    "harvest top": ["acts", *POINT],
    "harvest write": [TOY, "--data", "photos", "--names", "resid_post:0", "--out", "new", "--workers", "0"],
    "harvest info": ["acts"],
    "harvest verify": ["acts"],
    "sae list": ["scenes"],
    "sae load": ["scenes-3l"],
    "sae eval": ["scenes-3l", "-n", "2"],
    "sae train": [
        TOY,
        "--hook",
        "blocks.1.hook_resid_post",
        "--steps",
        "1",
        "--d-sae",
        "8",
        "--k",
        "2",
        "--batch",
        "16",
    ],
}
# Of options that need others than the call has: what stands in its place.
OTHER: dict[str, list[str]] = {
    "harvest top --pos": [TOY, *POINT, "--data", "photos"],
    "harvest top --batch": [TOY, *POINT, "--data", "photos"],
    "harvest top --limit": [TOY, *POINT, "--data", "photos"],
    "harvest top --workers": [TOY, *POINT, "--data", "photos"],
    "harvest top --on-error": [TOY, *POINT, "--data", "photos"],
    "harvest top --device": [TOY, *POINT, "--data", "photos"],
    "harvest top --data": [TOY, *POINT],
    "sae eval -n": ["scenes-3l"],
}
INTEGERS, FLOATS = ("-9999", "1.5", "nan"), ("-9999", "nan", "x")
READ = ("nowhere", "nothing", "text.txt", "x" * 300, "[/x]")  # no file, an empty folder, a file of another kind
FILES = ("text.txt/x.ENDING", "folder.ENDING", "x" * 300 + ".ENDING", "/proc/nowhere/x.ENDING", "text.txt")
FOLDERS = ("text.txt", "text.txt/x", "x" * 300, "/proc/nowhere")
TEXTS = ("[/x]nonsense", "-99", "x" * 300)
WRITTEN = {"out", "folder", "json", "resume"}
# What else an option takes, by command and option.
TAKES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(["patch --pos", "harvest top --pos", "harvest write --pos"], ("-99",)),  # of 145
    "harvest write --data-name": TEXTS,
}


def callbacks(app: typer.Typer, before: str = "") -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield every command's name and function, groups opened."""
    for one in app.registered_commands:
        function = cast("Callable[..., Any]", one.callback)
        yield f"{before}{one.name or function.__name__.replace('_', '-')}", function
    for group in app.registered_groups:
        yield from callbacks(cast(typer.Typer, group.typer_instance), f"{before}{group.name} ")


COMMANDS = dict(callbacks(build(host.installed())))


def options(command: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each option of a command that takes a value, and wrong ones; of an argument its place: 0, 1."""
    place = -1
    for name, hint in get_type_hints(COMMANDS[command], include_extras=True).items():
        kind, *about = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
        text = str(kind)
        about = next((one for one in about if hasattr(one, "param_decls")), None)
        if about is None or "bool" in text:
            continue
        if name == "ray":  # each tries to reach a cluster, for half a minute
            yield "--ray", TEXTS[:1]
            continue
        place += (is_argument := type(about).__name__ == "ArgumentInfo")
        option = str(place) if is_argument else (about.param_decls or [f"--{name.replace('_', '-')}"])[0]
        if "Path" in text and name in WRITTEN:
            folder = command in ("demo", "gallery", "train", "harvest write", "sae load", "sae train", "new-plugin")
            ending = {"json": "json", "resume": "pt"}.get(name, "html")
            ending = "safetensors" if command in ("lens", "attribute", "heads", "patch", "harvest top") else ending
            yield option, FOLDERS if folder and name != "resume" else tuple(e.replace("ENDING", ending) for e in FILES)
        else:
            yield (
                option,
                INTEGERS if "int" in text else FLOATS if "float" in text else READ if "Path" in text else TEXTS,
            )


CASES = [(command, option) for command in COMMANDS for option, _ in options(command)]


def line(command: str, option: str, value: str) -> list[str]:
    """Return a command line with a value in the place of an option or argument."""
    call = OTHER.get(f"{command} {option}", CALLS[command])
    if option.isdecimal():
        at = int(option)
        return [*command.split(), *call[:at], value, *call[at + 1 :]]
    words = [*command.split(), *call]
    if option in words:
        at = words.index(option)
        return [*words[: at + 1], value, *words[at + 2 :]]
    return [*words, option, value]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with images, a harvest, a search of it, and what is none of these."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "photos").mkdir()
    for seed in range(2):
        sample_scene(seed=seed).image.save(folder / f"s{seed}.png")
        shutil.copy(folder / f"s{seed}.png", folder / "photos")
    for name in ("nothing", "folder.html", "folder.json", "folder.safetensors", "folder.pt"):
        (folder / name).mkdir()
    (folder / "text.txt").write_text("mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        written = ["harvest", TOY, "--data", "photos", "--names", "resid_post:0", "--out", "acts", "--workers", "0"]
        assert main(written) == 0
        assert main(["harvest", "top", "acts", *POINT, "--out", "top.safetensors"]) == 0
        yield folder


def tree(folder: Path) -> dict[str, int]:
    """Return every file and folder with its size."""
    return {str(path): path.stat().st_size if path.is_file() else 0 for path in folder.rglob("*")}


def test_every_command_is_tried() -> None:
    assert set(COMMANDS) == set(CALLS)


@pytest.mark.parametrize(("command", "option"), CASES)
def test_a_wrong_value_is_one_sentence(
    command: str, option: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong: list[str] = []
    taken = TAKES.get(f"{command} {option}", ())
    for value in dict(options(command))[option]:
        before = tree(place)
        capsys.readouterr()
        status = main(line(command, option, value))
        out, err = capsys.readouterr()
        lines = [each for each in err.splitlines() if not each.startswith("running: ")]
        after = tree(place)
        if lost := [name for name, size in before.items() if after.get(name) != size and Path(name).is_file()]:
            wrong.append(f"{value}: {lost} lost")
        if (status == 0) != (value in taken):
            wrong.append(f"{value}: {status}, {'listed' if value in taken else 'not listed'}: {err}")
        elif status:
            if len(lines) != 1 or not lines[0].startswith("Error: ") or out or "this is a bug" in err:
                wrong.append(f"{value}: {status} {lines} {out[:80]}")
            if left := set(after) - set(before):
                wrong.append(f"{value}: left {left}")
        for name in sorted(set(after) - set(before), reverse=True):
            Path(name).rmdir() if Path(name).is_dir() else Path(name).unlink()
    assert not wrong, "\n".join(wrong)
