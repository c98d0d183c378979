"""``prisma demo``: a page and images of a model, and what it says where there are none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import prisma_view
import pytest
import typer
from labelled import data_of, image_of, model, two_heads

import prisma_core as prisma
from prisma_core import HookedViT, PluginError, TokenLayout
from prisma_core.cli.app import main
from prisma_core.inputs import Preprocess
from prisma_core.inputs.video import VideoPreprocess
from prisma_core.spec import (
    DualSpec,
    EmbedSpec,
    TextSpec,
)
from prisma_core.transformer import build


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"file:{prisma.save(model(), tmp_path_factory.mktemp('model'))}"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("images")
    image_of(1).convert("P").save(folder / "one.gif")
    image_of(2).convert("RGBA").save(folder / "two.png")
    return folder / "one.gif", folder / "two.png"


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


ALL = {"index.html", "lens.png", "attention.png", "attribution.png", "patching.png"}


def options_of(saved: str, images: tuple[Path, Path], out: Path) -> list[str]:
    return ["--model", saved, "--image", str(images[0]), "--other", str(images[1]), "--out", str(out)]


def test_demo_of_a_users_own_images(
    saved: str, images: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    assert main(["demo", "--no-open", *options_of(saved, images, out)]) == 0
    assert files(out) == ALL
    told = capsys.readouterr().out
    assert str(out / "index.html") in told
    assert " sees: " in told


def test_a_page_that_is_not_prismas_stays(
    saved: str, images: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "index.html"
    page.write_text("<title>My thesis on Prisma</title>", encoding="utf-8")
    assert main(["demo", "--no-open", *options_of(saved, images, tmp_path)]) == 1
    assert "give another folder with --out" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == "<title>My thesis on Prisma</title>"
    page.unlink()
    for _ in range(2):  # its own are replaced
        assert main(["demo", "--no-open", *options_of(saved, images, tmp_path)]) == 0


def test_demo_without_options_needs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--no-open"]) == 0
    assert files(tmp_path / "prisma-demo") == ALL
    data = data_of(tmp_path / "prisma-demo" / "index.html")
    assert data["patching"]["kept"] != data["patching"]["put"]


def test_demo_of_a_timm_model(images: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="needs timm: pip install 'prisma-interp[timm]'")
    given = options_of("timm:test_vit", images, tmp_path)
    assert main(["demo", "--no-pretrained", "--no-open", *given]) == 0
    assert files(tmp_path) == ALL
    assert "untrained weights" in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--other", "text.png"], "text.png"),
        (["--model", "toy:nothing"], "nothing"),
        (["--model", "nonsense"], "not a reference"),
        (["--out", "text.png"], "text.png cannot be written"),
    ],
)
def test_demo_says_what_is_wrong_in_one_line(
    options: list[str],
    says: str,
    saved: str,
    images: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no image")
    assert main(["demo", "--no-open", *options_of(saved, images, tmp_path / "out"), *options]) == 1
    told = capfd.readouterr()
    assert says in told.err
    assert len([line for line in told.err.splitlines() if line.strip()]) == 1
    assert told.out == ""


def test_the_page_opens_only_where_someone_looks(
    saved: str, images: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    given = options_of(saved, images, tmp_path)
    assert main(["demo", *given]) == 0
    assert opened == []
    assert main(["demo", *given, "--open"]) == 0
    assert opened == [(tmp_path / "index.html").resolve().as_uri()]


def test_a_missing_library_is_said_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("prisma_view.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "emoji", None)
    with pytest.raises(PluginError, match=r'emoji.*pip install "prisma-interp\[view\]"'):
        _ = prisma_view.report


def test_the_command_joins_any_typer_application() -> None:
    app = typer.Typer()
    prisma_view.prisma_commands(app)
    names = [command.callback.__name__ for command in app.registered_commands if command.callback]
    assert names == ["demo", "attention", "report", "gallery"]


@pytest.mark.parametrize("option", ["--image", "--other"])
def test_an_image_that_is_missing_leaves_no_folder(option: str, saved: str, tmp_path: Path) -> None:
    assert main(["demo", "--model", saved, option, str(tmp_path / "missing.png"), "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_random_weights_are_told_in_the_terminal(
    images: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["--image", str(images[0]), "--other", str(images[1]), "--out", str(tmp_path), "--no-open"]
    assert main(["demo", "--model", "toy:dsprites-attn-1l", "--no-pretrained", *names]) == 0
    assert "Random weights: toy:dsprites-attn-1l was not trained" in " ".join(capsys.readouterr().err.split())
    assert "untrained weights" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_what_the_page_lacks_is_told_in_the_terminal(
    images: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = prisma.save(two_heads(), tmp_path / "model")
    assert main(["demo", "--no-open", *options_of(f"file:{kept}", images, tmp_path / "out")]) == 0
    assert files(tmp_path / "out") == ALL - {"lens.png"}
    told = capsys.readouterr().err
    assert "Without: lens.png: This model reads 2 tokens" in told
    assert told.count("Without") == 1


def towers() -> prisma.HookedModel:
    text = TextSpec.plain(n_ctx=4, n_vocab=9, blocks=model().spec.blocks[:1], ln_final=None, n_classes=5)
    return build(DualSpec(vision=model().spec, text=text))


def films() -> HookedViT:
    made = model(embed=EmbedSpec(patch=(8, 8), tubelet=1), layout=TokenLayout(cls=1, frames=2, rows=2, columns=3))
    made.preprocess = VideoPreprocess(frames=2, each=Preprocess(size=(16, 24)))
    return made


@pytest.mark.parametrize(
    ("made", "says"),
    [(towers, "takes words to tell apart"), (films, "Leave it out")],
)
def test_what_only_another_kind_takes_is_refused(
    made: Any, says: str, images: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = prisma.save(made(), tmp_path / "model")
    given = ["--model", f"file:{kept}", "--image", str(images[0]), "--out", str(tmp_path / "out")]
    other = ["--other", str(images[1])] if made is films else []
    assert main(["demo", "--no-open", *given, *other]) == 1
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_models_without_canonical_form_have_the_page_of_their_insides(
    images: tuple[Path, Path], tmp_path: Path
) -> None:
    pytest.importorskip("timm", reason="needs timm: pip install 'prisma-interp[timm]'")
    given = ["--model", "timm:test_convnext", "--image", str(images[0]), "--out", str(tmp_path / "out")]
    assert main(["demo", "--no-pretrained", "--no-open", *given]) == 0
    assert "untrained weights" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_a_vision_tower_by_itself_has_a_report() -> None:
    dual = towers()
    dual.preprocess = Preprocess(size=(16, 24))
    found = prisma_view.report(dual.vision, image_of(1), image_of(2))
    assert found.lens is not None
    assert found.heads is not None
