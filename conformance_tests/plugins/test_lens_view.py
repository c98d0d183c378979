"""prisma_view without a browser: emoji, packing, the page's text, PNG files and the demo command."""

from __future__ import annotations

import base64
import json
import re
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import prisma_view
import pytest
import torch
import typer
from PIL import Image
from prisma_lens import Lens
from prisma_view import glyphs
from prisma_view.colours import CLASSES, QUIET, REST, assign
from prisma_view.pack import grouped, pack, pack_patterns
from prisma_view.pictures import BAND, WARNING, _legend
from prisma_view.symbols import FALLBACK, symbol

import prisma_core as prisma
from prisma_core import HookedViT, InputError, ModelSpec, NotApplicable, PluginError, TokenLayout
from prisma_core.cli.app import main
from prisma_core.inputs import Preprocess
from prisma_core.inputs.video import VideoPreprocess
from prisma_core.spec import (
    AttentionSpec,
    BlockSpec,
    DualSpec,
    EmbedSpec,
    MlpSpec,
    NormSpec,
    PoolSpec,
    TextPoolSpec,
    TextSpec,
)
from prisma_core.transformer import build

LABELS = ("🔴 red circle", "🟦 blue square", "tabby, tabby cat", "<script>&", "qwertyuiop")


def model(**facts: Any) -> HookedViT:
    torch.manual_seed(5)
    block = BlockSpec(
        attn=AttentionSpec(n_heads=2, n_kv_heads=2, d_head=6, scale=0.4), mlp=MlpSpec(d_mlp=16, act="gelu"),
        ln1=NormSpec(eps=1e-5), ln2=NormSpec(eps=1e-5),
    )  # fmt: skip
    spec = ModelSpec(
        **{
            "d_model": 12, "image_size": (16, 24), "embed": EmbedSpec(patch=(8, 8)), "blocks": (block,) * 2,
            "layout": TokenLayout(cls=1, rows=2, columns=3), "ln_final": NormSpec(eps=1e-5),
            "pool": PoolSpec(kind="token"), "d_pool": 12, "n_classes": len(LABELS), **facts,
        }
    )  # fmt: skip
    made = HookedViT(spec).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    made.preprocess = Preprocess(size=(16, 24))
    made.labels = LABELS
    return made


def two_heads() -> HookedViT:
    """Return a model that reads two tokens with a head each, so there is no one head to look through."""
    return model(n_heads_out=2, layout=TokenLayout(cls=1, distillation=1, rows=2, columns=3))


def picture(seed: int) -> Image.Image:
    blocks = np.random.default_rng(seed).choice([0, 255], (2, 3, 3)).astype(np.uint8)
    return Image.fromarray(blocks.repeat(20, axis=0).repeat(20, axis=1))


def unpacked(packed: dict[str, Any]) -> np.ndarray:
    raw = zlib.decompress(base64.b64decode(packed["data"]))
    return np.frombuffer(raw, packed["type"]).reshape(packed["shape"])


def data_of(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


# -------------------------------------------------------------------- emoji


@pytest.mark.parametrize(
    ("label", "emoji", "name"),
    [
        ("🔴 red circle", "🔴", "red circle"),
        ("zebra", "🦓", "zebra"),
        ("tiger cat", "🐈", "tiger cat"),
        ("tabby, tabby cat", "🐈", "tabby"),
        ("golden retriever", "🐕", "golden retriever"),
        ("Old English sheepdog, bobtail", "🐕", "Old English sheepdog"),
        ("hair spray", FALLBACK, "hair spray"),
        ("qwertyuiop", FALLBACK, "qwertyuiop"),
        ("", FALLBACK, ""),
        ("🍕", "🍕", "🍕"),
    ],
)
def test_a_label_finds_its_emoji(label: str, emoji: str, name: str) -> None:
    assert symbol(label) == (emoji, name)


def test_most_of_imagenet_has_an_emoji() -> None:
    data = pytest.importorskip("timm.data", reason="needs timm: pip install 'prisma-interp[timm]'")
    info = data.ImageNetInfo("imagenet-1k")
    found = [symbol(info.index_to_description(index)).emoji for index in range(info.num_classes())]
    assert sum(emoji != FALLBACK for emoji in found) >= 700
    assert len(set(found)) > 200
    assert {found[index] for index in (207, 235, 254)} == {"🐕"}  # retriever, shepherd, pug


def test_classes_get_the_nearest_colour_left() -> None:
    looks = {3: CLASSES[2], 5: CLASSES[2], 8: (190, 190, 190)}
    given = assign([3, 5, 8, 9], looks.get)
    assert given[3] == CLASSES[2]
    assert given[8] == QUIET
    assert len(set(given.values())) == 4


# -------------------------------------------------------------------- packing


def test_what_is_packed_comes_out_again() -> None:
    array = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    packed = pack(array)
    assert packed["type"] == "float32"
    np.testing.assert_array_equal(unpacked(packed), array)


@pytest.mark.parametrize("size", [7, 60])
def test_packed_patterns_are_near_the_true_ones(size: int) -> None:
    pattern = (torch.randn(2, 3, size, size) * 3).softmax(-1)
    packed = pack_patterns(pattern)
    weights = (unpacked(packed["share"]) / packed["steps"]) ** 2 * unpacked(packed["top"])[..., None]
    np.testing.assert_allclose(weights, pattern, atol=float(pattern.max()) * 1.1 / packed["steps"])


def test_patterns_that_need_much_room_get_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = torch.randn(2, 3, 40, 40).softmax(-1)
    fine = pack_patterns(pattern)
    assert fine["steps"] == 255
    room = len(fine["share"]["data"]) // 2
    monkeypatch.setattr("prisma_view.pack.ROOM", room)
    coarse = pack_patterns(pattern)
    assert coarse["steps"] < 255
    assert len(coarse["share"]["data"]) <= room


def test_grouping_patches_sums_keys_and_averages_queries() -> None:
    layout = TokenLayout(cls=1, registers=1, rows=5, columns=4)
    pattern = torch.randn(2, 3, 22, 22, dtype=torch.float64).softmax(-1)
    same, _, side = grouped(pattern, layout, budget=10**6)
    assert side == 1
    assert same is pattern
    small, coarse, side = grouped(pattern, layout, budget=2 * 3 * 8 * 8)
    assert (side, coarse.rows, coarse.columns, small.shape) == (2, 3, 2, (2, 3, 8, 8))
    torch.testing.assert_close(small.sum(-1), torch.ones(2, 3, 8, dtype=torch.float64))
    corner = [2 + row * 4 + column for row in (0, 1) for column in (2, 3)]
    bottom = [2 + 16, 2 + 17]
    expected = pattern[:, :, corner][..., bottom].sum(-1).mean(-1)
    torch.testing.assert_close(small[:, :, 2 + 1, 2 + 4], expected)
    torch.testing.assert_close(small[:, :, :2, :2], pattern[:, :, :2, :2])
    assert grouped(pattern, layout, budget=1)[1].n_patches == 1


# -------------------------------------------------------------------- page and pictures


@pytest.fixture(scope="module")
def found() -> prisma_view.Report:
    return prisma_view.report(model(), picture(1), picture(2))


def test_the_page_holds_what_the_model_computes(tmp_path: Path) -> None:
    made = model()
    found = prisma_view.report(made, picture(1), picture(2))
    page = prisma_view.write_page(found, tmp_path / "page.html")
    data = data_of(page)
    logits = made(made.preprocess(picture(1)))[0].detach()
    assert data["top"][0][0] == int(logits.argmax())
    assert data["top"][0][1] == pytest.approx(float(logits.max()), abs=1e-3)
    parts = np.array(data["layers"]["values"]).sum(0) + np.array(data["layers"]["constant"])
    np.testing.assert_allclose(parts, logits[found.shown], atol=0.01)
    heads = np.array(data["heads"]["values"]).sum((0, 1)) + np.array(data["heads"]["rest"])
    np.testing.assert_allclose(heads, logits[found.shown], atol=0.01)
    lens = unpacked(data["lens"]["logits"])
    assert lens.shape == (3, 7, 3)
    assert lens[-1, 0, 0] == pytest.approx(float(logits.max()), abs=0.01)
    assert set(data["patching"]["change"]) == {"all", "cls"}


def test_the_page_is_one_file_and_labels_stay_text(found: prisma_view.Report, tmp_path: Path) -> None:
    text = prisma_view.write_page(found, tmp_path / "page.html", trained=False).read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert "https:" not in text
    assert "@import" not in text
    assert "<script>&" not in text.split('id="data">')[1].split("</script>")[0]
    assert "untrained weights" in text
    assert len(text) < 500_000


def test_the_untrained_note_is_only_where_it_belongs(found: prisma_view.Report, tmp_path: Path) -> None:
    assert "untrained" not in prisma_view.write_page(found, tmp_path / "page.html").read_text(encoding="utf-8")


def test_what_does_not_apply_is_said_on_the_page(tmp_path: Path) -> None:
    found = prisma_view.report(two_heads(), picture(1), picture(2))
    assert found.lens is None
    assert found.layers is not None
    text = prisma_view.write_page(found, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "reads 2 tokens with a head each" in text
    assert [path.name for path in prisma_view.write_pictures(found, tmp_path)] == [
        "attention.png", "attribution.png", "patching.png",
    ]  # fmt: skip


def test_attention_that_pools_has_attribution_and_it_sums_to_the_logits() -> None:
    pool = PoolSpec(kind="attention", attn=AttentionSpec(n_heads=2, n_kv_heads=2, d_head=6, scale=0.3))
    found = prisma_view.report(model(pool=pool, ln_final=None, ln_pool=NormSpec(eps=1e-5)), picture(1), picture(2))
    assert found.why == {}
    assert found.layers is not None
    total = found.layers.values.sum(0) + found.layers.tensors["constant"][0]
    assert torch.allclose(total, found.logits[found.shown], rtol=1e-3, atol=1e-3)


def test_the_rest_of_an_attribution_is_called_what_it_is(tmp_path: Path) -> None:
    attn, norm = AttentionSpec(n_heads=2, n_kv_heads=2, d_head=6, scale=0.3), NormSpec(eps=1e-5)
    for mlp, called in ((None, "biases"), (MlpSpec(d_mlp=8, act="gelu"), "biases, pooling's MLP")):
        pool = PoolSpec(kind="attention", attn=attn, mlp=mlp, norm=norm if mlp else None)
        found = prisma_view.report(model(pool=pool, ln_final=None, ln_pool=norm), picture(1), picture(2))
        assert data_of(prisma_view.write_page(found, tmp_path / "page.html"))["layers"]["rest"] == called


def test_models_that_are_no_classifiers_or_see_no_pictures_are_refused() -> None:
    with pytest.raises(NotApplicable, match="classification head"):
        prisma_view.report(model(n_classes=None), picture(1), picture(2))
    blind = model()
    blind.preprocess = None
    with pytest.raises(InputError, match="preprocess"):
        prisma_view.report(blind, picture(1), picture(2))


@pytest.mark.parametrize("font", [True, False])
def test_pictures_are_drawn_with_and_without_an_emoji_font(
    font: bool, found: prisma_view.Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    glyphs.glyph.cache_clear()
    if not font:
        monkeypatch.setattr(glyphs, "_font", lambda: None)
    for path in prisma_view.write_pictures(found, tmp_path):
        with Image.open(path) as drawn:
            assert len(np.unique(np.asarray(drawn.convert("RGB")).reshape(-1, 3), axis=0)) > 10
    glyphs.glyph.cache_clear()


def test_pictures_of_random_weights_say_so(found: prisma_view.Report, tmp_path: Path) -> None:
    for path in prisma_view.write_pictures(found, tmp_path):
        with Image.open(path) as plain:
            before = np.asarray(plain.convert("RGB"))
        prisma_view.write_pictures(found, tmp_path, trained=False)
        with Image.open(path) as warned:
            after = np.asarray(warned.convert("RGB"))
        np.testing.assert_array_equal(after[BAND:], before)
        assert (after[:BAND] == WARNING).all(-1).mean() > 0.5
        prisma_view.write_pictures(found, tmp_path)


@pytest.mark.parametrize(("width", "rows"), [(4000, 1), (900, 3), (420, 4)])
def test_the_legend_names_every_class_of_its_panels(width: int, rows: int) -> None:
    names = tuple(f"a long name {index}" for index in range(30))
    logits = torch.eye(30)[None].repeat(2, 1, 1)
    lens = Lens(logits, ("layer", "pos", "class"), {"layer": ("a", "b")})
    logits[0] = logits[0].flip(0)
    layout = TokenLayout(rows=5, columns=6)
    made = model(n_classes=30)
    made.labels = names
    found = prisma_view.Report(
        made,
        picture(1),
        picture(2),
        layout,
        logits[0, 0],
        [0],
        logits[None, None],
        lens=lens,
    )
    colours = {index: CLASSES[index] if index < 9 else REST for index in range(30)}
    legend = _legend(found, [0, 1], width, colours)
    words = [entry[1] for row in legend for entry in row]
    assert len(legend) <= rows
    named = words[:-1]
    assert words[-1] == f"{30 - len(named)} other classes"
    assert set(named) <= set(names[:9])
    assert len(named) == 9 or width < 4000
    assert all(entry[0] + 34 < width for row in legend for entry in row)


# -------------------------------------------------------------------- prisma demo


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"file:{prisma.save(model(), tmp_path_factory.mktemp('model'))}"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    picture(1).convert("P").save(folder / "one.gif")
    picture(2).convert("RGBA").save(folder / "two.png")
    return folder / "one.gif", folder / "two.png"


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


ALL = {"index.html", "lens.png", "attention.png", "attribution.png", "patching.png"}


def options_of(saved: str, pictures: tuple[Path, Path], out: Path) -> list[str]:
    return ["--model", saved, "--image", str(pictures[0]), "--other", str(pictures[1]), "--out", str(out)]


def test_demo_of_a_users_own_pictures(
    saved: str, pictures: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    assert main(["demo", "--no-open", *options_of(saved, pictures, out)]) == 0
    assert files(out) == ALL
    told = capsys.readouterr().out
    assert str(out / "index.html") in told
    assert " sees: " in told


def test_demo_without_options_needs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--no-open"]) == 0
    assert files(tmp_path / "prisma-demo") == ALL
    data = data_of(tmp_path / "prisma-demo" / "index.html")
    assert data["patching"]["kept"] != data["patching"]["put"]


def test_demo_of_a_timm_model(pictures: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="needs timm: pip install 'prisma-interp[timm]'")
    given = options_of("timm:test_vit", pictures, tmp_path)
    assert main(["demo", "--no-pretrained", "--no-open", *given]) == 0
    assert files(tmp_path) == ALL
    assert "untrained weights" in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--image", "nowhere.png"], "at nowhere.png"),
        (["--other", "text.png"], "text.png"),
        (["--model", "toy:nothing"], "nothing"),
        (["--model", "nonsense"], "not a reference"),
        (["--out", "text.png"], "Cannot write into text.png"),
    ],
)
def test_demo_says_what_is_wrong_in_one_line(
    options: list[str],
    says: str,
    saved: str,
    pictures: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    assert main(["demo", "--no-open", *options_of(saved, pictures, tmp_path / "out"), *options]) == 1
    told = capfd.readouterr()
    assert says in told.err
    assert len([line for line in told.err.splitlines() if line.strip()]) == 1
    assert told.out == ""


def test_the_page_opens_only_where_someone_looks(
    saved: str, pictures: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    given = options_of(saved, pictures, tmp_path)
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
    assert names == ["demo", "attention", "report"]


@pytest.mark.parametrize("option", ["--image", "--other"])
def test_a_picture_that_is_missing_leaves_no_folder(option: str, saved: str, tmp_path: Path) -> None:
    assert main(["demo", "--model", saved, option, str(tmp_path / "missing.png"), "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_random_weights_are_told_in_the_terminal(
    pictures: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["--image", str(pictures[0]), "--other", str(pictures[1]), "--out", str(tmp_path), "--no-open"]
    assert main(["demo", "--model", "toy:dsprites-attn-1l", "--no-pretrained", *names]) == 0
    assert "Random weights: toy:dsprites-attn-1l was not trained" in " ".join(capsys.readouterr().err.split())
    assert "untrained weights" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_what_the_page_lacks_is_told_in_the_terminal(
    pictures: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = prisma.save(two_heads(), tmp_path / "model")
    assert main(["demo", "--no-open", *options_of(f"file:{kept}", pictures, tmp_path / "out")]) == 0
    assert files(tmp_path / "out") == ALL - {"lens.png"}
    told = capsys.readouterr().err
    assert "Without lens.png: This model reads 2 tokens" in told
    assert told.count("Without") == 1


def towers() -> prisma.HookedModel:
    block = model().spec.blocks[0]
    text = TextSpec(
        d_model=12, n_ctx=4, n_vocab=9, blocks=(block,), causal=True, pool=TextPoolSpec(kind="argmax"), n_classes=5
    )
    return build(DualSpec(vision=model().spec, text=text))


def films() -> HookedViT:
    made = model(embed=EmbedSpec(patch=(8, 8), tubelet=1), layout=TokenLayout(cls=1, frames=2, rows=2, columns=3))
    made.preprocess = VideoPreprocess(frames=2, each=Preprocess(size=(16, 24)))
    return made


@pytest.mark.parametrize(
    ("made", "says"),
    [(towers, "prisma_view.report(model.vision, first, second)"), (films, "the page shows pictures, not videos")],
)
def test_models_without_pages_are_refused_with_what_there_is_instead(
    made: Any, says: str, pictures: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = prisma.save(made(), tmp_path / "model")
    assert main(["demo", "--no-open", *options_of(f"file:{kept}", pictures, tmp_path / "out")]) == 1
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_models_without_canonical_form_have_no_page(
    pictures: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm", reason="needs timm: pip install 'prisma-interp[timm]'")
    given = options_of("timm:test_convnext", pictures, tmp_path)
    assert main(["demo", "--no-pretrained", "--no-open", *given]) == 1
    assert "docs/how-to-other-architectures.md" in " ".join(capsys.readouterr().err.split())


def test_a_vision_tower_by_itself_has_a_report() -> None:
    dual = towers()
    dual.preprocess = Preprocess(size=(16, 24))
    found = prisma_view.report(dual.vision, picture(1), picture(2))
    assert found.lens is not None
    assert found.heads is not None
