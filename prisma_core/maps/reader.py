"""Upstream modules as adapters read them: with a record of the attributes that were read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

from prisma_core.errors import UnsupportedArchitecture, qualified_name

T = TypeVar("T")
TORCH = "torch.nn.modules."


class Reader:
    """An upstream module, with a record of the attributes that were read.

    Attributes come back as they are, submodules wrapped; a container can be iterated and indexed.

    >>> Reader(nn.Sequential(nn.Linear(2, 3), nn.GELU()))[1].expect("GELU", approximate="none").path
    '1'

    Attributes:
        module: the module itself.
        path: its name in the model that was given to the adapter.
        record: the names of all attributes read so far, in the whole model.
        classes: the paths of all modules whose class was recognised.
        latest: the reader, the name and the value of the attribute that was read last, in the whole model.
    """

    def __init__(self, module: nn.Module, path: str = "", above: Reader | None = None):
        self.module = module
        self.path = path
        self.record, self.classes = (set[str](), set[str]()) if above is None else (above.record, above.classes)
        self.latest: list[Any] = above.latest if above is not None else [self, "", module]

    def _below(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if not hasattr(self.module, name):
            raise self.unsupported(f"no attribute {name!r} (another version?)")
        self.record.add(self._below(name))
        value = getattr(self.module, name)
        self.latest[:] = self, name, value
        return Reader(value, self._below(name), self) if isinstance(value, nn.Module) else value

    def has(self, name: str) -> bool:
        """Whether the attribute exists and is not None."""
        self.record.add(self._below(name))
        return getattr(self.module, name, None) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute that older or other classes may lack."""
        return getattr(self, name) if hasattr(self.module, name) else default

    def is_a(self, *names: str) -> bool:
        """Whether the module's type is exactly one of these: qualified names, or plain ones of torch's own modules.

        >>> Reader(nn.Linear(1, 1)).is_a("Linear", "acme.layers.Dense")
        True
        """
        full = qualified_name(self.module)
        if known := full in names or (full.startswith(TORCH) and full.rpartition(".")[2] in names):
            self.classes.add(self.path)
        return known

    def of_class(self, table: Mapping[str, T]) -> T | None:
        """Look up what a table holds for the module's class, by qualified name; None if it does not know the class.

        >>> Reader(nn.Linear(1, 1)).of_class({"torch.nn.modules.linear.Linear": "linear"})
        'linear'
        """
        if (value := table.get(qualified_name(self.module))) is not None:
            self.classes.add(self.path)
        return value

    def expect(self, kind: str | None = None, **facts: Any) -> Reader:
        """Check the module's type and values of its attributes, and return the reader itself.

        Raises:
            UnsupportedArchitecture: the type or a value is another.
        """
        if kind is not None and not self.is_a(kind):
            raise self.unsupported(f"expected a {kind} here")
        for name, value in facts.items():
            if (came := getattr(self, name)) != value:
                raise self.unsupported(f"{name}={came!r}, expected {value!r}")
        return self

    def __iter__(self) -> Iterator[Reader]:
        children = self.module._modules  # pyright: ignore[reportPrivateUsage]  # named_children leaves repeats out
        yield from (Reader(child, self._below(name), self) for name, child in children.items() if child is not None)

    def __getitem__(self, index: int) -> Reader:
        parts = list(self)
        if not -len(parts) <= index < len(parts):
            raise self.unsupported(f"{len(parts)} parts: there is no number {index}")
        return parts[index]

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:  # a norm is there, though it has no parts
        return bool(self.module)

    def unsupported(self, feature: str) -> UnsupportedArchitecture:
        """The error that names this module and a feature that Prisma cannot represent."""
        where = qualified_name(self.module)
        return UnsupportedArchitecture(f"{where} at {self.path!r}" if self.path else where, feature)
