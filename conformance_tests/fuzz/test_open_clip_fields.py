"""Every field of open_clip's configurations, moved by itself: followed, refused in words, without effect, or not built.

Facts are read off built modules. This stands in for the configuration: whatever it says, the numbers of both towers and
of the whole are open_clip's own, or there are none.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch

from prisma_core.toolbox.attention import float64_softmax
from prisma_core.toolbox.readers import PartReader

from .open_clip_sweep import Base, Verdict, judged, judged_factory, quiet
from .open_clip_values import BASES, BERT, CAPTIONS, FACTORY, TEXT, VISION, WHOLE, configured, open_clip

from open_clip.coca_model import CoCa, MultimodalCfg  # isort: skip
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP  # isort: skip

# Verdicts of each model's moves. ``same``: open_clip builds the very model that it built before.
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
    "images": {"force_preprocess_cfg"},
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


@pytest.fixture(scope="module")
def berts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a configuration of each kind of transformers' text models, by name."""
    home = tmp_path_factory.mktemp("berts")
    for kind in ("roberta", "xlm-roberta", "bert", "mt5"):
        (home / kind).mkdir()
        (home / kind / "config.json").write_text(json.dumps({"model_type": kind, **BERT}))
    return home


@torch.no_grad()
def test_every_value_is_followed_refused_or_not_built(berts: Path, tmp_path: Path) -> None:
    verdicts: dict[str, dict[str, Verdict]] = {}
    with quiet():
        for base in BASES:
            with float64_softmax() if base == "bert" else nullcontext():  # which transformers takes in float32
                verdicts[base] = dict(judged(base, berts))
        for base in ("native", "timm"):
            verdicts[f"factory, {base}"] = dict(judged_factory(base, tmp_path))
    every = [(base, move, one) for base, moves in verdicts.items() for move, one in moves.items()]
    assert not [f"{base}: {move}: {one.why}" for base, move, one in every if one.kind == "defect"]
    assert {base: Counter(one.kind for one in moves.values()) for base, moves in verdicts.items()} == COUNTS
    assert {one.why for _, _, one in every if one.kind == "refused"} == REFUSED
    assert sum(one.mattered for _, _, one in every) == MATTERED
    moved = {move.partition("=")[0] for _, move, _ in every}
    effective = {move.partition("=")[0] for _, move, one in every if one.mattered and one.kind in ("agrees", "refused")}
    assert moved - effective == set.union(*WITHOUT_EFFECT.values())


@torch.no_grad()
def test_a_misread_field_is_seen(berts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = PartReader.activation
    monkeypatch.setattr(PartReader, "activation", lambda self, module: read(self, module) and "gelu")
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
