"""Every field of open_clip's configurations, moved by itself: followed, refused in words, without effect, or not built.

Facts are read off built modules. This stands in for the configuration: whatever it says, the numbers of both towers and
of the whole are open_clip's own, or there are none.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from prisma_conformance import tolerances
from prisma_conformance.checks.tensors import fingerprint
from prisma_conformance.measure import worst
from torch import Tensor, nn

import prisma_core as prisma
from prisma_core.errors import UnsupportedArchitecture
from prisma_core.plugin.host import installed
from prisma_core.toolbox.attention import float64_softmax
from prisma_core.transformer import HookedDual
from prisma_core.zoo import tensors_of

open_clip = pytest.importorskip("open_clip", reason="open_clip is missing: pip install 'prisma-interp[clip]'")
transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'prisma-interp[clip]'")
pytest.importorskip("prisma_timm", reason="the plugin for timm's towers is not installed")

from open_clip.coca_model import CoCa, MultimodalCfg  # noqa: E402
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP  # noqa: E402

Config = dict[str, Any]
Fields = dict[str, tuple[Any, ...]]

# -------------------------------------------------------------------- what is moved, and to what

BLOCKS: Fields = {
    "mlp_ratio": (1.6,),
    "ls_init_value": (0.1,),
    "act_kwargs": ({}, {"approximate": "tanh"}),
    "norm_kwargs": ({"eps": 1e-2}, {"bias": False}, {"elementwise_affine": False}),
    "block_type": ("default", "custom"),
    "qk_norm": (True,),
    "scaled_cosine_attn": (True,),
    "scale_heads": (True,),
    "scale_attn_inner": (True,),
    "scale_attn": (True,),
    "scale_fc": (True,),
}
VISION: Fields = {
    **BLOCKS,
    "layers": (2, (1, 1, 1, 1)),
    "width": (48,),
    "head_width": (12, 20),
    "patch_size": (8, (16, 8)),
    "image_size": (48, (32, 64), 40),
    "patch_dropout": (0.5,),
    "attentional_pool": (True, "parallel", "cascade"),
    "attn_pooler_queries": (3,),
    "attn_pooler_heads": (2,),
    "no_ln_pre": (True,),
    "pos_embed_type": ("sin_cos_2d", "none"),
    "final_ln_after_pool": (True,),
    "pool_type": ("tok", "avg", "none"),
    "output_tokens": (True, False),
    "timm_model_name": ("test_vit2", "test_vit3", "test_convnext"),
    "timm_model_pretrained": (False,),
    "timm_pool": ("token", "", "avgmax", "abs_attn", "rot_attn", "map"),
    "timm_proj": ("mlp", "none", ""),
    "timm_proj_bias": (True,),
    "timm_drop": (0.5,),
    "timm_drop_path": (0.5,),
}
TEXT: Fields = {
    **BLOCKS,
    "context_length": (5,),
    "vocab_size": (31,),
    "hf_tokenizer_name": ("any/other",),
    "tokenizer_mode": ("clips",),
    "tokenizer_kwargs": ({"clean": "canonicalize"},),
    "width": (16, 24),
    "heads": (4,),
    "layers": (2,),
    "embed_cls": (True,),
    "pad_id": (7,),
    "eos_id": (9,),
    "no_causal_mask": (True,),
    "final_ln_after_pool": (True,),
    "pool_type": ("first", "last", "argmax", "eos", "none"),
    "proj_bias": (True,),
    "proj_type": ("none",),
    "output_tokens": (True, False),
    "hf_model_name": ("xlm-roberta", "bert", "mt5"),
    "hf_model_pretrained": (True,),
    "hf_proj_type": ("linear", None),
    "hf_pooler_type": ("max_pooler", "cls_pooler", "cls_last_hidden_state_pooler", None),
}
CAPTIONS: Fields = {**TEXT, "dim_head": (32,), "n_queries": (3,), "attn_pooler_heads": (2,)}
WHOLE: Fields = {
    "embed_dim": (16,),
    "quick_gelu": (True,),
    "init_logit_scale": (1.5,),
    "init_logit_bias": (-3.0,),
    "nonscalar_logit_scale": (True,),
    "cast_dtype": (torch.float16, torch.bfloat16),
    "output_dict": (True,),
    "pad_id": (7,),
}
FACTORY: Fields = {
    "custom_text": (True,),  # of the configuration, read by the factory alone
    "force_quick_gelu": (True,),
    "force_custom_text": (True,),
    "force_patch_dropout": (0.5,),
    "force_image_size": (48, (32, 64)),
    "force_context_length": (5,),
    "force_preprocess_cfg": ({"mean": (0.1, 0.2, 0.3)},),
    "precision": ("bf16", "pure_fp16", "fp64"),
    "output_dict": (True,),
    "jit": (True,),
}

# -------------------------------------------------------------------- what they are moved on

SEEN: Config = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16, "attn_pooler_heads": 4}
READ: Config = {"context_length": 7, "vocab_size": 41, "width": 32, "heads": 2, "layers": 1}
TIMM: Config = {"timm_model_name": "test_vit", "image_size": 160}
POOLED: Config = {"attentional_pool": True, "attn_pooler_queries": 5}
WRITES: Config = {"context_length": 7, "vocab_size": 41, "width": 12, "heads": 2, "layers": 1}
BASES: dict[str, tuple[type[nn.Module], Config]] = {
    "native": (CLIP, {"vision_cfg": SEEN | {"pool_type": "avg"}, "text_cfg": READ}),
    "custom": (CustomTextCLIP, {"vision_cfg": SEEN | POOLED, "text_cfg": READ | {"pool_type": "eos"}}),
    "timm": (CustomTextCLIP, {"embed_dim": 64, "vision_cfg": TIMM, "text_cfg": READ}),
    "bert": (CustomTextCLIP, {"vision_cfg": SEEN, "text_cfg": {"hf_model_name": "roberta", "context_length": 7}}),
    "coca": (
        CoCa,
        {
            "vision_cfg": SEEN | POOLED | {"output_tokens": True},
            "text_cfg": READ | {"embed_cls": True, "output_tokens": True},
            "multimodal_cfg": WRITES,
        },
    ),
}
MOVED = {"native": "vw", "custom": "tw", "timm": "vw", "bert": "tw", "coca": "vtmw"}
PARTS = {"v": ("vision_cfg", VISION), "t": ("text_cfg", TEXT), "m": ("multimodal_cfg", CAPTIONS), "w": ("", WHOLE)}
BERT = {"vocab_size": 41, "hidden_size": 32, "intermediate_size": 36, "num_hidden_layers": 1, "pad_token_id": 1}
BERT |= {"num_attention_heads": 2, "max_position_embeddings": 10, "type_vocab_size": 2}
BERT |= {"d_model": 32, "d_kv": 16, "d_ff": 36, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}


@pytest.fixture(scope="module")
def berts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a configuration of each kind of transformers' text models, by name."""
    home = tmp_path_factory.mktemp("berts")
    for kind in ("roberta", "xlm-roberta", "bert", "mt5"):
        (home / kind).mkdir()
        (home / kind / "config.json").write_text(json.dumps({"model_type": kind, **BERT}))
    return home


def configured(base: str, berts: Path, part: str = "", name: str = "", value: Any = None) -> Config:
    """Return a base's configuration, one field moved."""
    whole: Config = {"embed_dim": 32, **copy.deepcopy(BASES[base][1])}
    if name:
        (whole[part] if part else whole)[name] = value
    text = whole["text_cfg"]
    if "hf_model_name" in text:
        text["hf_model_name"] = str(berts / text["hf_model_name"])
        text.setdefault("hf_model_pretrained", False)
    return whole


# -------------------------------------------------------------------- one move


@contextmanager
def quiet() -> Iterator[None]:
    """open_clip warns that weights are random, and torch of scripting."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


@cache
def noise_for(name: str, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def drawn(model: nn.Module) -> nn.Module:
    """Return a model in float64, each parameter drawn by its name, so that two models share what they both have.

    What is a single number, or is not trained, keeps what it was made with, and noise is added.
    """
    model = model.double().eval()
    for name, parameter in model.named_parameters():
        noise = noise_for(name, parameter.shape)
        if parameter.numel() == 1 or not parameter.requires_grad:
            parameter.data.add_(0.2 * noise)
        elif parameter.ndim < 2:
            parameter.data.copy_(0.4 * noise + ("weight" in name or "gamma" in name))
        else:
            parameter.data.copy_(noise / parameter[0].numel() ** 0.5)
    return model


# What is built for half precision computes its norms in float32, and takes nothing wider: no tanh for erf comes near.
IN_FLOAT32 = 1e-5
Numbers = tuple[Tensor, Tensor, Tensor]


def theirs(upstream: Any, image: Tensor, tokens: Tensor) -> Numbers:
    """Return open_clip's own logits of pictures and of texts, and how alike they are."""
    seen, read = upstream.encode_image(image, normalize=False), upstream.encode_text(tokens, normalize=False)
    alike = upstream.logit_scale.exp() * F.normalize(seen, dim=-1) @ F.normalize(read, dim=-1).T
    return seen, read, alike if upstream.logit_bias is None else alike + upstream.logit_bias


def sampled(model: HookedDual) -> tuple[Tensor, Tensor]:
    image, tokens = model.sample_inputs(3, generator=torch.Generator().manual_seed(1))
    return image.double(), tokens


class Verdict(NamedTuple):
    """What came of a move, why, and whether open_clip's model became another one."""

    kind: str
    why: str = ""
    mattered: bool = True


class Base:
    """A model as it is, to compare with."""

    def __init__(self, upstream: nn.Module):
        self.upstream = drawn(upstream)
        self.model = prisma.adapt(self.upstream)
        assert isinstance(self.model, HookedDual)
        self.inputs = sampled(self.model)
        self.numbers = theirs(self.upstream, *self.inputs)

    def mattered(self, upstream: nn.Module) -> bool:
        """Return whether a model's numbers differ by more than rounding, or it cannot take the same inputs."""
        try:
            numbers = theirs(upstream, *self.inputs)
        except Exception:  # noqa: BLE001  # upstream's own, of any type
            return True
        pairs = list(zip(numbers, self.numbers, strict=True))
        return any(a.shape != b.shape or not worst(a, b) <= tolerances.FLOAT64 for a, b in pairs)

    def runs(self, upstream: Any) -> bool:
        """Return whether open_clip's model takes these inputs, or some of the sizes it says it has."""
        image, tokens = self.inputs
        height, width = _pair(getattr(upstream.visual, "image_size", image.shape[2:]))
        images = [image, torch.randn(3, 3, height, width, dtype=torch.float64)]
        for pixels, length in product(images, (tokens.shape[1], upstream.context_length)):
            try:
                numbers = theirs(upstream, pixels, tokens[:, :1].expand(-1, length))
            except Exception:  # noqa: BLE001
                continue
            return all(isinstance(one, Tensor) for one in numbers)
        return False

    def judge(self, make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> Verdict:
        """Build a model, run it, map it, compare."""
        try:
            upstream = drawn(make())
        except Exception as error:  # noqa: BLE001
            return Verdict("not built", f"{type(error).__name__}: {error}")
        mattered = self.mattered(upstream)
        if not mattered and same(upstream, self.upstream):
            return Verdict("same", mattered=False)
        try:
            return self.compared(upstream.to(dtype), mattered)
        except Exception as error:  # noqa: BLE001
            return Verdict("defect", f"{type(error).__name__}: {error}")

    def compared(self, upstream: Any, mattered: bool) -> Verdict:
        try:
            model = prisma.adapt(upstream)
        except UnsupportedArchitecture as refused:
            return Verdict("refused", refused.feature, mattered) if self.runs(upstream) else Verdict("not run")
        assert isinstance(model, HookedDual)
        image, tokens = sampled(model)
        image = image.to(upstream.logit_scale.dtype)
        try:
            wanted = theirs(upstream, image, tokens)
        except Exception as error:
            if self.runs(upstream):
                raise
            return Verdict("not run", f"{type(error).__name__}: {error}")
        made = (model.vision(image), model.text(tokens), model(image, tokens))
        called = installed().adapter(upstream).call(upstream, image, tokens)  # by its own forward
        error = max(worst(a, b) for a, b in zip((*made, called), (*wanted, wanted[2]), strict=True))
        if error <= (tolerances.FLOAT64 if image.dtype == torch.float64 else IN_FLOAT32):
            return Verdict("agrees", "", mattered)
        return Verdict("defect", f"off by {error:.1e} of std", mattered)


def _pair(side: Any) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else tuple(side)


def same(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two models were built alike: the same modules, with the same facts and tensors."""
    if repr(one) != repr(other) or fingerprint(one) != fingerprint(other):
        return False
    tensors, others = tensors_of(one), tensors_of(other)
    return all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


# -------------------------------------------------------------------- the sweep


def values(table: Fields) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, given in table.items() for value in given)


def judged(base: str, berts: Path) -> Iterator[tuple[str, Verdict]]:
    """Yield what came of each move, by part, field and value."""
    kind = BASES[base][0]
    start = Base(kind(**configured(base, berts)))
    for part, table in (PARTS[key] for key in MOVED[base]):
        for name, value in values(table):
            half = isinstance(value, torch.dtype)
            make = partial(kind, **configured(base, berts, part, name, value))
            yield f"{part}.{name}={value}", start.judge(make, torch.float32 if half else torch.float64)


def created(folder: Path, config: Config, **options: Any) -> nn.Module:
    """Return what open_clip's factory makes of a configuration in a folder."""
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False, **options)


def judged_factory(base: str, folder: Path) -> Iterator[tuple[str, Verdict]]:
    config = configured(base, folder)
    start = Base(created(folder, config))
    for name, value in values(FACTORY):
        moved = {name: value}
        inside = name == "custom_text"  # a field of the configuration; the others are options
        make = partial(created, folder, config | moved) if inside else partial(created, folder, config, **moved)
        yield f"{name}={value}", start.judge(make, torch.float32 if name == "precision" else torch.float64)


# What came of each model's moves. ``same``: open_clip builds the very model that it built before.
COUNTS = {
    "native": {"agrees": 33, "refused": 8, "same": 20, "not built": 2, "not run": 2},
    "custom": {"agrees": 34, "refused": 4, "same": 15, "not built": 1, "not run": 3},
    "timm": {"agrees": 21, "refused": 3, "same": 37, "not built": 4},
    "bert": {"agrees": 12, "refused": 3, "same": 38, "not built": 2, "not run": 2},
    "coca": {"agrees": 64, "refused": 10, "same": 80, "not built": 2, "not run": 8},
    "factory, native": {"agrees": 11, "refused": 1, "same": 1},
    "factory, timm": {"agrees": 11, "refused": 1, "same": 1},
}
MATTERED = 194
REFUSED = {
    "a learned scale for each head",
    "sandwich norms, before and after attention",
    "two attention poolings, one for captions and one for the features",
    "'avg' of what attention pooling returns",
    "'none' of what attention pooling returns",
    "a tower that returns all tokens instead of one vector",
    "its kind of tower",  # a ResNet
    "a vision tower that is no plain transformer",
    "a text tower of transformers (BertModel)",
    "a text tower of transformers (MT5Stack)",
    "its kind of pooling",
    "'avgmax' pooling",
    "a projection of more than one layer, or pooling, behind timm's model",
    "no installed plugin adapts this type; a hook map of your own can (docs/how-to-other-architectures.md), and "
    "`prisma models --classes` lists the types that come through",  # a scripted model
}
WITHOUT_EFFECT = {
    "a number, or a list of one": {".nonscalar_logit_scale"},
    "how outputs are wrapped": {".output_dict", "output_dict"},
    "training alone": {
        *("vision_cfg.patch_dropout", "vision_cfg.timm_drop", "vision_cfg.timm_drop_path", "force_patch_dropout"),
    },
    "pictures": {"force_preprocess_cfg"},
    "the same function by other code": {"vision_cfg.block_type", "text_cfg.block_type"},
    "texts": {"text_cfg.hf_tokenizer_name", "text_cfg.tokenizer_kwargs", "text_cfg.tokenizer_mode"},
    "weights from the hub": {"vision_cfg.timm_model_pretrained", "text_cfg.hf_model_pretrained"},
    "captions": {".pad_id", *(f"multimodal_cfg.{name}" for name in CAPTIONS)},
    "the first query alone is read": {"vision_cfg.attn_pooler_queries"},
    "open_clip does not read it": {"text_cfg.final_ln_after_pool"},
    "open_clip runs with one value only": {
        *("vision_cfg.output_tokens", "text_cfg.output_tokens"),
        *("vision_cfg.scaled_cosine_attn", "text_cfg.scaled_cosine_attn"),
    },
    "refused, and the numbers were the same": {"jit"},
}


@torch.no_grad()
def test_every_value_is_followed_refused_or_not_built(berts: Path, tmp_path: Path) -> None:
    found: dict[str, dict[str, Verdict]] = {}
    with quiet():
        for base in BASES:
            with float64_softmax() if base == "bert" else nullcontext():  # which transformers takes in float32
                found[base] = dict(judged(base, berts))
        for base in ("native", "timm"):
            found[f"factory, {base}"] = dict(judged_factory(base, tmp_path))
    every = [(base, move, one) for base, moves in found.items() for move, one in moves.items()]
    assert not [f"{base}: {move}: {one.why}" for base, move, one in every if one.kind == "defect"]
    assert {base: Counter(one.kind for one in moves.values()) for base, moves in found.items()} == COUNTS
    assert {one.why for _, _, one in every if one.kind == "refused"} == REFUSED
    assert sum(one.mattered for _, _, one in every) == MATTERED
    moved = {move.partition("=")[0] for _, move, _ in every}
    effective = {move.partition("=")[0] for _, move, one in every if one.mattered and one.kind in ("agrees", "refused")}
    assert moved - effective == set.union(*WITHOUT_EFFECT.values())


@torch.no_grad()
def test_a_misread_field_is_seen(berts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prisma_core.toolbox.readers.PartReader.activation", lambda self, module: "gelu")
    monkeypatch.setattr("prisma_clip.canonical.native._causal", lambda upstream: True)
    start = Base(CLIP(**configured("native", berts)))
    for part, name, value in (("", "quick_gelu", True), ("text_cfg", "no_causal_mask", True)):
        verdict = start.judge(partial(CLIP, **configured("native", berts, part, name, value)))
        assert (verdict.kind, verdict.mattered) == ("defect", True)


def test_every_field_is_moved() -> None:
    for kind, table in ((CLIPVisionCfg, VISION), (CLIPTextCfg, TEXT), (MultimodalCfg, CAPTIONS)):
        assert {field.name for field in fields(kind)} == set(table)
    for kind in (CLIP, CustomTextCLIP, CoCa):
        assert set(inspect.signature(kind).parameters) <= {*WHOLE, "vision_cfg", "text_cfg", "multimodal_cfg"}
    forced = {name for name in inspect.signature(open_clip.create_model).parameters if name.startswith("force_")}
    assert forced <= set(FACTORY)
