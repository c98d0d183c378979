"""Numbers that upstream's modules hold, for facts that are one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, cast

from torch import Tensor, nn

from prisma_conformance.doctor.families import families


class Number(NamedTuple):
    """A number of upstream's, or one in each layer.

    Attributes:
        name: its path, ``{l}`` for the layer; a formula, or empty, for a usual one that upstream need not hold.
        values: by layer; under -1 where there is one for all.
        read: whether the adapter reads it; None for a usual one.
    """

    name: str
    values: Mapping[int, float]
    read: bool | None = None

    def at(self, layer: int | None) -> float | None:
        """The number for a layer, or for a part outside the layers."""
        return self.values.get(-1, None if layer is None else self.values.get(layer))

    def powers(self) -> Iterator[Number]:
        """It, and what a scale is made of it: temperatures divide, and widths do so by their root."""
        yield self
        for power in (-1, -0.5):
            values = {layer: value**power for layer, value in self.values.items() if value > 0}
            if self.read is not None and len(values) == len(self.values):
                yield self._replace(name=f"{self.name}**{power}", values=values)

    def __str__(self) -> str:
        if self.read is None:
            return f": {self.name}" if self.name else ""
        return f": upstream's {self.name}" + ("" if self.read else ", which the adapter does not read")


def numbers(upstream: nn.Module, record: set[str]) -> list[Number]:
    """Collect the numbers of upstream's modules, of their configurations and of tensors with one entry.

    Those that the adapter does not read come first.

    Args:
        record: the paths that it reads.
    """
    values = dict(_values(upstream))
    result: list[Number] = []
    for name, members in families(values).items():
        read = all(_is_read(path, record) for path in members.values())
        by_layer = {int(number or -1): values[path] for number, path in members.items()}
        result.append(Number(name, by_layer, read))
    return sorted(result, key=lambda number: bool(number.read))


def _is_read(path: str, record: set[str]) -> bool:
    holder = path.rpartition(".")[0]  # of a configuration, which is read as a whole, nobody sees what is taken
    return path in record or (holder.rpartition(".")[2].endswith("config") and holder in record)


def _values(upstream: nn.Module) -> Iterator[tuple[str, float]]:
    for path, module in cast("Iterator[tuple[str, nn.Module]]", upstream.named_modules()):
        for name, value in vars(module).items():
            inner = cast("dict[str, object]", getattr(value, "__dict__", {})) if "config" in name else {}
            for below, each in [(name, cast("object", value)), *((f"{name}.{key}", one) for key, one in inner.items())]:
                if isinstance(each, float | int) and not isinstance(each, bool) and not below.startswith("_"):
                    yield f"{path}.{below}".lstrip("."), float(each)
    for tensors in (upstream.named_parameters(), upstream.named_buffers()):
        for name, tensor in cast("Iterator[tuple[str, Tensor]]", tensors):
            if tensor.numel() == 1 and not tensor.is_meta:
                yield name, float(tensor)


__all__ = ["Number", "numbers"]
