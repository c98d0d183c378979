"""A tiny model of every kind, with two inputs and a metric: what docs/technique-kinds.md is made on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from prisma_toy import Words
from torch import Tensor, nn

from prisma_core import HookedDual, HookedText, HookedUpstream, HookedViT, ModelSpec, TokenLayout
from prisma_core.plugin import (
    DualSpec,
    EmbedSpec,
    HookMap,
    MapSpec,
    NormSpec,
    PoolSpec,
    TextSpec,
)

WIDTH, HEADS = 12, 2
FACTS: dict[str, Any] = {"d_model": WIDTH, "heads": HEADS, "norm": NormSpec(eps=1e-5), "scale": 0.4, "d_mlp": 16}


@dataclass(frozen=True)
class Kind:
    """A tiny model with two inputs and a metric.

    Attributes:
        prefix: of hook points in the tower that is looked into.
        target: what readings are of: classes, texts or directions.
    """

    model: Any
    clean: Any
    other: Any
    metric: Any
    prefix: str = ""
    target: Any = field(default_factory=lambda: [0, 1])

    @property
    def seen(self) -> Tensor:
        """What the tower that is looked into takes."""
        return self.clean[0] if isinstance(self.clean, tuple) else self.clean

    @property
    def tower(self) -> dict[str, str]:
        """The option of techniques that read either tower of a dual encoder."""
        return {"tower": "text"} if isinstance(self.model, HookedText) else {}

    @property
    def token(self) -> dict[str, int]:
        """The option of techniques that read one token of a model that gives out every one."""
        pool = getattr(getattr(self.model, "spec", None), "pool", None)
        return {"pos": -1} if pool is not None and pool.kind in ("none", "patches") else {}

    def at(self, name: str, layer: int | str = "*") -> str:
        return f"{self.prefix}blocks.{layer}.{name}"

    def run(self) -> Tensor:
        return self.model(*self.clean) if isinstance(self.clean, tuple) else self.model(self.clean)


def _vision(**facts: Any) -> ModelSpec:
    return ModelSpec.plain(image=8, **FACTS | {"n_classes": 2} | facts)


def _text() -> TextSpec:
    return TextSpec.plain(n_ctx=5, n_classes=2, **FACTS)


class _Upstream(nn.Module):
    """A model that no canonical form has: heads that mix tokens by a fixed table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.heads, self.head = nn.Linear(5, WIDTH), nn.Linear(6, 6), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.heads(x.transpose(1, 2)).transpose(1, 2).tanh()
        return self.head(x.mean(1))


def kinds() -> dict[str, Kind]:
    """Return a model of each kind, the same at each call."""
    torch.manual_seed(0)
    images, videos = torch.randn(2, 2, 3, 8, 8), torch.randn(2, 2, 4, 3, 8, 8)
    texts, features = torch.randint(1, 19, (2, 2, 5)), torch.randn(2, 2, 6, 5)
    texts[..., -1] = 19  # the token that ends a text, which is the one that is read
    frames = {
        "embed": EmbedSpec(patch=(4, 4), tubelet=2),
        "layout": TokenLayout(cls=1, frames=2, rows=2, columns=2),
    }
    rows = (
        "embed -> blocks.0.hook_resid_pre : batch pos d_model\n"
        "heads -> blocks.0.attn.hook_z : batch (head d_head) pos -> batch pos head d_head\n"
        "head -> hook_logits : batch class"
    )
    mapped = HookMap.parse(rows, d_head=WIDTH // HEADS)
    dual = _drawn(HookedDual(DualSpec(vision=_vision(), text=_text())))
    dual.tokenizer = Words([f"word{each}" for each in range(17)], length=5)
    return {
        "classifier": Kind(_drawn(HookedViT(_vision())), *images, (0, 1)),
        "dual encoder": Kind(
            dual,
            (images[0], texts[0]),
            (images[1], texts[1]),
            (0, 1),
            "vision.",
            ["word3", "word4"],
        ),
        "text tower": Kind(_drawn(HookedText(_text())), *texts, (0, 1)),
        "self-supervised": Kind(
            _drawn(HookedViT(_vision(n_classes=None, pool=PoolSpec(kind="none")))),
            *images,
            lambda out: out[:, :, 0].sum(1),
            target=torch.eye(2, WIDTH),
        ),
        "masked autoencoder": Kind(
            _drawn(HookedViT(_vision(n_classes=48, pool=PoolSpec(kind="patches")))),
            *images,
            lambda out: out[:, :, 0].sum(1),
        ),
        "video": Kind(_drawn(HookedViT(_vision(**frames))), *videos, (0, 1)),
        "hooked upstream": Kind(
            HookedUpstream(_drawn(_Upstream()), mapped, MapSpec(shape=(6, 5)), lambda result: result), *features, (0, 1)
        ),
    }


def _drawn(model: Any) -> Any:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()
