"""Every argument of every public function of the core in turn is nonsense: an error in words, or a listed result."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from arguments import ANYTHING, Call, call, cases, faults, public_callables
from torch import Tensor
from windows import Adapter, Upstream

import prisma_core as prisma
from prisma_core import HookedDual, HookedText, HookedViT, ModelSpec, PrismaError, Result
from prisma_core.inputs import Preprocess
from prisma_core.inputs.video import VideoPreprocess
from prisma_core.spec import DualSpec, Interpolation, RopeCount, TextSpec
from prisma_core.transformer.dual import DualCache
from prisma_core.transformer.factored import FactoredMatrix
from prisma_core.transformer.stream import StreamCache
from prisma_core.zoo import adapt_with

KINDS = (StreamCache, DualCache, FactoredMatrix)
NO_HOOKS = "None {}"
INT = "int64"  # a number where numbers are asked for
NAMES = "None [] {} set() array"  # all names, or none
SOME = "None int64"  # all places, or one

VISION = ModelSpec.plain(layers=4, heads=4, registers=1, n_classes=7)
TEXT = TextSpec.plain(layers=4, heads=4, n_classes=7)
LABELS = ("cat", "dog", "emu", "fox", "gnu", "hen", "ibex")
IMAGES = torch.randn(4, 3, 8, 12, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(32).view(4, 8) % 20
FOLDER = Path(mkdtemp())


def tokenizer(texts: list[str]) -> Tensor:
    return TOKENS[: len(texts)]


def models() -> tuple[HookedViT, HookedText, HookedDual]:
    torch.manual_seed(0)
    vit, text, dual = HookedViT(VISION), HookedText(TEXT), HookedDual(DualSpec(vision=VISION, text=TEXT))
    for model in (vit, text, dual):
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.eval()
    vit.labels, vit.preprocess, dual.preprocess = LABELS, Preprocess(size=(8, 12)), Preprocess(size=(8, 12))
    text.tokenizer = dual.tokenizer = tokenizer
    return vit, text, dual


VIT, BOOK, DUAL = models()
MAPPED = adapt_with(Adapter(), Upstream())
WINDOWS = torch.randn(2, 6, 4)
with torch.no_grad():
    CACHE: Any = VIT.run_with_cache(IMAGES, names=lambda name: True)[1]
    PAIR: Any = DUAL.run_with_cache(IMAGES, TOKENS)[1]
    STACK = CACHE.decompose_resid()
FILE = CACHE.save(FOLDER / "cache.safetensors")
MATRIX = FactoredMatrix(torch.randn(4, 5, 2), torch.randn(4, 2, 5))
RESULT = Result(torch.randn(4, 4), ("layer", "head"), {"layer": ("a", "b", "c", "d")})
SAVED = RESULT.save(FOLDER / "result.safetensors")
STATE = {name: tensor.detach() for name, tensor in VIT.state_dict().items()}


def same(x: Tensor, at: object) -> None:
    return None


def run(scope: Any) -> object:
    """Run the model inside a scope."""
    with scope as inside:
        VIT(IMAGES)
    return inside


class Half:
    """A splice."""

    points: ClassVar[dict[str, prisma.HookPoint]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        return x / 2


HOW = {"device": "None", "dtype": "None", "pos": SOME, "heads": SOME}
STREAM = {"layer": SOME, "pos_slice": SOME}
READ = {
    "pos_slice": "None",
    "batch_slice": "None",
    "against": "None int64",
    "tokens": "None",
    "incorrect_tokens": "None int64",
}
VIEW = {"layer": "int64", "axis": "None"}
SIZED = {"batch": INT, "size": "None", "generator": "None"}

CALLS: dict[str, Call] = {
    # models: load, prove, look
    "load": call(prisma.load, f"file:{prisma.save(VIT, FOLDER / 'vit')}", takes={"device": "None", "dtype": "None"}),
    "adapt": call(prisma.adapt, Upstream(), adapter=Adapter()),
    "check": call(
        prisma.check,
        Upstream(),
        adapter=Adapter(),
        checks="algebra",
        takes={
            "seed": f"{INT} -99 10**18",
            **dict.fromkeys(["checks", "device", "dtypes", "starting", "progress"], "None"),
            "upstream": "None module",  # read for hooked models alone
        },
    ),
    "export": call(prisma.export, MAPPED),
    "save": call(prisma.save, VIT, FOLDER / "saved", takes={"folder": "nonsense"}),
    "outline": call(prisma.outline, f"file:{FOLDER / 'vit'}"),
    "shapes": call(prisma.shapes, VIT, 1, takes={"batch": INT}),
    "rewrite": call(prisma.rewrite, VIT, prisma.fold_layer_norm),
    "fold_layer_norm": call(prisma.fold_layer_norm, VISION, STATE),
    "fold_layer_scale": call(prisma.fold_layer_scale, VISION, STATE),
    "center_writing_weights": call(prisma.center_writing_weights, VISION, STATE),
    "fold_value_biases": call(prisma.fold_value_biases, VISION, STATE),
    "refactor_factored_attn_matrices": call(prisma.refactor_factored_attn_matrices, VISION, STATE),
    "tensors_of": call(prisma.tensors_of, VIT, takes={"module": "module"}),
    "assign": call(prisma.assign, copy.deepcopy(VIT), STATE, takes={"model": "", "tensors": "{}"}),
    "resize_positions": call(
        prisma.resize_positions, torch.randn(6, 5), Interpolation(), (2, 3), (4, 6), takes={"size": INT}
    ),
    "count_tables": call(
        prisma.count_tables,
        RopeCount(pairs=1, theta=2, rows=2, columns=3),
        "half",
        6,
        1,
        6,
        torch.zeros(1),
        takes={"n_patches": INT, "n_prefix": INT, "like": "tensor"},
    ),
    "attentions": call(prisma.attentions, VIT.blocks[0]),
    "mlps": call(prisma.mlps, VIT.blocks[0]),
    "BriefModel.model_copy": call(VISION.model_copy, update={"n_classes": 3}, takes={"update": "None {}"}),
    "ModelSpec.plain": call(
        ModelSpec.plain,
        patch=1,
        takes={"d_model": INT, "layers": INT, "heads": INT, "patch": INT, "image": INT, "norm": "None"},
    ),
    # scopes and runs
    "HookedModel.hooks": call(
        VIT.hooks, {"z": same}, backward={"z": same}, then=run, takes={"hooks": NO_HOOKS, "backward": NO_HOOKS}
    ),
    "HookedModel.caching": call(VIT.caching, "z", then=run, takes={**HOW, "names": NAMES}),
    "HookedModel.splicing": call(
        VIT.splicing,
        {("z", 0): Half()},
        reads={("z", 1): Half()},
        then=run,
        takes={"splices": "{}", "reads": "None {}"},
    ),
    "HookedModel.run_with_hooks": call(
        VIT.run_with_hooks, IMAGES, hooks={"z": same}, takes={"hooks": NO_HOOKS, "backward": NO_HOOKS}
    ),
    "HookedModel.run_with_cache": call(
        VIT.run_with_cache,
        IMAGES[:1],
        names="z",
        takes={**HOW, "names": NAMES, "hooks": NO_HOOKS, "loss": "None"},
    ),
    "HookedModel.resolve": call(VIT.resolve, "z", takes={"query": NAMES}),
    "HookedViT.forward": call(
        VIT.forward,
        IMAGES,
        takes={"start_at_layer": "None", "stop_at_layer": SOME, "grid": "None", "leading": f"{SOME} 10**18"},
    ),
    "HookedViT.forward from a stream": call(
        VIT.forward,
        STACK.sum(0),
        start_at_layer=4,
        grid=(2, 3),
        takes={"start_at_layer": INT, "stop_at_layer": "None", "grid": "None", "leading": f"{SOME} 10**18"},
    ),
    "HookedViT.unembed": call(VIT.unembed, STACK.sum(0)),
    "HookedText.forward": call(BOOK.forward, TOKENS, takes={"stop_at_layer": SOME}),
    "HookedText.tokens": call(BOOK.tokens, "a cat", takes={"text": "'' nonsense tensor"}),
    "HookedText.unembed": call(BOOK.unembed, torch.zeros(4, 8, 12), TOKENS),
    "HookedText.positions": call(BOOK.positions, TOKENS),
    "HookedText.shares": call(BOOK.shares, TOKENS),
    "HookedDual.forward": call(DUAL.forward, IMAGES, TOKENS),
    "HookedDual.compare": call(DUAL.compare, torch.zeros(2, 7), torch.zeros(3, 7)),
    "HookedDual.encode_image": call(DUAL.encode_image, IMAGES),
    "HookedDual.encode_text": call(DUAL.encode_text, "a cat", takes={"text": "'' nonsense"}),
    "HookedDual.classify": call(DUAL.classify, IMAGES, ["cat", "dog"], takes={"labels": "'' nonsense"}),
    "HookedDual.tokens": call(DUAL.tokens, "a cat", takes={"text": "'' nonsense tensor"}),
    "HookedUpstream.forward": call(MAPPED.forward, WINDOWS),
    "HookedViT.sample_inputs": call(VIT.sample_inputs, takes=SIZED),
    "HookedText.sample_inputs": call(BOOK.sample_inputs, takes=SIZED),
    "HookedDual.sample_inputs": call(DUAL.sample_inputs, takes=SIZED),
    "HookedUpstream.sample_inputs": call(MAPPED.sample_inputs, takes={**SIZED, "size": "None"}),
    "Circuits.all_composition_scores": call(VIT.all_composition_scores, "K", takes={"rotation": "None"}),
    "Circuits.accumulated_bias": call(VIT.accumulated_bias, 1, takes={"layer": SOME}),
    "HookedViT": call(HookedViT, VISION, takes={"stem": "None module"}),
    "HookedText": call(HookedText, TEXT),
    "HookedDual": call(HookedDual, DualSpec(vision=VISION, text=TEXT), takes={"stem": "None module"}),
    # caches
    "ActivationCache.full_name": call(CACHE.full_name, ("z", 0)),
    "ActivationCache.to": call(CACHE.to, "cpu", takes={"device": "None", "dtype": "None"}),
    "ActivationCache.save": call(CACHE.save, FOLDER / "again.safetensors"),
    "ActivationCache.load": call(StreamCache.load, FILE, VIT, takes={"model": "None"}),
    "TokenViews.patches": call(CACHE.patches, "resid_post", 0, takes=VIEW),
    "TokenViews.frame": call(CACHE.frame, 0, "resid_post", 0, takes=VIEW),
    "TokenViews.cls": call(CACHE.cls, "resid_post", 0, takes=VIEW),
    "TokenViews.registers": call(CACHE.registers, "resid_post", 0, takes=VIEW),
    "DualCache.tower": call(PAIR.tower, "vision"),
    "StreamCache.decompose_resid": call(CACHE.decompose_resid, 1, takes=STREAM),
    "StreamCache.accumulated_resid": call(CACHE.accumulated_resid, 1, takes=STREAM),
    "StreamCache.stack_head_results": call(
        CACHE.stack_head_results, takes={**STREAM, "source": SOME, "project_output_onto": "None"}
    ),
    "StreamCache.stack_neuron_results": call(
        CACHE.stack_neuron_results, takes={**STREAM, "neuron_slice": SOME, "project_output_onto": "None"}
    ),
    "Stream.apply_slice_to_batch_dim": call(CACHE.apply_slice_to_batch_dim, [0, 1], takes={"batch_slice": SOME}),
    "LogitAttribution.apply_ln_to_stack": call(
        CACHE.apply_ln_to_stack,
        STACK,
        1,
        takes={"layer": SOME, "pos_slice": "None", "batch_slice": "None"},
    ),
    "LogitAttribution.project_stack": call(
        CACHE.project_stack, STACK, takes={"pos_slice": "None", "batch_slice": "None"}
    ),
    "LogitAttribution.logit_attrs": call(CACHE.logit_attrs, STACK, "cat", takes={**READ, "classes": INT}),
    "LogitAttribution.logit_constant": call(
        CACHE.logit_constant, "cat", takes={"classes": SOME, "against": SOME, "pos_slice": ANYTHING}
    ),
    "LogitAttribution.directions": call(CACHE.directions, "cat", takes={"classes": INT, "against": SOME}),
    # places, results, matrices
    "TokenLayout.slice": call(VISION.layout.slice, "cls"),
    "TokenLayout.positions": call(VISION.layout.positions, "cls", takes={"pos": SOME}),
    "TokenLayout.grid": call(VISION.layout.grid, torch.zeros(2, 8, 3, 1), takes={"axis": ""}),
    "Result.names": call(RESULT.names, "layer"),
    "Result.index": call(RESULT.index, "layer", "a", takes={"where": INT}),
    "Result.top": call(RESULT.top, 2, takes={"k": f"{INT} 10**18"}),
    "Result.save": call(RESULT.save, FOLDER / "other.safetensors"),
    "Result.load": call(Result.load, SAVED),
    "FactoredMatrix.get_corner": call(MATRIX.get_corner, 2, takes={"k": f"{INT} 10**18"}),
    "FactoredMatrix.unsqueeze": call(MATRIX.unsqueeze, 0),
    "FactoredMatrix": call(FactoredMatrix, torch.zeros(5, 2), torch.zeros(2, 5)),
    "FactoredMatrix @": call(MATRIX.__matmul__, torch.zeros(5)),
    "@ FactoredMatrix": call(MATRIX.__rmatmul__, torch.zeros(5)),
    "FactoredMatrix *": call(MATRIX.__mul__, 2.0, takes={"factor": "3.5 nan -99 10**18 int64 tensor"}),
    "FactoredMatrix /": call(MATRIX.__truediv__, 2.0, takes={"divisor": "3.5 nan -99 10**18 int64 tensor"}),
    "FactoredMatrix []": call(MATRIX.__getitem__, 0, takes={"index": "None int64"}, raises=(PrismaError, IndexError)),
    "Result": call(
        Result,
        torch.zeros(2, 3),
        ("a", "b"),
        {"a": ("x", "y")},
        takes={
            **dict.fromkeys(["technique", "unit", "baseline", "total"], "'' nonsense"),
            **dict.fromkeys(["labels", "tensors", "facts"], "{}"),
        },
    ),
    "a place of a Result": call(lambda where: RESULT.sel(layer=where), 0, takes={"where": INT}),
    "places of a Result": call(lambda where: RESULT.sel(layer=[0, where]), 0, takes={"where": INT}),
    "cache []": call(CACHE.__getitem__, ("z", 0)),
    "both towers' cache []": call(PAIR.__getitem__, ("vision.z", 0)),
    "open a video": call(VideoPreprocess(frames=2, each=VIT.preprocess), np.zeros((4, 8, 12, 3), np.uint8)),
    "HookPoint": call(prisma.HookPoint, "batch pos", "x", takes={"equation": "'' nonsense", "axes": "'' nonsense"}),
    "open an image": call(VIT.preprocess, np.zeros((9, 9), np.uint8)),
    "show normalised pixels": call(VIT.preprocess.denormalise, IMAGES[0]),
}

# Why a public method is not called with nonsense.
EXEMPT = {
    "Result.sel": "its arguments have names of the result's own: the tests of results",
    "Result.plot": "options of the plugin that draws",
    "ActivationCache.keys": "",
    **dict.fromkeys(
        [
            f"{kind}.{name}"
            for kind in ("HookedModel", "HookedViT", "HookedText", "HookedDual", "HookedUpstream")
            for name in ("layout_for", "tokens_in", "attribute_hint")
        ]
        + [
            "ActivationCache.keeps",
            "RecipeCache.keeps",
            "Circuits.place_of",
            "HookedViT.readouts",
            "HookedText.readouts",
        ],
        "called by the core with what it has at hand",
    ),
}


def test_every_public_function_is_called() -> None:
    public = set(public_callables(prisma, KINDS))
    called = {name.split(" ")[0] for name in CALLS}
    assert not public - called - set(EXEMPT)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some nonsense is a path


@pytest.mark.parametrize(("name", "argument"), cases(CALLS))
def test_nonsense_is_an_error_in_words_or_listed(name: str, argument: str) -> None:
    assert not (wrong := faults(CALLS[name], argument)), "\n".join(wrong)


@pytest.mark.parametrize("name", CALLS)
def test_the_call_itself_works(name: str) -> None:
    CALLS[name].run()
