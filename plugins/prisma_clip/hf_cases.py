"""Conformance cases: transformers' CLIP-like models, built small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers
from einops import rearrange
from torch import Tensor, nn

from prisma_core.conformance.case import Case

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
        yield Case(f"hf/{name}Model", partial(dual, name, vision, text), forward=partial(_alike, name), skips=skips)
        one = partial(tower, name, "Vision", vision)
        yield Case(f"hf/{name}VisionModel", one, forward=partial(_seen, name), skips=skips | WITHIN)
        yield Case(f"hf/{name}TextModel", partial(tower, name, "Text", text), forward=_read, skips=WITHIN)
    for name in ("CLIP", "MetaClip2"):
        yield Case(
            f"hf/{name}VisionModelWithProjection",
            partial(tower, name, "Vision", VISION, "WithProjection"),
            forward=partial(_seen, name),
            skips=WITHIN,
        )
        yield Case(
            f"hf/{name}TextModelWithProjection",
            partial(tower, name, "Text", TEXT, "WithProjection"),
            forward=_read,
            skips=WITHIN,
        )
    yield Case("hf/CLIPTextModel-argmax", partial(tower, "CLIP", "Text", TEXT | LARGEST), forward=_read)
    headless = VISION | {"vision_use_head": False}
    yield Case("hf/SiglipVisionModel-tokens", partial(tower, "Siglip", "Vision", headless), forward=_tokens)
    for name in ("AltCLIP", "ChineseCLIP"):
        one = partial(tower, name, "Vision", VISION)
        yield Case(f"hf/{name}VisionModel", one, forward=partial(_seen, name), skips=WITHIN)
        yield Case(f"hf/{name}Model", partial(dual, name, VISION, BERT), forward=partial(_alike_padded, name))
    yield Case("hf/AltCLIPTextModel", partial(tower, "AltCLIP", "Text", BERT), forward=_read_padded, skips=WITHIN)
    skips = WITHIN | {"parity.gradients": "upstream keeps the row of padding from training, which all tokens show"}
    yield Case("hf/ChineseCLIPTextModel", partial(tower, "ChineseCLIP", "Text", BERT), forward=_words, skips=skips)


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


def _pixels(name: str, image: Tensor) -> dict[str, Any]:
    if name != "Siglip2":
        return {"pixel_values": image, "interpolate_pos_encoding": image.shape[2:] != (IMAGE, IMAGE)}
    rows, columns = image.shape[2] // PATCH, image.shape[3] // PATCH
    flat = rearrange(image, "b c (r p) (s q) -> b (r s) (p q c)", p=PATCH, q=PATCH)
    shapes = torch.tensor([[rows, columns]] * len(image))
    return {"pixel_values": flat, "spatial_shapes": shapes, "pixel_attention_mask": torch.ones(flat.shape[:2]).long()}


def _seen(name: str, model: Any, image: Tensor) -> Tensor:
    given = model(**_pixels(name, image))
    return given.image_embeds if "image_embeds" in given else given.pooler_output


def _tokens(model: Any, image: Tensor) -> Tensor:
    return model(**_pixels("", image)).last_hidden_state


def _read(model: Any, tokens: Tensor) -> Tensor:
    given = model(input_ids=tokens)
    return given.text_embeds if "text_embeds" in given else given.pooler_output


def _alike(name: str, model: Any, image: Tensor, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, **_pixels(name, image)).logits_per_image


def _mask(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    return {"input_ids": tokens, "attention_mask": (tokens != BERT["pad_token_id"]).long()}


def _alike_padded(name: str, model: Any, image: Tensor, tokens: Tensor) -> Tensor:
    return model(**_mask(model, tokens), **_pixels(name, image)).logits_per_image


def _read_padded(model: Any, tokens: Tensor) -> Tensor:
    return model(**_mask(model, tokens)).pooler_output


def _words(model: Any, tokens: Tensor) -> Tensor:
    return model(**_mask(model, tokens)).last_hidden_state
