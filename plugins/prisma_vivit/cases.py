"""Conformance cases: transformers' video models, small, hyperparameters off their defaults."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from prisma_core.conformance.case import Case

VIVIT = {
    "image_size": [8, 12],
    "num_frames": 6,
    "tubelet_size": [2, 4, 4],
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "num_channels": 2,
    "num_labels": 5,
}


def cases() -> Iterator[Case]:
    """Yield a case for every class and every fact that tells two of its models apart."""
    yield _case("VivitModel", **VIVIT)
    yield _case("VivitForVideoClassification", **VIVIT)
    yield _case("VivitForVideoClassification", "no bias, exact gelu", **VIVIT, qkv_bias=False, hidden_act="gelu")


def _case(kind: str, what: str = "", **facts: Any) -> Case:
    name = f"{kind} ({what})" if what else kind
    return Case(name, build=partial(small, kind, **facts), forward=main_output)


def small(kind: str, **facts: Any) -> nn.Module:
    """Return a model of transformers' own class, built from a config of these facts."""
    import transformers

    made = getattr(transformers, kind)
    return made(made.config_class(**facts)).eval()


def main_output(upstream: nn.Module, video: Tensor) -> Tensor:
    """Return the logits, or all tokens of a model without a head."""
    output: Any = upstream(video)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state
