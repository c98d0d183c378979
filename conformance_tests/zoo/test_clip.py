"""open_clip models made of plain transformers come through with the same numbers; the others are refused by name."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from prisma_conformance.pytest import suite

from prisma_core import UnsupportedArchitecture, adapt
from prisma_core.host import installed

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed: pip install 'prisma-interp[clip]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")

# One row a model of open_clip's: whether it must come through whole, with RoBERTa for a text tower, or by its vision
# tower alone, or what is refused.
TABLE = list(csv.DictReader((Path(__file__).parent / "open_clip_plain.csv").open(encoding="utf-8")))
WHOLE = {row["name"] for row in TABLE if row["expected"] == "ok"}
BERT = {row["name"] for row in TABLE if row["expected"] == "bert"}
SEEING = {row["name"] for row in TABLE if row["expected"] == "vision"} | BERT
REFUSED = [(row["name"], row["feature"]) for row in TABLE if row["expected"] == "unsupported"]

# What each architecture computes is compared for all; how hooks behave depends on its facts alone.
ONCE = ["hooks.live", "parity.gradients", "threads"]

test_conformance = suite("clip", once=ONCE)


def cases() -> set[str]:
    return {case.name for case, plugin in installed().cases({"clip"}) if plugin == "clip"}


def test_every_plain_model_has_a_case() -> None:
    found = {name for name in cases() if "/" not in name}
    assert found == WHOLE
    assert {name.removesuffix("/visual") for name in cases() if name.endswith("/visual")} == SEEING
    assert {name.removesuffix("/whole") for name in cases() if name.endswith("/whole")} == BERT
    assert len(WHOLE) >= 105
    assert len(WHOLE | SEEING) >= 110
    assert {row["name"] for row in TABLE} == set(open_clip.list_models())


@pytest.mark.parametrize(("name", "feature"), REFUSED)
def test_convolutional_towers_are_refused_by_name(name: str, feature: str) -> None:
    vision = open_clip.get_model_config(name)["vision_cfg"]
    with torch.device("meta"):
        upstream = open_clip.model._build_vision_tower(16, {**vision, "timm_model_pretrained": False})
    with pytest.raises(UnsupportedArchitecture) as refusal:
        adapt(upstream)
    assert feature.lower() in str(refusal.value).lower()


@pytest.mark.parametrize("kind", ["MT5", "M2M100"])
def test_other_text_towers_of_transformers_are_refused_by_name(kind: str) -> None:
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "d_model": 16}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    with torch.device("meta"):
        upstream = open_clip.create_model("ViT-B-32", load_weights=False, force_custom_text=True, device="meta")
        upstream.text = open_clip.hf_model.HFTextEncoder(
            "", 512, config=config, pooler_type="mean_pooler", proj_type="linear"
        )
    with pytest.raises(UnsupportedArchitecture, match=rf"HFTextEncoder at 'text'.*of transformers \({kind}"):
        adapt(upstream)
