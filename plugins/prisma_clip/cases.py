"""Conformance cases: every architecture of open_clip's that the adapters take, built small."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import open_clip
import torch
from prisma_conformance import CHECKS
from torch import nn

from prisma_core.plugin import Case, Images, MapAdapter, UnsupportedArchitecture, installed

HEADS, WIDTH, GRID = 3, 16, (2, 3)  # heads, the width of one, rows and columns of patches
EMBED = HEADS * WIDTH  # timm's towers without a projection embed by their own width
VISION = {"width": HEADS * WIDTH, "head_width": WIDTH, "layers": 2}
TEXT = {"width": 2 * WIDTH, "heads": 2, "layers": 2, "vocab_size": 41}
CONTEXT = 7
SIZES = {"width", "layers", "heads", "head_width", "mlp_ratio", "image_size", "patch_size", "context_length"}
SIZES |= {"vocab_size", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "eos_id", "pad_id"}
SIZES |= {"timm_drop", "timm_drop_path", "timm_model_pretrained", "patch_dropout", "output_tokens"}
EVERY = ("parity.logits", "parity.hooks", "weights.accounted", "weights.roundtrip")
ALIKE = {
    name: "proven on a model whose configuration differs in sizes, or in which of a family of timm's it names, alone"
    for name in CHECKS
    if name not in EVERY
}
ELSEWHERE = dict.fromkeys(("hooks.live", "threads"), "proven on timm's model and on a text tower of its own")
BERTS = {
    "roberta-ViT-B-32": "Roberta",
    "xlm-roberta-base-ViT-B-32": "XLMRoberta",
    "xlm-roberta-large-ViT-H-14": "XLMRoberta",
    "coca_roberta-ViT-B-32": "Roberta",
}
TEXTS = ("ViT-B-16-SigLIP", "EVA02-B-16", "coca_ViT-B-32")  # one for each kind of mask


def whole() -> Iterator[Case]:
    """Yield a case for every model of open_clip's whose two towers can be represented.

    The first of those whose configurations differ in sizes alone goes through every check, the others through parity.
    """
    seen: set[str] = set()
    for name in open_clip.list_models():
        if (found := case(name)) is None:
            continue
        config = config_of(name)
        kind = _kind(config)
        skips = ALIKE if kind in seen else ELSEWHERE if "timm_model_name" in config["vision_cfg"] else {}
        yield replace(found, skips=skips)
        seen.add(kind)


def lone_towers() -> Iterator[Case]:
    """Yield a case for every vision tower whose text tower is not taken, and for a text tower of each kind."""
    seen: set[str] = set()
    for name in open_clip.list_models():
        config = config_of(name)
        if "hf_model_name" in config["text_cfg"] and _sees(config["vision_cfg"]):
            tower = Case(f"{name}/visual", build=partial(small_vision, name), images=images)
            kind = _kind({**config, "text_cfg": {}})
            yield replace(tower, skips=ALIKE) if kind in seen else tower
            seen.add(kind)
    for name, kind in BERTS.items():
        yield Case(f"{name}/whole", build=partial(with_bert, name, kind))
    yield Case("tinyclip/auto", build=narrow)
    for name in TEXTS:
        yield Case(f"{name}/text", build=partial(small_text, name))


def case(name: str) -> Case | None:
    """Return the case of one model, or None if one of its towers cannot be represented."""
    if name not in open_clip.list_models():
        return None
    config = config_of(name)
    if "hf_model_name" in config["text_cfg"] or not _sees(config["vision_cfg"]):
        return None
    return Case(name, build=partial(small, name), images=images)


def config_of(name: str) -> dict[str, Any]:
    """Return a copy of a model's configuration."""
    config = open_clip.get_model_config(name)
    assert isinstance(config, dict)
    return config


def _kind(config: dict[str, Any]) -> str:
    """Return what a configuration says, sizes and the names of timm's models and of tokenizers left out."""
    import timm

    def facts(part: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in part.items() if name not in SIZES and value is not None}

    vision, text = facts(config["vision_cfg"]), facts(config["text_cfg"])
    if name := vision.pop("timm_model_name", None):
        vision["timm"] = timm.model_entrypoint(name).__module__
    whole = {name: value for name, value in config.items() if name not in ("vision_cfg", "text_cfg", "embed_dim")}
    return json.dumps([vision, text, "multimodal_cfg" in whole, {**whole, "multimodal_cfg": None}], sort_keys=True)


def _sees(vision: dict[str, Any]) -> bool:
    """Return whether a vision tower is a transformer that some adapter takes."""
    if "timm_model_name" in vision:
        import timm

        name = vision["timm_model_name"]
        return _timm_family_taken(timm.model_entrypoint(name).__module__, name)
    return isinstance(vision["layers"], int)  # several numbers are the stages of a convolutional network


_FAMILIES: dict[str, bool] = {}


def _timm_family_taken(module: str, example: str) -> bool:
    if module not in _FAMILIES:
        _FAMILIES[module] = _timm_taken(example)
    return _FAMILIES[module]


def _timm_taken(example: str) -> bool:
    import timm

    try:
        with torch.device("meta"):
            adapter = installed().adapter(timm.create_model(example, depth=2))
        return not isinstance(adapter, MapAdapter)
    except (TypeError, UnsupportedArchitecture):  # not made of blocks, or none that an adapter takes
        return False


def images(model: Any) -> Images:
    """Return our preprocessing for a model, and open_clip's."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    from prisma_clip.building import preprocess

    config = getattr(model, "visual", model).preprocess_cfg
    return Images(preprocess(config), image_transform_v2(PreprocessCfg(**config), is_train=False))


# -------------------------------------------------------------------- small models


def small(name: str) -> nn.Module:
    """Return a model with two blocks in each tower, narrow, for a small image that is not square."""
    config = config_of(name)
    text = {**config["text_cfg"], **TEXT, "context_length": CONTEXT}
    if text.get("proj_type") == "none" or "multimodal_cfg" in config:
        text |= {"width": EMBED, "heads": HEADS}  # what reads the text wants this width
    for part in ("pad_id", "eos_id"):  # special tokens stay in the vocabulary, wherever they were
        if part in text:
            text[part] %= TEXT["vocab_size"]
    return _built(name, config, text)


def small_vision(name: str) -> nn.Module:
    """Return a small vision tower of a model."""
    text = {**TEXT, "context_length": CONTEXT}
    model: Any = _built(name, config_of(name), text)
    return model.visual


def small_text(name: str) -> nn.Module:
    """Return a small text tower of a model."""
    model: Any = small(name)
    return model.text


def with_bert(name: str, kind: str) -> nn.Module:
    """Return a small model whose text tower is transformers'; open_clip asks the hub for its configuration."""
    import transformers
    from open_clip.hf_model import HFTextEncoder

    sizes = {"vocab_size": 41, "hidden_size": 32, "intermediate_size": 36, "num_hidden_layers": 2, "pad_token_id": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 10, "type_vocab_size": 2}
    config = config_of(name)
    model: Any = _built(name, config, {**TEXT, "context_length": CONTEXT})
    made = getattr(transformers, f"{kind}Config")(**sizes)
    text = open_clip.CLIPTextCfg(**config["text_cfg"])
    pooling = {"pooler_type": text.hf_pooler_type, "proj_type": text.hf_proj_type}
    model.text = HFTextEncoder("", EMBED, config=made, output_tokens="multimodal_cfg" in config, **pooling)
    return model.eval()


def narrow() -> nn.Module:
    """Return a model of TinyCLIP's automatic inheritance: its blocks differ in heads and neurons."""
    from prisma_clip.tinyclip import NarrowAttention

    model: Any = small("ViT-B-32")
    for tower in (model.visual.transformer, model.transformer):
        for heads, block in enumerate(tower.resblocks, start=1):
            width, neurons = block.mlp.c_fc.in_features, 20 + heads
            block.attn = NarrowAttention(width, heads)
            block.mlp.c_fc, block.mlp.c_proj = nn.Linear(width, neurons), nn.Linear(neurons, width)
    return model.eval()


def _built(name: str, config: dict[str, Any], text: dict[str, Any]) -> nn.Module:
    vision = dict(config["vision_cfg"])
    options: dict[str, Any] = {"embed_dim": EMBED, "text_cfg": text}
    if "timm_model_name" in vision:
        with _small_timm():
            return _created(name, options | {"vision_cfg": vision | {"timm_model_pretrained": False}})
    if isinstance(vision.get("layers"), int):
        patch = 4
        vision |= VISION | {"patch_size": patch, "image_size": (GRID[0] * patch, GRID[1] * patch)}
        vision |= {"attn_pooler_queries": 4, "attn_pooler_heads": 4} if vision.get("attentional_pool") else {}
        vision |= {"patch_dropout": 0.5}
        if "mlp_ratio" in vision:
            vision["mlp_ratio"] = min(vision["mlp_ratio"], 3.0)
    options["vision_cfg"] = vision
    if "multimodal_cfg" in config:
        captions = {"width": EMBED, "heads": 2, "layers": 1, "context_length": CONTEXT, "vocab_size": 41}
        options["multimodal_cfg"] = config["multimodal_cfg"] | captions
    return _created(name, options)


def _created(name: str, options: dict[str, Any]) -> nn.Module:
    logging.disable(logging.WARNING)  # it warns that weights are random
    try:
        with warnings.catch_warnings(action="ignore"):
            model = open_clip.create_model(
                name, load_weights=False, pretrained_text=False, device=torch.get_default_device(), **options
            )
            return model.eval()
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _small_timm() -> Iterator[None]:
    """Let open_clip build timm's models small: it hands them no arguments that would."""
    import timm

    original = timm.create_model

    def create(name: str, **options: Any) -> nn.Module:
        for more in _shrinking(name, original):
            try:
                return original(name, **{**options, **more})
            except (TypeError, AssertionError, ValueError, RuntimeError):  # constructors refuse in their own ways
                continue
        return original(name, **options)

    timm.create_model = create
    try:
        yield
    finally:
        timm.create_model = original


@cache
def _shrinking(name: str, create: Callable[..., Any]) -> list[dict[str, Any]]:
    """Return arguments that make one of timm's models small, the most shrinking ones first."""
    with torch.device("meta"):
        try:
            model = create(name, depth=2)
        except (TypeError, AssertionError, ValueError):  # not made of blocks
            return [{}]
    embed = model.patch_embed
    ratio = getattr(embed, "feature_ratio", (1, 1))
    stem = _small_stages() if type(getattr(embed, "backbone", None)).__name__ == "MbConvStages" else {}
    image = {"depth": 2, "img_size": tuple(GRID[side] * embed.patch_size[side] * ratio[side] for side in (0, 1))}
    return [image | stem | {"embed_dim": EMBED, "num_heads": HEADS}, image, {"depth": 2}]


def _small_stages() -> dict[str, Any]:
    """Return arguments that make ViTamin's convolutional stages narrow."""
    from timm.models.vitamin import VitCfg, VitConvCfg

    norms = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
    widths = (WIDTH, 2 * WIDTH, EMBED)
    return {"embed_cfg": VitCfg(widths, depths=(1, 1, 1), stem_width=WIDTH, conv_cfg=norms, head_type="1d")}
