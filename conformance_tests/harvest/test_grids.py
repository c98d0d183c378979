"""Activations on a grid, channels first or last: positions in reading order, with the layout that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from prisma_harvest import Pass, harvest, top_examples
from prisma_harvest.manifest import Point
from prisma_lens import probe_harvest
from prisma_sae import CoderFacts, SparseCoder, activation_rows, evaluate, feature_attribution, splice
from prisma_view import gallery
from torch import Tensor, nn

from prisma_core import HookedUpstream, InputError, TokenLayout
from prisma_core.plugin import HookMap, MapSpec, Preprocess

NAME, HEAD = "blocks.0.hook_resid_post", "head -> hook_logits : batch class"
ROWS = {
    "channels last": f"permuted -> {NAME} : batch row column d_model\n{HEAD}",
    "channels first": f"conv -> {NAME} : batch d_model row column\n{HEAD}",
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.permuted, self.head = nn.Conv2d(3, 5, 2, 2), nn.Identity(), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.permuted(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.fixture(params=list(ROWS))
def net(request: pytest.FixtureRequest) -> HookedUpstream:
    model = HookedUpstream(Net().eval(), HookMap.parse(ROWS[request.param]), MapSpec(shape=(3, 4, 6)), lambda y: y)
    model.preprocess = Preprocess(size=(4, 6))
    return model


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for seed in range(10):
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{seed}.png")
    return tmp_path / "photos"


def expected(net: HookedUpstream, files: Path) -> Tensor:
    """What the convolution gives, ``[image position channel]``, the positions row by row."""
    pixels = torch.cat([net.preprocess(str(path)) for path in sorted(files.iterdir())])
    with torch.no_grad():
        return net.upstream.conv(pixels).flatten(2).transpose(1, 2)


def test_readers_give_positions_in_reading_order(net: HookedUpstream, files: Path, tmp_path: Path) -> None:
    acts = harvest(net, files, NAME, out=tmp_path / "out", dtype="float32", batch=4, shard=4)
    want = expected(net, files)
    assert acts.layout_of(NAME) == TokenLayout(rows=2, columns=3)
    assert acts.positions_of(NAME) == list(range(6))
    assert acts.tokens_of(NAME) == ["r0c0", "r0c1", "r0c2", "r1c0", "r1c1", "r1c2"]
    assert acts.example(1, NAME).shape == (2, 3, 5)
    rows = torch.cat(list(acts.rows(NAME, 7)))
    assert torch.allclose(rows, want.flatten(0, 1), atol=1e-6)
    shuffled = torch.cat(list(acts.rows(NAME, 7, shuffle=True, buffer=14)))
    assert sorted(map(tuple, shuffled.tolist())) == sorted(map(tuple, rows.tolist()))


@pytest.mark.parametrize("per", ["image", "patch"])
def test_top_examples_are_places(net: HookedUpstream, files: Path, tmp_path: Path, per: str) -> None:
    want = expected(net, files)
    acts = harvest(net, files, NAME, out=tmp_path / "out", dtype="float32", batch=4)
    best = [top_examples(each, NAME, k=3, per=per) for each in (acts, Pass(net, files, NAME, batch=4))]
    assert torch.equal(best[0].values, best[1].values)
    example, token = (best[0].tensors[name] for name in ("example", "token"))
    assert torch.allclose(want[example, token, torch.arange(5)[:, None]], best[0].values, atol=1e-6)
    largest = want.amax(1).T if per == "image" else want.flatten(0, 1).T
    assert torch.allclose(best[0].values, largest.topk(3).values, atol=1e-6)
    assert best[1].facts["layout"]["columns"] == 3
    assert best[1].facts["tokens"][5] == "r1c2"


def test_probes_and_galleries_read_places(net: HookedUpstream, files: Path, tmp_path: Path) -> None:
    acts = harvest(net, files, NAME, out=tmp_path / "out", dtype="float32", batch=4)
    row = torch.arange(6).div(3, rounding_mode="floor").repeat(10, 1)
    assert probe_harvest(acts, row, names=NAME, tokens="patches", epochs=1).values.numel() >= 1
    assert probe_harvest(acts, torch.arange(10) % 2, names=NAME, tokens="mean", epochs=1).values.numel()
    with pytest.raises(InputError, match="no cls"):
        probe_harvest(acts, torch.arange(10) % 2, names=NAME, tokens="cls", epochs=1)
    assert gallery(net, files, NAME, out=tmp_path / "gallery", k=2, progress=False).units == 5


def square(d: int, **facts: Any) -> SparseCoder:
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    tensors = {"W_enc": both.T.contiguous(), "b_enc": torch.zeros(2 * d), "W_dec": both, "b_dec": torch.zeros(d)}
    return SparseCoder(CoderFacts(kind="standard", d_in=d, d_sae=2 * d, d_out=d, tokens="patches", **facts), tensors)


def test_coders_take_the_patches_of_a_grid(net: HookedUpstream, files: Path) -> None:
    """The vectors are those of the places, whatever the order of the axes, in every use of a coder."""
    coder, images = square(5), torch.randn(2, 3, 4, 6)
    features = f"{NAME}.sae.hook_features"
    clean, want = net(images), net.upstream.conv(images).permute(0, 2, 3, 1)
    with splice(net, {NAME: coder}):
        assert net.hook_points()[features].axes == "batch row column feature"
        logits, cache = net.run_with_cache(images, names=features)
        assert torch.allclose(logits, clean, atol=1e-6)
        assert torch.allclose(cache[features], torch.cat([want, -want], -1).relu(), atol=1e-6)

        def cut(f: Tensor, at: object) -> None:
            f[:, 1, 2] = 0

        edited = net.run_with_hooks(images, hooks={features: cut})
    with splice(net, {NAME: coder}, error_term=True):
        assert torch.equal(net(images), clean)
    removed = want.clone()
    removed[:, 1, 2] = 0
    assert torch.allclose(edited, net.upstream.head(removed.mean((1, 2))), atol=1e-6)
    with pytest.raises(InputError, match="no layout of tokens"), splice(net, {NAME: coder}, tokens="cls", force=True):
        pass
    measures = evaluate(net, coder, images, torch.tensor([0, 1]), hook=NAME)
    assert measures.sel(measure="explained_variance").values.item() == pytest.approx(1)
    assert measures.sel(measure="loss_recovered").values.item() == pytest.approx(1)
    zero = torch.nn.functional.cross_entropy(net.upstream.head.bias.expand(2, -1), torch.tensor([0, 1]))
    assert measures.sel(measure="loss_zero").values.item() == pytest.approx(zero.item(), rel=1e-5)
    batches = [images, None]
    rows = next(activation_rows(net, lambda at: batches[at], NAME, tokens="patches", batch=12))
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, want.flatten(0, 2).tolist()))


def test_a_transcoder_reads_and_writes_grids_in_their_own_orders() -> None:
    """As in timm's ConvNeXt, whose norms keep channels last in a stream that has them first."""
    rows = f"conv -> {NAME} : batch d_model row column\npermuted -> out : batch row column d_model\n{HEAD}"
    net = HookedUpstream(Net().eval(), HookMap.parse(rows), MapSpec(shape=(3, 4, 6)), lambda y: y)
    images = torch.randn(2, 3, 4, 6)
    clean = net(images)
    with splice(net, square(5, hook=NAME, hook_out="out")):
        assert torch.allclose(net(images), clean, atol=1e-6)


def test_targets_at_a_place_of_a_grid() -> None:
    rows = f"conv -> {NAME} : batch d_model row column\npermuted -> out : batch row column d_model\n{HEAD}"
    net = HookedUpstream(Net().eval(), HookMap.parse(rows), MapSpec(shape=(3, 4, 6)), lambda y: y)
    images, coders = torch.randn(2, 3, 4, 6), {NAME: square(5), "out": square(5)}
    at = [feature_attribution(net, images, coders, [1], pos=pos).values for pos in range(6)]
    whole = feature_attribution(net, images, coders, [1]).values
    assert torch.allclose(sum(at, torch.zeros(())), whole, atol=1e-6)
    value = net.upstream.conv(images)[:, 1, 1, 2].relu()  # row 1, column 2: position 5
    assert torch.allclose(at[5][0, 1], value, atol=1e-6)


WINDOWS = {
    "windows": "batch window pos d_model",
    "frames": "batch frame pos d_model",
    "patches in frames": "batch patch frame d_model",
}


@pytest.mark.parametrize("kind", list(WINDOWS))
def test_tokens_of_windows_and_frames_are_rows(kind: str, files: Path, tmp_path: Path) -> None:
    """A row a token, window by window; where those are in the image is not known, and nothing says otherwise."""
    rows = f"permuted -> {NAME} : {WINDOWS[kind]}\n{HEAD}"
    spec = MapSpec(shape=(3, 4, 6), layout=TokenLayout(rows=2, columns=3))
    net = HookedUpstream(Net().eval(), HookMap.parse(rows), spec, lambda y: y)
    net.preprocess = Preprocess(size=(4, 6))
    want = expected(net, files)
    acts = harvest(net, files, NAME, out=tmp_path / "out", dtype="float32", batch=4)
    assert acts.positions_of(NAME) is None
    assert acts.tokens_of(NAME) is None
    assert torch.allclose(torch.cat(list(acts.rows(NAME, 7))), want.flatten(0, 1), atol=1e-6)
    shuffled = torch.cat(list(acts.rows(NAME, 7, shuffle=True, buffer=14)))
    assert sorted(map(tuple, shuffled.tolist())) == sorted(map(tuple, acts.read(NAME, 0, 10).flatten(0, 2).tolist()))
    best = top_examples(acts, NAME, k=3, per="patch")
    assert torch.allclose(best.values, want.flatten(0, 1).T.topk(3).values, atol=1e-6)
    truth = torch.arange(10) % 2
    assert probe_harvest(acts, truth, names=NAME, tokens="mean", epochs=1).values.numel()
    with pytest.raises(InputError, match="take tokens='mean'"):
        probe_harvest(acts, truth[:, None].expand(-1, 6), names=NAME, tokens="patches", epochs=1)
    assert gallery(net, files, NAME, out=tmp_path / "gallery", k=2, progress=False).units == 5
    with splice(net, {NAME: square(5)}, force=True):
        assert torch.allclose(net(torch.ones(1, 3, 4, 6)), net.upstream(torch.ones(1, 3, 4, 6)), atol=1e-6)


def test_patterns_of_windows_are_no_rows() -> None:
    assert not Point(name="x", axes="window head query_pos key_pos", shape=(2, 2, 3, 3)).has_tokens
    assert not Point(name="x", axes="frame head query_pos key_pos", shape=(2, 2, 3, 3)).has_tokens
    assert Point(name="x", axes="window pos head d_head", shape=(2, 3, 2, 4)).inner == (2, 4)


def test_negative_positions_without_a_layout_count_from_the_end(files: Path, tmp_path: Path) -> None:
    rows = f"permuted -> {NAME} : batch frame pos d_model\n{HEAD}"
    net = HookedUpstream(Net().eval(), HookMap.parse(rows), MapSpec(shape=(3, 4, 6)), lambda y: y)
    net.preprocess = Preprocess(size=(4, 6))
    for pos in ([-1], -1):
        acts = harvest(net, files, NAME, out=tmp_path / str(pos), pos=pos, dtype="float32", batch=4)
        want = expected(net, files)[:, [2, 5]]
        assert torch.allclose(acts.read(NAME, 0, 10).flatten(1, 2), want, atol=1e-6)


class Flat(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.permuted(self.conv(x).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize("pos", [[-2], [0, -1], [3]])
def test_positions_of_a_model_without_a_layout_are_counted_by_the_pass(
    files: Path, tmp_path: Path, pos: list[int]
) -> None:
    table = f"permuted -> {NAME} : batch pos d_model\n{HEAD}"
    flat = HookedUpstream(Flat().eval(), HookMap.parse(table), MapSpec(shape=(3, 4, 6)), lambda y: y)
    flat.preprocess = Preprocess(size=(4, 6))
    acts = harvest(flat, files, NAME, pos=pos, dtype="float32", out=tmp_path / "out")
    assert acts.layout is None
    torch.testing.assert_close(acts.read(NAME, 0, 10), expected(flat, files)[:, pos])
