"""Activations on a grid, channels first or last: positions in reading order, with the layout that says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from prisma_harvest import Pass, harvest, top_examples
from prisma_lens import probe_harvest
from prisma_sae import CoderFacts, SparseCoder, splice
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


def test_coders_take_the_patches_of_a_grid() -> None:
    table = HookMap.parse(ROWS["channels last"])
    net = HookedUpstream(Net().eval(), table, MapSpec(shape=(3, 4, 6)), lambda y: y)
    both = torch.cat([torch.eye(5), -torch.eye(5)])
    tensors = {"W_enc": both.T.contiguous(), "b_enc": torch.zeros(10), "W_dec": both, "b_dec": torch.zeros(5)}
    coder = SparseCoder(CoderFacts(kind="standard", d_in=5, d_sae=10, d_out=5, tokens="patches"), tensors)
    images = torch.randn(2, 3, 4, 6)
    with splice(net, {NAME: coder}):
        assert torch.allclose(net(images), net.upstream(images), atol=1e-6)
    with pytest.raises(InputError, match="no layout of tokens"), splice(net, {NAME: coder}, tokens="cls", force=True):
        pass
