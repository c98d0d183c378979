"""A dual encoder whose circuit is known: the planted vision transformer, and a text tower that looks words up.

``"a bright mark"`` and ``"a dark mark"`` lie along the direction that the vision tower's answer is written to, with
opposite signs; the other texts lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from models import build
from planted import ANSWER, MARK, WIDTH, planted
from torch import Tensor

from prisma_core import HookedDual, HookedViT
from prisma_core.spec import DualSpec, NormSpec, TextSpec

D_EMBED = 8
WORDS: dict[str, tuple[float, ...]] = {
    "a bright mark": (0, 1, -1, 0, 0, 0, 0, 0),
    "a dark mark": (0, -1, 1, 0, 0, 0, 0, 0),
    "a cat": (1, 0, 0, 1, 0, 0, 0, 0),
    "a dog": (0, 0, 0, 0, 1, 0, 1, 0),
    "a tree": (0, 0, 0, 0, 0, 1, 0, -1),
    "a house": (1, 1, 1, 0, 0, 0, -1, 0),
}


def planted_dual(*, ln_final: bool = False, logit_bias: bool = False) -> HookedDual:
    """Return the model, in float64.

    Args:
        ln_final: a final norm, so that scales have to be frozen.
        logit_bias: a bias of similarities, as SigLIP has.
    """
    base = planted()
    norm = NormSpec(eps=1e-3) if ln_final else None
    vision = base.spec.model_copy(update={"n_classes": D_EMBED, "ln_final": norm})
    facts = {"d_head": 4, "scale": 0.5, "d_mlp": 6, "pool": "first"}
    text = TextSpec.plain(d_model=D_EMBED, layers=1, norm=None, n_vocab=len(WORDS) + 1, n_ctx=2, **facts)
    model = HookedDual(DualSpec(vision=vision, text=text, logit_bias=logit_bias)).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        tensors = dict(model.vision.named_parameters())
        for name, parameter in base.named_parameters():
            if not name.startswith("head."):
                tensors[name].copy_(parameter)
        if ln_final:
            tensors["ln_final.weight"] += 1
        model.vision.head.weight[1, ANSWER] += 3.0
        model.vision.head.weight[2, ANSWER] -= 3.0
        model.vision.head.weight[4, MARK] += 0.5
        model.text.embed.W_E[: len(WORDS)] += torch.tensor(list(WORDS.values()), dtype=torch.float64)
        model.text.head.weight += torch.eye(D_EMBED, dtype=torch.float64)
        model.logit_scale.fill_(1.5)
        if logit_bias:
            model.logit_bias.fill_(-0.7)
    model.tokenizer = tokenize
    return model


def random_dual(seed: int = 0, **vision: Any) -> HookedDual:
    """Return a dual encoder whose every number is random, in float64, with a vision tower of these facts.

    Args:
        seed: of the weights.
        vision: as ``models.build`` takes them.
    """
    torch.set_default_dtype(torch.float64)
    tower, text = build(**{"n_classes": D_EMBED, "seed": seed} | vision), planted_dual().spec.text
    model = HookedDual(DualSpec(vision=tower.spec, text=text, logit_bias=True)).double().eval()
    torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64) + 0.05)
    model.tokenizer = tokenize
    return model


def tokenize(texts: Sequence[str]) -> Tensor:
    """Return a token for each text (the last for unknown ones) and one for its end: ``[text 2]``."""
    names = {text: at for at, text in enumerate(WORDS)}
    return torch.tensor([[names.get(text, len(WORDS)), len(WORDS)] for text in texts])


def relayed_at_the_class_token() -> HookedViT:
    """Return a classifier whose class token holds the mark after block 0, in a direction that no head reads.

    Block 0 copies the mark to the class token, along COPY; block 1 writes it from there to ANSWER: a tuned lens of the
    stream before block 1 has to learn COPY -> ANSWER, and of the stream before block 0 has nothing to learn from.
    """
    from planted import CLS, COPIES, MIDDLE, READS

    model = planted()
    with torch.no_grad():
        first, second = model.blocks[COPIES[0]].attn, model.blocks[READS[0]].attn
        first.W_Q[COPIES[1], MIDDLE, 0] -= 1.0
        first.W_Q[COPIES[1], CLS, 0] += 1.0
        second.W_K[READS[1], MIDDLE, 0] -= 1.0
        second.W_K[READS[1], CLS, 0] += 1.0
    assert model.spec.d_model == WIDTH
    return model
