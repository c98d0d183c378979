"""prisma_view without a browser: emoji, packing, the page's text, PNG files and the demo command."""

from __future__ import annotations

import base64
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import prisma_view
import pytest
import torch
from labelled import data_of, image_of, model, two_heads
from PIL import Image
from prisma_lens import Lens
from prisma_view import glyphs
from prisma_view.colours import CLASSES, QUIET, REST, assign
from prisma_view.pack import grouped, pack, pack_patterns
from prisma_view.page import class_colours
from prisma_view.report_images import report_images
from prisma_view.symbols import FALLBACK, symbol

from prisma_core import InputError, NotApplicable, TokenLayout
from prisma_core.spec import (
    AttentionSpec,
    MlpSpec,
    NormSpec,
    PoolSpec,
)


def unpacked(packed: dict[str, Any]) -> np.ndarray:
    raw = zlib.decompress(base64.b64decode(packed["data"]))
    return np.frombuffer(raw, packed["type"]).reshape(packed["shape"])


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


@pytest.fixture(scope="module")
def found() -> prisma_view.Report:
    return prisma_view.report(model(), image_of(1), image_of(2))


def test_the_page_holds_what_the_model_computes(tmp_path: Path) -> None:
    made = model()
    found = prisma_view.report(made, image_of(1), image_of(2))
    page = prisma_view.write_page(found, tmp_path / "page.html")
    data = data_of(page)
    logits = made(made.preprocess(image_of(1)))[0].detach()
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
    found = prisma_view.report(two_heads(), image_of(1), image_of(2))
    assert found.lens is None
    assert found.layers is not None
    text = prisma_view.write_page(found, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "reads 2 tokens with a head each" in text
    assert [path.name for path in prisma_view.write_images(found, tmp_path)] == [
        "attention.png", "attribution.png", "patching.png",
    ]  # fmt: skip


def test_attention_that_pools_has_attribution_and_it_sums_to_the_logits() -> None:
    pool = PoolSpec(kind="attention", attn=AttentionSpec(n_heads=2, n_kv_heads=2, d_head=6, scale=0.3))
    found = prisma_view.report(model(pool=pool, ln_final=None, ln_pool=NormSpec(eps=1e-5)), image_of(1), image_of(2))
    assert found.why == {}
    assert found.layers is not None
    total = found.layers.values.sum(0) + found.layers.tensors["constant"][0]
    assert torch.allclose(total, found.logits[found.shown], rtol=1e-3, atol=1e-3)


def test_the_rest_of_an_attribution_is_called_what_it_is(tmp_path: Path) -> None:
    attn, norm = AttentionSpec(n_heads=2, n_kv_heads=2, d_head=6, scale=0.3), NormSpec(eps=1e-5)
    for mlp, called in ((None, "biases"), (MlpSpec(d_mlp=8, act="gelu"), "biases, pooling's MLP")):
        pool = PoolSpec(kind="attention", attn=attn, mlp=mlp, norm=norm if mlp else None)
        found = prisma_view.report(model(pool=pool, ln_final=None, ln_pool=norm), image_of(1), image_of(2))
        assert data_of(prisma_view.write_page(found, tmp_path / "page.html"))["layers"]["rest"] == called


def test_models_that_are_no_classifiers_or_see_no_images_are_refused() -> None:
    with pytest.raises(NotApplicable, match="classification head"):
        prisma_view.report(model(n_classes=None), image_of(1), image_of(2))
    blind = model()
    blind.preprocess = None
    with pytest.raises(InputError, match="preprocess"):
        prisma_view.report(blind, image_of(1), image_of(2))


def texts(figure: Any) -> set[str]:
    return {text.get_text() for text in figure.findobj(lambda each: hasattr(each, "get_text"))}


@pytest.mark.parametrize("font", [True, False])
def test_images_are_drawn_with_and_without_an_emoji_font(
    font: bool, found: prisma_view.Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    glyphs.glyph.cache_clear()
    if not font:
        monkeypatch.setattr(glyphs, "_font", lambda: None)
    panel = report_images(found)["lens"].axes[-1]
    assert bool((np.asarray(panel.images[-1].get_array())[..., 3] > 0).any()) == (font and glyphs._font() is not None)
    for path in prisma_view.write_images(found, tmp_path):
        with Image.open(path) as drawn:
            assert len(np.unique(np.asarray(drawn.convert("RGB")).reshape(-1, 3), axis=0)) > 10
    glyphs.glyph.cache_clear()


def test_images_hold_what_the_report_does(found: prisma_view.Report) -> None:
    drawn = report_images(found)
    assert list(drawn) == ["lens", "attention", "attribution", "patching"]
    assert found.lens is not None
    classes = found.lens.logits[-1, found.layout.slice("patches")].argmax(-1).view(2, 3)
    wash = np.asarray(drawn["lens"].axes[-1].images[1].get_array())[..., :3]
    colours = class_colours(found)
    np.testing.assert_allclose(255 * wash, [[colours[index] for index in row] for row in classes.tolist()])
    layers, heads = found.patterns.shape[:2]
    sheet = np.asarray(drawn["attention"].axes[0].images[0].get_array())
    assert sheet.shape == (layers * 3, heads * 4)
    row = found.patterns[1, 1, 0, found.layout.slice("patches")].view(2, 3)
    np.testing.assert_allclose(sheet[3:5, 4:7], row / row.max(), rtol=1e-5)
    bars = [bar.get_width() for bar in drawn["attribution"].axes[0].patches]
    assert bars[-1] == pytest.approx(float(found.logits[found.best]), abs=1e-3)
    assert sum(bars[:-1]) == pytest.approx(bars[-1], abs=1e-5)
    assert found.patching is not None
    change = np.asarray(drawn["patching"].axes[2].images[0].get_array())
    np.testing.assert_allclose(change, found.patching.change["all"], rtol=1e-5)
    new = int((found.patching.guess["all"] != found.best).sum())
    if glyphs._font() is not None:
        assert len(drawn["patching"].axes[2].artists) == new


def test_images_of_random_weights_say_so(found: prisma_view.Report) -> None:
    note = "Random weights: nothing here was learned."
    assert all(note in texts(figure) for figure in report_images(found, trained=False).values())
    assert not any(note in texts(figure) for figure in report_images(found).values())


@pytest.mark.parametrize(("form", "head"), [("svg", b"<?xml"), ("pdf", b"%PDF"), ("png", b"\x89PNG")])
def test_images_come_in_forms_for_papers(form: Any, head: bytes, found: prisma_view.Report, tmp_path: Path) -> None:
    paths = prisma_view.write_images(found, tmp_path, form=form)
    assert [path.name for path in paths] == [
        f"{name}.{form}" for name in ("lens", "attention", "attribution", "patching")
    ]
    assert all(path.read_bytes().startswith(head) for path in paths)


def test_the_legend_names_every_class_of_its_panels() -> None:
    names = tuple(f"a $long$ name {index}" for index in range(30))
    logits = torch.eye(30)[None].repeat(2, 1, 1)
    logits[0] = logits[0].flip(0)
    made = model(n_classes=30)
    made.labels = names
    found = prisma_view.Report(
        made, image_of(1), image_of(2), TokenLayout(rows=5, columns=6), logits[0, 0], [0], logits[None],
        lens=Lens(logits, ("layer", "pos", "class"), {"layer": ("0_pre", "final_post")}),
    )  # fmt: skip
    (legend,) = report_images(found)["lens"].legends
    shown = [text.get_text() for text in legend.get_texts()]
    own = [index for index, colour in class_colours(found).items() if colour != REST]
    assert set(shown[:-1]) == {names[index].replace("$", r"\$") for index in own}
    assert shown[-1] == f"{30 - len(own)} other classes"
