"""The attention viewer's page: what it stores is what the model computed, within the error that it states."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import models
import numpy as np
import prisma_view
import pytest
import torch
from prisma_lens import head_scores
from prisma_view import maps as stored_maps

import prisma_core as prisma
from prisma_core import HookedModel, InputError, NotApplicable, TokenLayout
from prisma_core.cli.app import main


def unpack(html: str) -> tuple[dict[str, Any], list[np.ndarray], list[np.ndarray]]:
    """Return a page's data, and scores and patterns of each layer ``[window head query key]``."""
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])  # type: ignore[index]
    scores, patterns = [], []
    for index, layer in enumerate(data["layers"]):
        text = re.search(rf'id="layer-{index}">(.*?)</script>', html, re.S)[1]  # type: ignore[index]
        raw = zlib.decompress(base64.b64decode(text))
        n, tokens = max(layer["windows"], 1) * layer["heads"], layer["tokens"]
        rows = n * tokens
        low, step = np.frombuffer(raw[: 8 * rows], "<f4").reshape(2, n, tokens, 1).astype(float)
        fine, coarse = np.frombuffer(raw[8 * rows :], np.uint8).reshape(2, n, tokens, tokens).astype(int)
        code = fine + 256 * coarse
        score = np.where(code == 0, -np.inf, low + (code - 1) * step)
        shape = (max(layer["windows"], 1), layer["heads"], tokens, tokens)
        scores.append(score.reshape(shape))
        patterns.append(torch.from_numpy(score).softmax(-1).numpy().reshape(shape))
    return data, scores, patterns


def recorded(model: HookedModel, *inputs: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    _, cache = model.run_with_cache(*inputs, names=["hook_attn_scores", "hook_pattern"])
    names = [name for name in cache if name.endswith("blocks") or ".attn.hook_pattern" in name]
    scores = [cache[name.replace("hook_pattern", "hook_attn_scores")][0].detach().double().numpy() for name in names]
    return scores, [cache[name][0].detach().double().numpy() for name in names]


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(1, 3, 8, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("facts", [{"registers": 2}, {"cls": 0, "pool": "avg"}, {"rope": True, "attn_bias": True}])
def test_the_page_holds_scores_and_patterns_of_every_head(facts: dict[str, Any], image: torch.Tensor) -> None:
    model = models.build(**facts)
    page = prisma_view.attention_page(model, image)
    data, scores, patterns = unpack(page.html)
    true_scores, true_patterns = recorded(model, image)
    assert len(data["layers"]) == len(true_patterns) == 2
    for mine, theirs in zip(patterns, true_patterns, strict=True):
        off = np.abs(mine[0] - theirs).max()
        assert 0 < off <= page.pattern_error * 1.001 < 2e-3
    for mine, theirs in zip(scores, true_scores, strict=True):
        assert np.abs(mine[0] - theirs).max() <= page.score_error * 1.001 < 5e-3
    stated = re.search(r"shares are within ([\d.e-]+) and scores within ([\d.e-]+)", page.html)
    assert stated
    assert [float(each) for each in stated.groups()] == pytest.approx([page.pattern_error, page.score_error], rel=0.5)


def test_tokens_have_their_places(image: torch.Tensor) -> None:
    data, *_ = unpack(prisma_view.attention_page(models.build(registers=2), image).html)
    assert data["place"] == {
        "prefix": ["class token", "register 1", "register 2"], "frames": 1, "rows": 2, "columns": 3, "first": "frame",
    }  # fmt: skip
    assert {len(row) for row in data["kinds"]["corner"]} == {4}


def test_fewer_steps_are_a_larger_error_that_is_stated(image: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, errors = models.build(), []
    for steps in (4095, 255, 15):
        monkeypatch.setattr(stored_maps, "STEPS", (steps,))
        page = prisma_view.attention_page(model, image)
        errors.append(page.pattern_error)
        off = np.abs(unpack(page.html)[2][0][0] - recorded(model, image)[1][0]).max()
        assert off <= page.pattern_error * 1.001
    assert errors == sorted(errors)
    assert errors[2] > 4 * errors[1] > 16 * errors[0]


def test_there_are_as_many_steps_as_there_is_room_for() -> None:
    pattern = torch.randn(1, 12, 20, 20).softmax(-1)
    one = stored_maps.Map("blocks.0.attn.hook_pattern", pattern, pattern.log())
    assert stored_maps.store([one]).steps == 4095
    vit_b16 = 12 * 12 * 197 * 197
    assert next(n for n in stored_maps.STEPS if vit_b16 * np.log2(n + 1) / 6 <= stored_maps.ROOM) == 1023


def test_scores_that_do_not_make_the_pattern_are_not_shown() -> None:
    pattern = torch.randn(3, 9, 9, generator=torch.Generator().manual_seed(0)).softmax(-1)
    kept = stored_maps._map("x", pattern, pattern.log() + 3, within="")
    assert kept.scores is not None
    other = stored_maps._map("x", pattern, pattern.log() * 1.2, within="")
    assert other.scores is None
    stored = stored_maps.store([other])
    assert stored.layers[0]["scores"] is False
    assert stored.pattern_error < 1e-3


def test_no_attention_stays_no_attention() -> None:
    torch.manual_seed(0)
    masked = torch.ones(7, 7).tril().bool()
    masked[4] = False  # a query that attends to nothing
    scores = torch.randn(2, 7, 7).masked_fill(~masked, -torch.inf)
    pattern = scores.softmax(-1).nan_to_num(0)
    codes, low, step = stored_maps._coded(stored_maps.Map("x", pattern[None], None), 255)
    assert (codes[0, :, ~masked] == 0).all()
    _, again = stored_maps.decoded(codes, low, step)
    assert np.abs(again[0] - pattern.numpy()).max() < 0.02
    assert (again[0][:, ~masked] == 0).all()


@pytest.mark.parametrize("order", ["frame row column", "row column frame"])
def test_patches_are_taken_together_within_their_frame(order: Any) -> None:
    layout = TokenLayout(cls=1, frames=3, rows=4, columns=5, order=order)
    pattern = torch.randn(2, 2, 61, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    small, coarse, side = stored_maps.grouped(pattern, layout, budget=2 * 2 * 19 * 19)
    assert (side, coarse.n_tokens) == (2, 19)
    keys = layout.grid(pattern, axis=3)[:, :, 0]  # what the class token gives to [frame row column]
    expected = keys[..., 1, 2:4, 2:4].sum((-2, -1))
    assert torch.allclose(coarse.grid(small, axis=3)[:, :, 0, 1, 1, 1], expected)
    assert torch.allclose(small.sum(-1), torch.ones(2, 2, 19, dtype=torch.float64))


def test_more_than_a_page_holds_is_taken_together_or_refused(
    image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.build()
    monkeypatch.setattr(stored_maps, "BUDGET", 300)
    monkeypatch.setattr("prisma_view.pack.grouped.__defaults__", (300,))
    html = prisma_view.attention_page(model, image).html
    data, _, patterns = unpack(html)
    assert data["side"] == 2
    assert patterns[0].shape[-1] == 1 + 2
    assert "groups of 2 by 2 patches" in html
    maps = stored_maps.collect(model, [image], None)
    with pytest.raises(InputError, match="layers="):
        stored_maps.fitted(maps, None)


def test_some_layers_only(image: torch.Tensor) -> None:
    model = models.build(layers=3)
    data, _, patterns = unpack(prisma_view.attention_page(model, image, layers=[0, -1]).html)
    assert [layer["label"] for layer in data["layers"]] == ["0", "2"]
    assert np.abs(patterns[1][0] - recorded(model, image)[1][2]).max() < 2e-3
    with pytest.raises(InputError, match="0 to 2"):
        prisma_view.attention_page(model, image, layers=[3])


def test_attentions_side_by_side_are_one_layer_with_all_their_heads(image: torch.Tensor) -> None:
    model = models.build(n_parallel=2, layers=3)
    page = prisma_view.attention_page(model, image)
    data, _, patterns = unpack(page.html)
    assert [(layer["label"], layer["heads"]) for layer in data["layers"]] == [("0", 8), ("1", 8), ("2", 8)]
    _, cache = model.run_with_cache(image, names="pattern")
    for layer, stored in enumerate(patterns):
        sides = [cache[f"blocks.{layer}.attn.{side}.hook_pattern"][0].detach().numpy() for side in range(2)]
        assert np.abs(stored[0] - np.concatenate(sides)).max() < 2e-3
    scores = head_scores(model, image)
    more = scores.sel(kind="self").values - scores.tensors["baseline"][scores.names("kind").index("self")]
    assert np.abs(np.array(data["kinds"]["self"]) - more.numpy()).max() < 1e-4
    data, _, patterns = unpack(prisma_view.attention_page(model, image, layers=[-1]).html)
    assert [layer["label"] for layer in data["layers"]] == ["2"]
    assert np.abs(np.array(data["kinds"]["self"]) - more[-1].numpy()).max() < 1e-4
    with pytest.raises(InputError, match="0 to 2"):
        prisma_view.attention_page(model, image, layers=[3])


def test_windows_are_shown_as_windows() -> None:
    timm = pytest.importorskip("timm", reason="needs timm: pip install 'prisma-interp[timm]'")

    sizes = {"img_size": 56, "embed_dim": 12, "depths": (2, 1), "num_heads": (2, 3)}
    torch.manual_seed(0)
    model = prisma.adapt(timm.create_model("swin_tiny_patch4_window7_224", **sizes).eval())
    x = torch.randn(1, 3, 56, 56)
    page = prisma_view.attention_page(model, x)
    data, _, patterns = unpack(page.html)
    assert [(layer["windows"], layer["heads"]) for layer in data["layers"]] == [(4, 2), (4, 2), (1, 3)]
    assert "windows" in page.html
    _, cache = model.run_with_cache(x, names="hook_pattern")
    for mine, theirs in zip(patterns, cache.values(), strict=True):
        assert np.abs(mine - theirs[0].detach().numpy()).max() <= page.pattern_error * 1.001 < 1e-2


def small(name: str, **options: Any) -> Any:
    timm = pytest.importorskip("timm", reason="needs timm: pip install 'prisma-interp[timm]'")

    torch.manual_seed(0)
    return prisma.adapt(timm.create_model(name, **options).eval())


def test_pooled_queries_are_left_out_and_tokens_without_a_place_are_numbered() -> None:
    options = {"embed_dim": 8, "num_heads": 1, "stages": (1, 2, 1), "q_pool": 1, "mask_unit_size": (4, 4)}
    model = small("hiera_tiny_224", img_size=(64, 96), mask_unit_attn=(True, False, False), **options)
    x = torch.randn(1, 3, 64, 96)
    page = prisma_view.attention_page(model, x)
    data, _, patterns = unpack(page.html)
    assert [layer["label"] for layer in data["layers"]] == ["0", "2", "3"]
    assert [layer["grid"] for layer in data["layers"]] == [None] * 3
    assert "Left out, for their queries are pooled: 1." in page.html
    assert "in the model&#39;s own order" in page.html
    _, cache = model.run_with_cache(x, names="hook_pattern")
    assert cache["pattern", 1].shape[-1] == 4 * cache["pattern", 1].shape[-2]
    assert np.abs(patterns[1][0] - cache["pattern", 2][0].detach().numpy()).max() <= page.pattern_error * 1.001 < 1e-2
    with pytest.raises(NotApplicable, match=r"blocks\.1\.attn\.hook_pattern are pooled"):
        prisma_view.attention_page(model, x, layers=[1])


def test_rows_and_columns_are_those_of_the_stream() -> None:
    options = {"img_size": (64, 96), "embed_dim": 16, "depth": 2, "num_heads": 2, "window_size": 2}
    model = small("samvit_base_patch16", global_attn_indexes=(1,), **options)
    data, *_ = unpack(prisma_view.attention_page(model, torch.randn(1, 3, 64, 96)).html)
    assert [(each["within"], each["windows"], each["grid"]) for each in data["layers"]] == [
        ("window", 6, [2, 2]), ("", 0, [4, 6]),
    ]  # fmt: skip
    assert stored_maps.window_grid(4, 14, windows=2, tokens=28) == (4, 7)
    assert stored_maps.window_grid(8, 8, windows=5, tokens=16) is None


def test_attention_within_frames_and_along_them_is_shown_as_such() -> None:
    kinds: Any = pytest.importorskip("transformers", reason="needs transformers: pip install 'prisma-interp[hf]'")

    sizes = {"image_size": 32, "patch_size": 16, "num_frames": 3, "hidden_size": 16, "num_hidden_layers": 1}
    config = kinds.TimesformerConfig(**sizes, num_attention_heads=2, intermediate_size=20)
    model = prisma.adapt(kinds.TimesformerModel(config).eval())
    x = torch.randn(1, 3, 3, 32, 32)
    page = prisma_view.attention_page(model, x)
    data, _, patterns = unpack(page.html)
    assert [(each["label"], each["within"], each["windows"], each["tokens"]) for each in data["layers"]] == [
        ("0.time", "patch", 4, 3), ("0.space", "frame", 3, 5),
    ]  # fmt: skip
    _, cache = model.run_with_cache(x, names="hook_pattern")
    for mine, theirs in zip(patterns, cache.values(), strict=True):
        assert np.abs(mine - theirs[0].detach().numpy()).max() <= page.pattern_error * 1.001 < 1e-2


def clip() -> Any:
    pytest.importorskip("open_clip", reason="needs open_clip: pip install 'prisma-interp[clip]'")

    vision = {"width": 32, "layers": 2, "head_width": 16, "image_size": 32, "patch_size": 16}
    text = {"width": 32, "layers": 2, "heads": 2}
    torch.manual_seed(0)
    return prisma.load("open_clip:ViT-B-32", pretrained=False, embed_dim=16, vision_cfg=vision, text_cfg=text)


def test_a_text_has_words_and_no_padding() -> None:
    model = clip()
    page = prisma_view.attention_page(model, text="a <b>cat</b>")
    data, scores, patterns = unpack(page.html)
    assert data["words"][0] == "<start_of_text>"
    assert data["words"][-1] == "<end_of_text>"
    assert "cat" in data["words"]
    n = len(data["words"])
    _, theirs = recorded(model.text, model.tokens("a <b>cat</b>"))
    assert np.abs(patterns[1][0] - theirs[1][:, :n, :n]).max() <= page.pattern_error * 1.001
    assert (scores[0][0][:, 0, 1:] == -np.inf).all()
    assert "<b>cat" not in page.html


def test_the_end_of_a_text_is_named_where_its_token_has_no_text() -> None:
    page = prisma_view.attention_page(prisma.load("toy:clip-scenes"), text="red circle")
    data, _, _ = unpack(page.html)
    assert data["words"] == ["red", "circle", "end of text"]


def test_towers_and_inputs_must_fit(image: torch.Tensor) -> None:
    model = clip()
    page = prisma_view.attention_page(model, torch.randn(1, 3, 32, 32))
    assert unpack(page.html)[0]["place"]["rows"] == 2
    with pytest.raises(InputError, match="text="):
        prisma_view.attention_page(model.text, image)
    with pytest.raises(InputError, match="one of them"):
        prisma_view.attention_page(model, image, text="a cat")


def test_a_model_without_attention_is_refused() -> None:
    timm = pytest.importorskip("timm", reason="needs timm: pip install 'prisma-interp[timm]'")

    model = prisma.adapt(timm.create_model("test_convnext").eval())
    with pytest.raises(NotApplicable, match=r"hook_points.*prisma_view\.patches"):
        prisma_view.attention_page(model, torch.randn(1, 3, 64, 64))


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "page.html"
    assert main(["attention", "toy:scenes-3l", "--layers", "0,2", "--out", str(out), "--no-open"]) == 0
    assert str(out) in capsys.readouterr().out
    data, *_ = unpack(out.read_text("utf-8"))
    assert [layer["label"] for layer in data["layers"]] == ["0", "2"]
    for wrong, fact in ((["--layers", "x"], "0,5,11"), (["--image", "no.png"], "no.png"), (["--out", "."], ".html")):
        assert main(["attention", "toy:scenes-3l", "--no-open", *wrong]) != 0
        assert fact in capsys.readouterr().err
