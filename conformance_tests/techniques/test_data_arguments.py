"""Public functions of what reads, trains and shows, with nonsense in the place of each argument in turn.

As ``test_technique_arguments.py`` does it for reading and intervening.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import numpy as np
import prisma_dino as dino
import prisma_harvest as harvests
import prisma_sae as sae
import prisma_toy as toy
import prisma_view as view
import pytest
import torch
from arguments import Call, all_faults, call, uncalled
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


def anew(function: Callable[..., Any], at: Path) -> Callable[..., Any]:
    """Return a function that writes to a place of its own in each call, where no other place is asked for."""

    @wraps(function)
    def run(*arguments: Any, out: Any, **options: Any) -> Any:
        return function(*arguments, out=fresh(at) if isinstance(out, Path) and out == at else out, **options)

    return run


@cache
def reported() -> view.Report:
    classifier = build(n_classes=3).float()
    classifier.labels, classifier.preprocess = ("cat", "dog", "emu"), Preprocess(size=(8, 12))
    return view.report(classifier, *np.zeros((2, 8, 12, 3), np.uint8))


def passed(at: Path) -> harvests.Pass:
    harvest(at)
    return harvests.Pass(model(), at / "photos", PRE, batch=2)


def saved(at: Path, **tensors: torch.Tensor) -> Path:
    torch.save(tensors, path := at / f"{len(list(at.iterdir()))}.pth")
    return path


def vocabulary(at: Path) -> Path:
    """Return a folder with a vocabulary."""
    toy.Words(["a", "b"], 3).save_pretrained(folder := fresh(at))
    return folder


@cache
def shown_units(at: Path) -> view.Gallery:
    return view.gallery(model(), passed(at).data, PRE, out=fresh(at), k=2, progress=False)


CALLS: dict[str, Callable[[Path], Call]] = {
    # prisma_harvest
    "harvest: point": lambda at: call(harvest(at).point, PRE),
    "harvest: example": lambda at: call(harvest(at).example, 0, PRE),
    "harvest: read": lambda at: call(harvest(at).read, PRE, 0, 4, takes={"stop": "10**18 int64"}),
    "harvest: batches": lambda at: call(harvest(at).batches, PRE, 2, then=list),
    "harvest: rows": lambda at: call(harvest(at).rows, PRE, 2, takes={"seed": SEED, "part": ""}, then=list),
    "harvest: dataset": lambda at: call(harvest(at).dataset, PRE, 2, then=list),
    "harvest: tokens_of": lambda at: call(harvest(at).tokens_of, PRE),
    "harvest: layout_of": lambda at: call(harvest(at).layout_of, PRE),
    "harvest: positions_of": lambda at: call(harvest(at).positions_of, PRE),
    "harvest: Manifest.tokens": lambda at: call(harvest(at).manifest.tokens, harvest(at).point(PRE)),
    "harvest: Manifest.layout_of": lambda at: call(harvest(at).manifest.layout_of, harvest(at).point(PRE)),
    "harvest: Manifest.positions": lambda at: call(harvest(at).manifest.positions, harvest(at).point(PRE)),
    "harvest: check_model": lambda at: call(harvest(at).check_model, model()),
    "harvest: verify": lambda at: call(harvests.verify, harvest(at).path, takes={"path": "", "advance": "None"}),
    "harvest: open_harvest": lambda at: call(harvests.open_harvest, harvest(at).path, takes={"path": ""}),
    "harvest: cat": lambda at: call(harvests.cat, harvest(at)),
    "harvest: harvest": lambda at: call(
        anew(harvests.harvest, at), model(), passed(at).data, PRE, out=at, progress=False, takes={"out": "nonsense"}
    ),
    "harvest: Pass.run": lambda at: call(passed(at).run, 0, takes={"start": "int64"}, then=list),
    "harvest: Pass.batches": lambda at: call(passed(at).batches, 0, 1, takes={"start": "int64"}, then=list),
    "harvest: Pass.activations": lambda at: call(
        passed(at).activations, passed(at).batches(), takes={"batches": ""}, then=list
    ),
    "harvest: Pass.manifest": lambda at: call(passed(at).manifest, "float32", 4),
    "harvest: open_data": lambda at: call(
        harvests.open_data,
        passed(at).data,
        takes={"data": "[1,2.5] b'x'", "image_column": "None", "label_column": "None"},
    ),
    "harvest: top_examples": lambda at: call(harvests.top_examples, harvest(at), PRE, 2, progress=False),
    "harvest: Harvest.to_arrow": lambda at: call(harvest(at).to_arrow, PRE, then=lambda batches: batches.read_all()),
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
    "sae: train": lambda at: call(
        sae.train,
        [drawn(8, 4)] * 2,
        sae.TrainConfig(d_sae=6, k=2),
        steps=2,
        takes={"about": "None {}", "progress": "None", "steps": ""},
    ),
    "sae: evaluate": lambda at: call(
        sae.evaluate, model(), coder(), drawn(2, 3, 8, 12), takes={"hook": "None ''", "progress": "None"}
    ),
    "sae: activation_rows": lambda at: call(
        sae.activation_rows,
        model(),
        lambda number: None if number else drawn(2, 3, 8, 12),
        PRE,
        batch=4,
        buffer=8,
        takes={"images": "", "seed": SEED},
        then=list,
    ),
    "sae: load": lambda at: call(sae.load, "scenes-3l", takes={"path": "None"}),
    "sae: open_coder": lambda at: call(sae.open_coder, "scenes-3l"),
    "sae: save": lambda at: call(sae.save, coder(), fresh(at)),
    "sae: SparseCoder.encode": lambda at: call(coder().encode, drawn(2, model().spec.d_model)),
    "sae: SparseCoder.decode": lambda at: call(coder().decode, drawn(2, 7)),
    "sae: SparseCoder.forward": lambda at: call(coder().forward, drawn(2, model().spec.d_model)),
    "sae: SparseCoder": lambda at: call(
        sae.SparseCoder, coder().facts, {name: x.detach() for name, x in coder().state_dict().items()}
    ),
    "sae: SparseCoder.features": lambda at: call(coder().features, drawn(2, model().spec.d_model)),
    "sae: SparseCoder.with_facts": lambda at: call(coder().with_facts),
    "harvest: Pass": lambda at: call(
        harvests.Pass,
        model(),
        passed(at).data,
        PRE,
        takes={"names": "None", "note": TEXT, "data_name": TEXT, "workers": "None int64"},
    ),
    "harvest: Manifest.read": lambda at: call(harvests.Manifest.read, harvest(at).path, takes={"folder": ""}),
    "view: AttentionPage.save": lambda at: call(
        view.attention_page(model(), drawn(1, 3, 8, 12), layers=[0]).save, fresh(at)
    ),
    "toy: reconstructions": lambda at: call(toy.reconstructions, drawn(1, 3, 48, 48)),
    "toy: Words.from_pretrained": lambda at: call(toy.Words.from_pretrained, vocabulary(at), takes={"folder": ""}),
    "view: Gallery.unit": lambda at: call(shown_units(at).unit, 0),
    # prisma_dino
    "dino: last_layers": lambda at: call(dino.last_layers, model(), drawn(1, 3, 8, 12), takes={"n": ""}),
    "dino: linear_input": lambda at: call(dino.linear_input, model(), drawn(1, 3, 8, 12), takes={"n": ""}),
    "dino: load_linear_head": lambda at: call(
        dino.load_linear_head, saved(at, weight=drawn(3, 4), bias=drawn(3)), takes={"path": ""}
    ),
    # prisma_view
    "view: gallery": lambda at: call(
        anew(view.gallery, at),
        model(),
        passed(at).data,
        PRE,
        out=at,
        k=2,
        progress=False,
        takes={"out": "nonsense", "name": "", "words": "[] array"},
    ),
    "view: report": lambda at: call(view.report, reported().model, *np.zeros((2, 8, 12, 3), np.uint8)),
    "view: overview": lambda at: call(
        view.overview, reported().model, np.zeros((8, 12, 3), np.uint8), takes={"words": "[] array"}
    ),
    "view: write_page": lambda at: call(
        view.write_page, reported(), fresh(at), takes={"command": TEXT, "path": "nonsense"}
    ),
    "view: write_images": lambda at: call(view.write_images, reported(), fresh(at)),
    "view: Report.symbol": lambda at: call(reported().symbol, 0, takes={"index": ""}),
    "view: Overview.save": lambda at: call(
        view.overview(reported().model, np.zeros((8, 12, 3), np.uint8)).save, fresh(at)
    ),
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
    "toy: normalise": lambda at: call(toy.normalise, drawn(1, 3, 8, 8), takes={"image": "tensor"}),
    "toy: patch_classes": lambda at: call(toy.patch_classes, toy.draw_scenes(1, size=48), 4),
    "toy: Scenes.patch_classes": lambda at: call(toy.draw_scenes(1, size=48).patch_classes, 4),
    "toy: Scenes.share": lambda at: call(toy.draw_scenes(1, size=48).share, 4),
    "toy: Sums.patch_classes": lambda at: call(toy.draw_sums(1).patch_classes, 4),
    "toy: SampleScene.patch_classes": lambda at: call(toy.sample_scene(0, 2, 48).patch_classes, 4),
    "toy: Captioned.patch_things": lambda at: call(toy.draw_captions(1).patch_things, 8),
    "toy: Words": lambda at: call(toy.Words, ["a", "b"], 3, takes={"words": "[] array"}),
    "toy: Words.__call__": lambda at: call(
        toy.Words(["a", "b"], 3).__call__, "a b", takes={"texts": "'' nonsense [] array"}
    ),
    "toy: Words.decode": lambda at: call(toy.Words(["a", "b"], 3).decode, torch.tensor([0, 1]), takes={"tokens": ""}),
    "toy: Words.unknown": lambda at: call(
        toy.Words(["a", "b"], 3).unknown, "a c", takes={"texts": "'' nonsense [] array"}
    ),
    "toy: Words.save_pretrained": lambda at: call(toy.Words(["a", "b"], 3).save_pretrained, fresh(at)),
    "toy: draw_hidden": lambda at: call(draw_hidden, 1, 9, 0.5, torch.Generator()),
    "toy: reconstruct": lambda at: call(
        reconstruct, prisma.load("toy:mae-scenes"), drawn(1, 3, 48, 48), torch.ones(1, 64).bool()
    ),
    "toy: hide": lambda at: call(hide, drawn(1, 3, 9, 9), torch.ones(1, 9).bool(), 3),
}


# Why something public is not called with nonsense.
EXEMPT = {
    **dict.fromkeys(
        [
            "prisma_harvest.Harvest",
            *(f"prisma_view.{name}" for name in ("Figure", "AttentionPage", "Overview", "Gallery", "Report")),
            *(f"prisma_toy.{name}" for name in ("SampleScene", "Scenes", "Captioned", "Motions", "Sums", "Sprites")),
        ],
        "made by the function that returns it",
    ),
    **dict.fromkeys(
        [
            f"prisma_toy.ToySource{name}"
            for name in ("", ".checkpoints", ".load", ".load_processor", ".sample", ".save_processor")
        ],
        "called by the core: the tests of references",
    ),
    "prisma_view.prisma_commands": "called by the host",
}


def test_every_public_function_is_called(place: Path) -> None:
    assert not uncalled([harvests, sae, view, toy], (make(place) for make in CALLS.values()), EXEMPT)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize("name", CALLS)
def test_nonsense(name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "sae: train":
        pytest.importorskip("overcomplete.sae", reason="needs pip install 'prisma-interp[sae-train]'")
    one = CALLS[name](place)
    one.run()
    assert not all_faults(one)


def test_reconstructions_need_images_and_bools_that_fit_the_model() -> None:
    for image, hidden in ((drawn(1, 3, 54, 54), None), (drawn(1, 3, 48, 48), drawn(1, 64)), (drawn(3, 48, 48), None)):
        with pytest.raises(InputError, match="got"):
            toy.reconstructions(image, hidden)
    with pytest.raises(NotApplicable, match="makes no pixels"):
        reconstruct(model(), drawn(1, 3, 8, 12), torch.ones(1, 6).bool())
