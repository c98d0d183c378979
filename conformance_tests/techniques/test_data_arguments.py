"""Public functions of what reads, trains and shows, with nonsense in the place of each argument in turn.

As ``test_technique_arguments.py`` does it for reading and intervening.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import prisma_harvest as harvests
import prisma_sae as sae
import prisma_toy as toy
import prisma_view as view
import pytest
import torch
from arguments import Call, all_faults, call
from models import build
from PIL import Image
from prisma_toy.masking import draw_hidden, hide, reconstruct

import prisma_core as prisma
from prisma_core import HookedViT, InputError, NotApplicable, Result
from prisma_core.plugin import Preprocess

PRE = ("resid_pre", 0)
N = build().layout.n_tokens
SEED = "-99 10**18 int64"
TEXT = "'' nonsense"


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@cache
def model() -> HookedViT:
    made = build().float()
    made.preprocess = Preprocess(size=(8, 12))
    return made


@cache
def coder(hook: str = "blocks.0.hook_resid_pre") -> sae.SparseCoder:
    width = model().spec.d_model
    shapes = {"W_enc": (width, 7), "b_enc": (7,), "W_dec": (7, width), "b_dec": (width,)}
    facts = sae.CoderFacts(kind="standard", d_in=width, d_sae=7, d_out=width, hook=hook)
    return sae.SparseCoder(facts, {name: drawn(*shape) for name, shape in shapes.items()})


@cache
def harvest(folder: Path) -> harvests.Harvest:
    photos = folder / "photos"
    photos.mkdir()
    for at in range(4):
        pixels = np.random.default_rng(at).integers(0, 256, (8, 8, 3)).astype("uint8")
        Image.fromarray(pixels).save(photos / f"{at}.png")
    return harvests.harvest(model(), photos, PRE, out=folder / "harvest", batch=2, progress=False)


def result() -> Result:
    return Result(drawn(3, 4), ("layer", "head"), technique="head_scores", unit="share")


def entered(scope: Any) -> Any:
    """Run the model inside a scope."""
    with scope:
        return model()(drawn(1, 3, 8, 12))


def fresh(folder: Path) -> Path:
    return folder / f"new{len(list(folder.iterdir()))}"


CALLS: dict[str, Callable[[Path], Call]] = {
    # prisma_harvest
    "harvest: point": lambda at: call(harvest(at).point, PRE),
    "harvest: example": lambda at: call(harvest(at).example, 0, PRE),
    "harvest: read": lambda at: call(harvest(at).read, PRE, 0, 4, takes={"stop": "10**18 int64"}),
    "harvest: batches": lambda at: call(harvest(at).batches, PRE, 2, then=list),
    "harvest: rows": lambda at: call(harvest(at).rows, PRE, 2, takes={"seed": SEED, "part": ""}, then=list),
    "harvest: dataset": lambda at: call(harvest(at).dataset, PRE, 2, then=list),
    "harvest: check_model": lambda at: call(harvest(at).check_model, model()),
    "harvest: verify": lambda at: call(harvests.verify, harvest(at).path, takes={"path": "", "advance": "None"}),
    "harvest: open_harvest": lambda at: call(harvests.open_harvest, harvest(at).path, takes={"path": ""}),
    "harvest: cat": lambda at: call(harvests.cat, harvest(at)),
    "harvest: weights_hash": lambda at: call(harvests.weights_hash, model(), takes={"model": "module"}),
    # prisma_sae
    "sae: monosemanticity": lambda at: call(sae.monosemanticity, drawn(6, 7).relu(), drawn(6, 5)),
    "sae: name_features": lambda at: call(
        sae.name_features, drawn(20, 7).relu(), drawn(20, 2).sigmoid(), ["a", "b"], least=1
    ),
    "sae: feature_attribution": lambda at: call(
        sae.feature_attribution, model(), drawn(1, 3, 8, 12), [coder(), coder("blocks.0.hook_resid_post")], 0, pos=0
    ),
    "sae: splice": lambda at: call(sae.splice, model(), coder(), takes={"tokens": "None"}, then=entered),
    "sae: read": lambda at: call(sae.read, sae.save(coder(), fresh(at)), takes={"path": ""}),
    "sae: SparseCoder.first": lambda at: call(coder().first, 3),
    # prisma_view
    "view: plot": lambda at: call(view.plot, result()),
    "view: patches": lambda at: call(
        view.patches,
        drawn(model().layout.n_patches),
        model().layout,
        takes={"unit": TEXT, "image": "None", "title": TEXT},
    ),
    "view: attention": lambda at: call(
        view.attention, drawn(2, N, N).softmax(-1), model().layout, query=0, takes={"unit": TEXT, "image": "None"}
    ),
    "view: attention_page": lambda at: call(
        view.attention_page, model(), drawn(1, 3, 8, 12), layers=[0], takes={"image": "", "layers": "None"}
    ),
    "view: Figure.save": lambda at: call(view.plot(result()).save, at / "figure.png", dpi=50, takes={"path": ""}),
    "view: symbol": lambda at: call(view.symbol, "square", takes={"label": "'' nonsense"}),
    "view: percent": lambda at: call(view.percent, 0.5),
    # prisma_toy
    "toy: draw_scenes": lambda at: call(toy.draw_scenes, 1, 0, size=48, takes={"seed": SEED}),
    "toy: sample_scene": lambda at: call(toy.sample_scene, 0, 2, 48, takes={"seed": SEED}),
    "toy: draw_captions": lambda at: call(toy.draw_captions, 1, 0, takes={"seed": SEED}),
    "toy: draw_motions": lambda at: call(toy.draw_motions, 1, 0, takes={"seed": SEED}),
    "toy: draw_sums": lambda at: call(toy.draw_sums, 1, 0, takes={"seed": SEED}),
    "toy: draw_sprites": lambda at: call(toy.draw_sprites, 1, 0, takes={"seed": SEED}),
    "toy: draw_digits": lambda at: call(toy.draw_digits, 1, 0, takes={"seed": SEED}),
    "toy: series": lambda at: call(toy.series, "mae-scenes"),
    "toy: training_log": lambda at: call(toy.training_log, "mae-scenes"),
    "toy: draw_hidden": lambda at: call(draw_hidden, 1, 9, 0.5, torch.Generator()),
    "toy: reconstruct": lambda at: call(
        reconstruct, prisma.load("toy:mae-scenes"), drawn(1, 3, 48, 48), torch.ones(1, 64).bool()
    ),
    "toy: hide": lambda at: call(hide, drawn(1, 3, 9, 9), torch.ones(1, 9).bool(), 3),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize("name", CALLS)
def test_nonsense(name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = CALLS[name](place)
    one.run()
    assert not all_faults(one)


def test_reconstructions_need_images_and_bools_that_fit_the_model() -> None:
    for image, hidden in ((drawn(1, 3, 54, 54), None), (drawn(1, 3, 48, 48), drawn(1, 64)), (drawn(3, 48, 48), None)):
        with pytest.raises(InputError, match="got"):
            toy.reconstructions(image, hidden)
    with pytest.raises(NotApplicable, match="makes no pixels"):
        reconstruct(model(), drawn(1, 3, 8, 12), torch.ones(1, 6).bool())
