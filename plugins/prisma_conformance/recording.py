"""What passes at places of an upstream model while it runs as it is: what hook points are compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, cast

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prisma_core.errors import PrismaError
from prisma_core.maps.places import Place


class Recorder:
    """Reads upstream places during a pass.

    >>> with Recorder(model, [Place("blocks.0")]) as seen:
    ...     model(image)
    >>> seen[Place("blocks.0")]
    """

    def __init__(self, model: nn.Module, places: Iterable[Place]):
        self.model = model
        self.places = list(dict.fromkeys(places))
        self.seen: dict[Place, Tensor] = {}
        self._stack = ExitStack()
        self._inside: list[tuple[str, Counter[str]]] = []

    def __enter__(self) -> dict[Place, Tensor]:
        modules = dict(cast("Iterator[tuple[str, nn.Module]]", self.model.named_modules()))
        missing = sorted({place.module for place in self.places} - set(modules))
        if missing:
            raise PrismaError(f"The upstream model has no module {missing[0]!r}; the hook map names it.")
        by_module: dict[str, list[Place]] = {}
        for place in self.places:
            by_module.setdefault(place.module, []).append(place)
        functions = any(place.function for place in self.places)
        for name, module in modules.items():
            places = by_module.get(name, [])
            if functions or places:  # a function belongs to the innermost module, so every module has to be followed
                self._stack.callback(module.register_forward_pre_hook(self._enter(name, places)).remove)
                self._stack.callback(module.register_forward_hook(self._leave(places)).remove)
        if functions:
            self._stack.enter_context(_Watch(self))
        return self.seen

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self._inside.clear()

    def _enter(self, name: str, places: list[Place]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._inside.append((name, Counter()))
            for place in places:
                if place.function is None and place.side != "out":
                    self.note(place, args, None)  # now, for the module may go on to edit its input in place

        return hook

    def _leave(self, places: list[Place]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            self._inside.pop()
            for place in places:
                if place.function is None and place.side == "out":
                    self.note(place, args, result)

        return hook

    def note(self, place: Place, args: tuple[Any, ...], result: Any) -> None:
        tensor = place.pick(args, result)
        if tensor is not None:
            self.seen[place] = tensor.detach().clone()

    def called(self, function: str, args: tuple[Any, ...], result: Any) -> None:
        if not self._inside:
            return
        module, calls = self._inside[-1]
        place = (module, function, calls[function])
        calls[function] += 1
        for wanted in self.places:
            if (wanted.module, wanted.function, wanted.call) == place:
                self.note(wanted, args, result)


class _Watch(TorchFunctionMode):
    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Arguments are copied first: upstream may go on to edit them in place.
        name = getattr(func, "__name__", "").strip("_")
        watched = any(place.function == name for place in self.recorder.places)
        given = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args) if watched else ()
        result = func(*args, **(kwargs or {}))
        if watched:
            self.recorder.called(name, given, result)
        return result
