"""What a plugin writes to bring an architecture in: facts, a weight map and a hook map, for upstream types by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import nn

from prisma_core.errors import UnsupportedArchitecture
from prisma_core.hookmap import HookMap
from prisma_core.spec import AnySpec
from prisma_core.weights import WeightMap


def qualified_name(value: object) -> str:
    """Return ``package.module.Class`` of an object's type.

    >>> qualified_name(nn.Linear(1, 1))
    'torch.nn.modules.linear.Linear'
    """
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


class Reader:
    """An upstream module, with a record of which of its attributes were read.

    Attributes come back as they are, submodules wrapped. ``reader.module`` is the module itself.
    """

    def __init__(self, module: nn.Module, path: str = "", record: set[str] | None = None):
        self.module = module
        self.path = path
        self.record: set[str] = set() if record is None else record

    def _below(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if not hasattr(self.module, name):
            raise UnsupportedArchitecture(qualified_name(self.module), f"no attribute {name!r} (another version?)")
        self.record.add(self._below(name))
        value = getattr(self.module, name)
        return Reader(value, self._below(name), self.record) if isinstance(value, nn.Module) else value

    def has(self, name: str) -> bool:
        """Whether the attribute is there and not None."""
        self.record.add(self._below(name))
        return getattr(self.module, name, None) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute that older or other classes may lack."""
        return getattr(self, name) if hasattr(self.module, name) else default

    def is_a(self, *names: str) -> bool:
        """Whether the module's type is exactly one of these, given as qualified or plain names."""
        full = qualified_name(self.module)
        return any(full == name or full.rsplit(".", 1)[-1] == name for name in names)

    def __iter__(self) -> Iterator[Reader]:
        for name, child in self.module.named_children():
            yield Reader(child, self._below(name), self.record)

    def __len__(self) -> int:
        return len(list(self.module.children()))

    def unsupported(self, feature: str) -> UnsupportedArchitecture:
        """Return the error that says this module has something we cannot represent."""
        where = qualified_name(self.module)
        return UnsupportedArchitecture(f"{where} at {self.path!r}" if self.path else where, feature)


class Adapter(ABC):
    """Maps one kind of upstream model to the canonical transformer.

    Facts are read from the built module, never from its name. What cannot be represented raises
    ``UnsupportedArchitecture``.

    Attributes:
        types: qualified names of the upstream classes it takes, exactly: a subclass may compute something else.
        ignored: attributes of upstream modules that do not matter, as ``Class.attribute``, each with the reason.
    """

    types: ClassVar[tuple[str, ...]]
    ignored: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def spec(self, upstream: Reader) -> AnySpec:
        """Return the facts.

        Raises:
            UnsupportedArchitecture: a fact that a spec cannot hold.
        """

    @abstractmethod
    def weights(self, upstream: Reader, spec: AnySpec) -> WeightMap:
        """Return which upstream tensors make each canonical one."""

    @abstractmethod
    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        """Return which upstream place each hook point equals."""

    def stem(self, upstream: Reader, spec: AnySpec) -> nn.Module | None:
        """Return upstream's own stem, for a spec whose stem is opaque. It is copied before use."""
        return None

    def explicit(self, upstream: nn.Module) -> AbstractContextManager[None]:
        """Return a scope in which upstream computes attention step by step, so that patterns can be seen."""
        return nullcontext()
