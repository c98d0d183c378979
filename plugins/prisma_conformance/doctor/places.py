"""Upstream's tensors at every place, for hook points whose row names a wrong one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prisma_conformance import tolerances
from prisma_conformance.measure import worst
from prisma_core.plugin import HookMap, Place, PrismaError, Row


class _Calls(TorchFunctionMode):
    """Keeps what passes at every place of a model: arguments and results of modules and of functions."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[Place, Tensor] = {}
        self.frames: list[tuple[str, Counter[str]]] = []
        self.paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused or not self.frames:
            return func(*args, **(kwargs or {}))
        module, counts = self.frames[-1]
        name = getattr(func, "__name__", "").strip("_")
        call = counts[name]
        counts[name] += 1
        self.keep(module, tuple(args), "in", name, call)
        result = func(*args, **(kwargs or {}))
        self.keep(module, result, "out", name, call)
        return result

    def keep(self, module: str, value: object, side: str, function: str | None = None, call: int = 0) -> None:
        """Copy the tensors among arguments or results."""
        values = cast("tuple[object, ...]", value) if isinstance(value, tuple) else (value,)
        self.paused = True
        try:
            for number, each in enumerate(values):
                if isinstance(each, Tensor) and each.is_floating_point() and each.ndim > 1:
                    place = Place(module, function, call, f"{side}{number or ''}")
                    self.tensors[place] = each.detach().clone()
        finally:
            self.paused = False


def all_places(upstream: nn.Module, run: Callable[[], object]) -> dict[Place, Tensor]:
    """Run upstream, and return what passes at each of its places, modules first."""
    calls = _Calls()
    handles: list[Any] = []

    def enter(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            calls.keep(name, args, "in")
            calls.frames.append((name, Counter()))

        return hook

    def leave(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            calls.frames.pop()
            calls.keep(name, result, "out")

        return hook

    for name, module in cast("Iterator[tuple[str, nn.Module]]", upstream.named_modules()):
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave(name)))
    try:
        with calls:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return dict(sorted(calls.tensors.items(), key=lambda item: item[0].function is not None))


def readings(row: Row, table: HookMap, places: Mapping[Place, Tensor], batch: int) -> Iterator[tuple[Row, Tensor]]:
    """Yield the row with each other place, read by one of the patterns or functions of the table."""
    alike = [row, *(one for one in table.rows if one.axes == row.axes or not row.axes), replace(row, how="", call=None)]
    hows = list(dict.fromkeys((one.how, one.call) for one in alike))
    sizes = {**table.sizes, "batch": batch}
    for place, tensor in places.items():
        for how, call in hows:
            other = replace(row, place=place, how=how, call=call)
            try:
                yield other, other.read(tensor, sizes)
            except PrismaError:
                continue


def fitting(row: Row, table: HookMap, activation: Tensor, places: Mapping[Place, Tensor]) -> Row | None:
    """Find a place that holds an activation, and the row that reads it; None if there is none."""
    for other, tensor in readings(row, table, places, len(activation)):
        if tensor.shape == activation.shape and worst(activation, tensor) <= tolerances.FLOAT64:
            return other
    return None


__all__ = ["all_places", "fitting", "readings"]
