"""A small upstream, its adapter, and a source that counts its calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from prisma_core.contract.adapter import MapAdapter
from prisma_core.contract.source import Loaded, ModelInfo, Source
from prisma_core.maps.places import HookMap
from prisma_core.maps.reader import Reader
from prisma_core.spec import MapSpec


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.body(x).relu())}


class NetworkAdapter(MapAdapter):
    """Adapts the network, with a mistake in one method."""

    types = (f"{__name__}.Network",)

    def __init__(self, **mistakes: Callable[[], Any]):
        self.mistakes = mistakes

    def _or(self, method: str, value: Any) -> Any:
        return self.mistakes[method]() if method in self.mistakes else value

    def spec(self, upstream: Reader) -> Any:
        return self._or("spec", MapSpec(shape=(4,), n_classes=upstream.head.out_features))

    def hooks(self, upstream: Reader, spec: Any) -> Any:
        table = "body -> blocks.0.hook_mlp_out : batch d\nhead -> hook_logits : batch class"
        return self._or("hooks", HookMap.parse(table))

    def output(self, result: Any) -> Any:
        return self._or("output", super().output(result))

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return self._or("unfused_attention", super().unfused_attention(upstream))


class Counting(Source):
    name = "counting"

    def load(self, rest: str, **options: Any) -> Loaded:
        return Loaded(Network())

    def models(self) -> Iterator[ModelInfo]:
        yield ModelInfo(f"{self.name}:one", "ones", pretrained=False)


def fails() -> Any:
    return {}["heads"]
