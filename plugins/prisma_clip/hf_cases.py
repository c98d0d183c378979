"""Conformance cases: transformers' CLIP-like models, built small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import transformers
from torch import nn

from prisma_core.plugin import Case

IMAGE, PATCH = 12, 4
VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "projection_dim": 20,
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 8,
    "vocab_size": 41,
    "projection_dim": 20,
    "projection_size": 32,
    "bos_token_id": 0,
    "eos_token_id": 5,
    "pad_token_id": 1,
}
BERT = TEXT | {"max_position_embeddings": 10, "project_dim": 28, "type_vocab_size": 2}
ROUNDED = {"parity.gradients": "upstream rounds the gradient by positions to float32 on its way through a resize"}
WITHIN = dict.fromkeys(("hooks.live", "threads"), "proven on the dual encoder, which has this tower")
LARGEST = {"eos_token_id": 2}  # transformers then reads the largest id


def hf_cases() -> Iterator[Case]:
    """Yield a case for every class the adapters take."""
    models = {"CLIP": {}, "MetaClip2": {}, "Siglip": {"vision": {}}, "Siglip2": {"vision": {"num_patches": 9}}}
    for name, more in models.items():
        vision, text = VISION | more.get("vision", {}), TEXT
        skips = ROUNDED if name == "Siglip2" else {}
        yield Case(f"hf/{name}Model", partial(dual, name, vision, text), skips=skips)
        one = partial(tower, name, "Vision", vision)
        yield Case(f"hf/{name}VisionModel", one, skips=skips | WITHIN)
        yield Case(f"hf/{name}TextModel", partial(tower, name, "Text", text), skips=WITHIN)
    for name in ("CLIP", "MetaClip2"):
        yield Case(
            f"hf/{name}VisionModelWithProjection",
            partial(tower, name, "Vision", VISION, "WithProjection"),
            skips=WITHIN,
        )
        yield Case(
            f"hf/{name}TextModelWithProjection",
            partial(tower, name, "Text", TEXT, "WithProjection"),
            skips=WITHIN,
        )
    yield Case("hf/CLIPTextModel-argmax", partial(tower, "CLIP", "Text", TEXT | LARGEST))
    headless = VISION | {"vision_use_head": False}
    yield Case("hf/SiglipVisionModel-tokens", partial(tower, "Siglip", "Vision", headless))
    for name in ("AltCLIP", "ChineseCLIP"):
        one = partial(tower, name, "Vision", VISION)
        yield Case(f"hf/{name}VisionModel", one, skips=WITHIN)
        yield Case(f"hf/{name}Model", partial(dual, name, VISION, BERT))
    yield Case("hf/AltCLIPTextModel", partial(tower, "AltCLIP", "Text", BERT), skips=WITHIN)
    skips = WITHIN | {"parity.gradients": "upstream keeps the row of padding from training, which all tokens show"}
    yield Case("hf/ChineseCLIPTextModel", partial(tower, "ChineseCLIP", "Text", BERT), skips=skips)


def tower(name: str, part: str, sizes: dict[str, Any], ending: str = "") -> nn.Module:
    """Return a small tower of one of transformers' models."""
    config = getattr(transformers, f"{name}{part}Config")(**sizes)
    return getattr(transformers, f"{name}{part}Model{ending}")(config).eval()


def dual(name: str, vision: dict[str, Any], text: dict[str, Any]) -> nn.Module:
    """Return a small dual encoder."""
    config: Callable[..., Any] = getattr(transformers, f"{name}Config")
    return getattr(transformers, f"{name}Model")(
        config(vision_config=vision, text_config=text, projection_dim=20)
    ).eval()
