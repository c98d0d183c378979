"""A change of an adapter to try, and the adapter with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from prisma_conformance.doctor.completed import Completed
from prisma_core.plugin import Adapter, AnySpec, HookMap, Reader, WeightMap


def _same(value: Any) -> Any:
    return value


def _nothing(model: Any) -> None:
    return None


@dataclass(frozen=True)
class Change:
    """A change of the spec, of the weight table, or of the adapted model's tensors.

    Attributes:
        says: in words, as the adapter's author would make it; empty for no change.
        spec, table: the changed spec and weight table.
        edit: changes tensors of the model in place, where a change of a row is meant.
    """

    says: str = ""
    spec: Callable[[Any], Any] = _same
    table: Callable[[WeightMap], WeightMap] = _same
    edit: Callable[[Any], None] = _nothing

    def then(self, other: Change) -> Change:
        """This change, and another one after it."""

        def edit(model: Any) -> None:
            self.edit(model)
            other.edit(model)

        return Change(
            ", and ".join(filter(None, (self.says, other.says))),
            lambda spec: other.spec(self.spec(spec)),
            lambda table: other.table(self.table(table)),
            edit,
        )


class Altered(Adapter):
    """An adapter with a change made to it, and a weight table that is completed.

    Attributes:
        table: the completed weight table of the last model that was adapted.
    """

    types = ()

    def __init__(self, inner: Adapter, change: Change):
        self.inner = inner
        self.change = change
        self.types = inner.types  # type: ignore[misc]
        self.table = Completed(())

    def spec(self, upstream: Reader) -> AnySpec:
        spec = self.change.spec(self.inner.spec(upstream))
        modules = cast("Iterator[tuple[str, nn.Module]]", upstream.module.named_modules())
        upstream.classes.update(path for path, _ in modules)  # a change may ask for their tensors
        return spec

    def weights(self, upstream: Reader, spec: AnySpec) -> WeightMap:
        table = self.change.table(self.inner.weights(upstream, spec))
        self.table = Completed(table.rows, table.sizes, table.ignored)
        return self.table

    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        return self.inner.hooks(upstream, spec)

    def stem(self, upstream: Reader, spec: AnySpec) -> nn.Module | None:
        return self.inner.stem(upstream, spec)

    def parts(self, upstream: Reader) -> Sequence[Adapter]:
        return self.inner.parts(upstream)

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return self.inner.unfused_attention(upstream)

    def call(self, upstream: nn.Module, *inputs: Tensor) -> Tensor:
        return self.inner.call(upstream, *inputs)


__all__ = ["Altered", "Change"]
