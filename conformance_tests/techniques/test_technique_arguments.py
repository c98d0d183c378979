"""Every public function of the technique plugins, with nonsense in the place of each argument in turn.

It raises an error of Prisma's that says what came, or takes a value that is listed: by the argument's name for all
functions (``TAKES`` of the helper), or in the call for what is special.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import prisma_cite as citing
import prisma_harvest as harvests
import prisma_lens as lens
import prisma_patch as patch
import prisma_registers as registers
import prisma_sae as sae
import prisma_toy as toy
import prisma_view as view
import pytest
import torch
from arguments import Call, all_faults, call, uncalled
from models import build
from PIL import Image

import prisma_core as prisma
from prisma_core import Result
from prisma_core.plugin import Preprocess

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
kind_models = importlib.import_module("kind_models")
sys.path.pop(0)
WIDTH, KINDS = kind_models.WIDTH, kind_models.kinds()
M, D = KINDS["classifier"].model, KINDS["dual encoder"].model
X, Y = KINDS["classifier"].clean, KINDS["classifier"].other
M.labels = ("cat", "dog")
M.preprocess = D.preprocess = Preprocess(size=(8, 8))
Z, PRE, POST = "blocks.0.attn.hook_z", ("resid_pre", 0), "blocks.0.hook_resid_post"
MANY, CLASSES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 2
N = M.layout.n_tokens
FRESH = itertools.count()
TEXT = "'' nonsense"
SCOPES = "Path" if hasattr(Path, "__enter__") else ""  # until Python 3.13 a path is a scope


def entered(scope: Any) -> Any:
    """Run the model inside a scope."""
    with scope as inner:
        return (inner or M)(X)


def fresh(name: str = "") -> Path:
    """Return a path where nothing is."""
    return folder() / f"new{next(FRESH)}{name}"


@cache
def folder() -> Path:
    return Path(tempfile.mkdtemp())


@cache
def photos() -> Path:
    """Return a folder with five images."""
    place = fresh()
    place.mkdir()
    for at in range(5):
        pixels = np.random.default_rng(at).integers(0, 256, (8, 8, 3)).astype("uint8")
        Image.fromarray(pixels).save(place / f"{at}.png")
    return place


@cache
def probed() -> Result:
    return lens.probe(M, [(MANY, CLASSES)], names=PRE, max_iter=5)


@cache
def tuned() -> lens.TunedLens:
    return lens.fit_tuned_lens(M, [X])


@cache
def circuit() -> patch.Circuit:
    return patch.edge_scores(M, X, Y, "cat")[1]


@cache
def word() -> Result:
    return patch.learn_word(D, X, "word3", "word1 {}", steps=2)


@cache
def coder() -> sae.SparseCoder:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (WIDTH, 7), "b_enc": (7,), "W_dec": (7, WIDTH), "b_dec": (WIDTH,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return sae.SparseCoder(sae.CoderFacts(kind="standard", d_in=WIDTH, d_sae=7, d_out=WIDTH), tensors)


@cache
def acts() -> harvests.Harvest:
    return harvests.harvest(M, photos(), PRE, out=fresh(), batch=2, progress=False)


@cache
def registered() -> Any:
    model = build(registers=2).float()
    return model, torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(0))


@cache
def reported() -> view.Report:
    return view.report(prisma.load("toy:scenes-3l"), *(toy.sample_scene(seed).image for seed in (0, 3)))


def run_registered(scope: Any) -> Any:
    with scope as model:
        return model(registered()[1])


# Calls that work, made when they are tried, with what each argument takes beside: by the nonsense's name.
CALLS: dict[str, Callable[[], Call]] = {
    # prisma_lens
    "lens: logit_lens": lambda: call(
        lens.logit_lens, M, X, [0, 1], against=1, tuned=tuned(), topk=1, takes={"target": ""}
    ),
    "lens: logit_lens of a probe": lambda: call(lens.logit_lens, M, X, probed()),
    "lens: token_logits": lambda: call(lens.token_logits, M, torch.randn(1, N, WIDTH)),
    "lens: readout": lambda: call(lens.readout, M, "cat", "dog", labels=["a"]),
    "lens: readout of texts": lambda: call(
        lens.readout, D, ["word3", "word4"], "word5", takes={"target": "'' nonsense", "against": "None '' nonsense"}
    ),
    "lens: TunedLens.of": lambda: call(lens.TunedLens.of, M),
    "lens: TunedLens.translate": lambda: call(tuned().translate, torch.randn(1, N, WIDTH), 0, takes={"layer": ""}),
    "lens: TunedLens.check": lambda: call(tuned().check, M),
    "lens: TunedLens.save": lambda: call(tuned().save, fresh()),
    "lens: TunedLens.load": lambda: call(lens.TunedLens.load, tuned().save(fresh()), takes={"folder": ""}),
    "lens: fit_tuned_lens": lambda: call(lens.fit_tuned_lens, M, [X], start=tuned()),
    "lens: lens_kl": lambda: call(lens.lens_kl, M, [X], tuned()),
    "lens: unembed_hash": lambda: call(lens.unembed_hash, M),
    "lens: attribute": lambda: call(lens.attribute, M, X, "cat", against="dog", takes={"place": "", "pos": "None"}),
    "lens: attribute of a probe": lambda: call(lens.attribute, M, X, probed(), takes={"place": "", "pos": "None"}),
    "lens: names_for": lambda: call(lens.names_for, M, "head"),
    "lens: head_outputs": lambda: call(lens.head_outputs, D, X, takes={"pos": "None"}),
    "lens: mean_ablation": lambda: call(
        lens.mean_ablation, M, [(X, torch.tensor([0, 1]))], [0, 1], takes={"pos": "None"}
    ),
    "lens: segment": lambda: call(
        lens.segment,
        D,
        X,
        "word3",
        against="word4",
        takes={"target": "'' nonsense", "against": "None '' nonsense", "pos": "None"},
    ),
    "lens: textspan": lambda: call(lens.textspan, torch.randn(9, 5), torch.randn(7, 5), 2),
    "lens: name_heads": lambda: call(lens.name_heads, D, X, ["word3", "word4"], k=1, takes={"layers": "None"}),
    "lens: second_order": lambda: call(lens.second_order, M, X, "cat", against="dog", takes={"pos": "None"}),
    "lens: second_order_names": lambda: call(lens.second_order_names, M),
    "lens: neuron_outputs": lambda: call(
        lens.neuron_outputs, M, X, 0, [0], takes={"layer": "", "neurons": "", "pos": "None"}
    ),
    "lens: head_scores": lambda: call(lens.head_scores, M, X),
    "lens: rollout": lambda: call(lens.rollout, M, X),
    "lens: attention_flow": lambda: call(lens.attention_flow, M, X, 0),
    "lens: relevance": lambda: call(lens.relevance, M, X, "cat"),
    "lens: composition": lambda: call(lens.composition, M),
    "lens: induction": lambda: call(lens.induction, M, X, pairs=1, takes={"pairs": ""}),
    "lens: captum_inputs": lambda: call(lens.captum_inputs, M, X, "cat", PRE, takes={"metric": "module lambda"}),
    "lens: gradient_x_activation": lambda: call(lens.gradient_x_activation, M, X, "cat", PRE),
    "lens: integrated_gradients": lambda: call(lens.integrated_gradients, M, X, "cat", PRE, steps=2),
    "lens: grad_cam": lambda: call(lens.grad_cam, M, X, "cat", PRE, relu=False),
    "lens: probe": lambda: call(lens.probe, M, [(MANY, CLASSES)], PRE, labels=["a", "b"], max_iter=3),
    "lens: probe_harvest": lambda: call(
        lens.probe_harvest, acts(), torch.arange(5) % 2, PRE, labels=["a", "b"], epochs=1, batch=2
    ),
    "lens: as_metric": lambda: call(lens.as_metric, M, ("cat", "dog"), takes={"metric": "module lambda"}),
    "lens: logit": lambda: call(lens.logit, 1, takes={"which": "-99 10**18 int64"}),
    "lens: logit_difference": lambda: call(
        lens.logit_difference, 1, 0, takes={"higher": "-99 10**18 int64", "lower": "-99 10**18 int64"}
    ),
    # prisma_patch
    "patch: patch_heads": lambda: call(patch.patch_heads, M, X, Y, "cat"),
    "patch: activation_patch": lambda: call(
        patch.activation_patch, M, X, Y, "cat", at=("z", 0), over="head", takes={"over": "'' [] array", "heads": "None"}
    ),
    "patch: path_patch": lambda: call(
        patch.path_patch, M, X, Y, "cat", ("z", 0), ("q", 1), takes={"receiver_heads": "None", "heads": "None"}
    ),
    "patch: factors_by_place": lambda: call(
        patch.factors_by_place, M, MANY, {"class": CLASSES}, at=("z", 0), by_head=False
    ),
    "patch: attribution_patch": lambda: call(patch.attribution_patch, M, X, Y, "cat", steps=1),
    "patch: switch": lambda: call(patch.switch, M, X[:1], Y[:1], int(M(X[:1]).argmax()), 1 - int(M(X[:1]).argmax())),
    "patch: edge_scores": lambda: call(patch.edge_scores, M, X, Y, "cat", steps=1),
    "patch: find_circuit": lambda: call(patch.find_circuit, M, X, Y, "cat", faithfulness=0.5, steps=1),
    "patch: Circuit.top": lambda: call(circuit().top, 3),
    "patch: Circuit.only": lambda: call(circuit().only, list(circuit().edges)[:2], takes={"edges": "[] array"}),
    "patch: Circuit.without": lambda: call(circuit().without, circuit().edges[0]),
    "patch: Circuit.index": lambda: call(circuit().index, circuit().edges[0]),
    "patch: Circuit.save": lambda: call(circuit().save, fresh(".json")),
    "patch: Circuit.load": lambda: call(patch.Circuit.load, circuit().save(fresh(".json")), takes={"path": ""}),
    "patch: run_circuit": lambda: call(patch.run_circuit, M, circuit(), X, Y),
    "patch: circuit_faithfulness": lambda: call(patch.circuit_faithfulness, M, circuit().top(9), X, Y, "cat"),
    "patch: edge_effects": lambda: call(patch.edge_effects, M, circuit().edges[:2], X, Y, "cat"),
    "patch: over_checkpoints": lambda: call(patch.over_checkpoints, {1: M, 2: M}, lambda model: model(X).mean()),
    "patch: change_points": lambda: call(patch.change_points, torch.tensor([0.0, 0, 0, 0, 5, 5, 5, 5]), resamples=20),
    "patch: learn_word": lambda: call(
        patch.learn_word,
        D,
        X,
        "word3",
        "word1 {}",
        against=["word5"],
        steps=2,
        takes={"word": "nonsense", "against": "[] array", "start": "None nonsense"},
    ),
    "patch: use_word": lambda: call(patch.use_word, D, word(), then=entered),
    "patch: read_word": lambda: call(patch.read_word, D, word(), ["word4", "word5"], takes={"at": "[] set() array"}),
    "patch: ablate": lambda: call(
        patch.ablate,
        M,
        "z",
        pos=0,
        heads=[0],
        neurons=[1],
        method="mean",
        reference=X,
        then=entered,
        takes={"heads": "None", "reference": ""},
    ),
    "patch: knock_out": lambda: call(
        patch.knock_out, M, 0, [1], layers=0, heads=[0], then=entered, takes={"heads": "None"}
    ),
    "patch: causal": lambda: call(patch.causal, M, then=entered, takes={"heads": "None"}),
    "patch: local": lambda: call(patch.local, M, 1, then=entered, takes={"heads": "None"}),
    "patch: steer": lambda: call(
        patch.steer,
        M,
        ("resid_post", 0),
        torch.ones(WIDTH),
        pos=0,
        then=entered,
        takes={"scale": "3.5 -99 10**18 int64 tensor"},
    ),
    "patch: freeze": lambda: call(patch.freeze, M, M.run_with_cache(X, names="z")[1], then=entered),
    "patch: together": lambda: call(patch.together, patch.causal(M), then=entered, takes={"scopes": SCOPES}),
    "patch: sweep": lambda: call(patch.sweep, M, X, [patch.Variant(Z, (slice(None), 0), None)], "cat"),
    "patch: Variant.apply": lambda: call(patch.Variant(Z, (slice(None), 0), None).apply, torch.randn(2, N, 2, 6)),
    # prisma_registers
    "registers: token_norms": lambda: call(registers.token_norms, *registered()),
    "registers: TokenNorms.outliers": lambda: call(
        registers.token_norms(*registered()).outliers, factor=2.0, takes={"factor": "None 3.5 10**18 int64 tensor"}
    ),
    "registers: TokenNorms.first_layer": lambda: call(
        registers.token_norms(*registered()).first_layer, cutoff=1.0, takes={"cutoff": "None 3.5 10**18 int64 tensor"}
    ),
    "registers: TokenNorms.by_layer": lambda: call(
        registers.token_norms(*registered()).by_layer, factor=1.0, takes={"factor": "None 3.5 10**18 int64 tensor"}
    ),
    "registers: attention_to": lambda: call(registers.attention_to, *registered()),
    "registers: without_registers": lambda: call(registers.without_registers, registered()[0], then=run_registered),
    "registers: extra_registers": lambda: call(registers.extra_registers, registered()[0], 1, then=run_registered),
    "registers: registers_at_test_time": lambda: call(
        registers.registers_at_test_time, registered()[0], [registers.Neuron(0, 1)], then=run_registered
    ),
    "registers: register_neurons": lambda: call(
        registers.register_neurons, *registered(), cutoff=0.1, takes={"cutoff": "int64 3.5 tensor"}
    ),
    "patch: Variant": lambda: call(
        patch.Variant,
        Z,
        (slice(None), 0),
        None,
        takes={"name": TEXT, "part": "[] [1,2.5] array", "source": "None tensor"},
    ),
    # prisma_cite
    "citing: cite": lambda: call(citing.cite, "textspan"),
    "citing: bibtex": lambda: call(citing.bibtex, citing.cite("textspan"), takes={"citations": "{}"}),
}


# Why something public is not called with nonsense.
EXEMPT = {
    **dict.fromkeys(
        [
            "prisma_lens.Lens",
            "prisma_lens.Readout",
            "prisma_lens.TunedLens",
            "prisma_patch.Switch",
            "prisma_patch.Circuit",
            "prisma_registers.TokenNorms",
            "prisma_registers.LayerNorms",
            "prisma_cite.Citation",
        ],
        "made by the function that returns it",
    ),
    "prisma_registers.Neuron": "a plain record, which what takes it checks",
    "prisma_patch.Circuit.plot": "options of the plugin that draws",
    "prisma_patch.prisma_commands": "called by the host",
}


def test_every_public_function_is_called() -> None:
    assert not uncalled([lens, patch, registers, citing], (make() for make in CALLS.values()), EXEMPT)


@pytest.mark.parametrize("name", CALLS)
def test_nonsense(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = CALLS[name]()
    one.run()
    assert not all_faults(one)
