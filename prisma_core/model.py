"""The base of all models that ``load`` returns: origin, sizes, sample inputs."""

from __future__ import annotations

import copy as copying
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal, NoReturn, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prisma_core.errors import InputError, LoadError, NotApplicable, UnknownName, WeightMapError, suggest
from prisma_core.errors.arguments import LARGEST, expect, number, several, shown, tensor
from prisma_core.hooks.model import HookedModel
from prisma_core.hooks.point import OPEN_SCOPES, keep_scopes
from prisma_core.maps.weights import State, WeightMap
from prisma_core.spec.brief import NameTable, html_table
from prisma_core.toolbox.additions import set_on_parts

Size = tuple[int, ...]


@dataclass(frozen=True)
class MissingProcessor:
    """A tokenizer or image processor that a model came without: false, and using it raises what to do.

    Attributes:
        why: the sentences.
        lost: why it could not be saved, where that is the reason.
    """

    why: str
    lost: str | None = None

    def __bool__(self) -> Literal[False]:
        return False

    def __call__(self, *arguments: Any, **options: Any) -> NoReturn:
        raise InputError(self.why)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # copying looks for methods before there is a reason
            raise AttributeError(name)
        raise AttributeError(f"{name}: {self.why[0].lower()}{self.why[1:]}")


class LazyProcessor(ABC):
    """A tokenizer or image processor that is made when it is first used."""

    @abstractmethod
    def make(self) -> Any:
        """Return the object itself; a ``PrismaError`` says why it cannot be made."""


class Processor:
    """A model's attribute for a tokenizer or image processor. A lazy one is made when it is read; ``vars`` shows it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, model: object, owner: type | None = None) -> Any:
        if model is None:
            return self
        held: dict[str, Any] = vars(model)
        if isinstance(held.get(self.name), LazyProcessor):
            held[self.name] = held[self.name].make()
        return held.get(self.name)

    def __set__(self, model: object, value: Any) -> None:
        if not (value is None or callable(value) or isinstance(value, LazyProcessor)):
            raise InputError(f"Expected model.{self.name} as a function, or None, got {shown(value)}.")
        vars(model)[self.name] = value


NO_PREPROCESS = MissingProcessor(
    "This model came without a preprocess. Set model.preprocess = "
    "prisma_core.plugin.Preprocess(size=model.spec.image_size, mean=..., std=...), with the mean and deviation it was "
    "trained with; some sources take them when they load: mean=, std=."
)


@dataclass
class Origin:
    """The upstream model that a model was adapted from, as ``export`` needs it.

    Attributes:
        kind: its qualified class name.
        map: its weight map.
        upstream: upstream's tensors by name; without data where the weight map can make them again.
        persistent: the names in upstream's state dict.
        tied: names of one and the same upstream tensor.
        copied: the canonical tensors that share no memory with upstream's, each with the rule that made it.
        shapes: of the canonical tensors.
    """

    kind: str
    map: WeightMap = field(repr=False)
    upstream: dict[str, Tensor] = field(repr=False)
    persistent: list[str] = field(repr=False)
    tied: list[list[str]] = field(repr=False, default_factory=list[list[str]])
    copied: dict[str, str] = field(repr=False, default_factory=dict[str, str])
    shapes: dict[str, torch.Size] = field(repr=False, default_factory=dict[str, torch.Size])

    @classmethod
    def of(cls, kind: str, table: WeightMap, tensors: State, persistent: Iterable[str], canonical: State) -> Origin:
        """Record a model: copies of the tensors that its weight map cannot make again, the shapes of the others."""
        names = list(persistent)
        kept = {name for name in tensors if table.reason_to_ignore(name) is not None}
        kept |= table.function_sources(tensors) | (set(tensors) - set(names))
        kept |= {name for name in tensors if not tensors[name].numel()}
        upstream = {
            name: tensor.detach().clone() if name in kept else tensor.detach().to("meta")
            for name, tensor in tensors.items()
        }
        by_tensor: dict[int, list[str]] = {}
        for name in tensors:
            by_tensor.setdefault(id(tensors[name]), []).append(name)
        tied = [group for group in by_tensor.values() if len(group) > 1]
        shapes = {name: tensor.shape for name, tensor in canonical.items()}
        return cls(kind, table, upstream, names, tied, table.copied(tensors, canonical), shapes)

    def export(self, canonical: State) -> dict[str, Tensor]:
        """Make upstream's state dict from the canonical tensors.

        Raises:
            WeightMapError: they were changed where upstream's state dict has nothing to hold the change, or have
                another size than upstream's; or it has more than parameters and buffers.
        """
        for name, size in self.shapes.items():
            if name in canonical and canonical[name].shape != size:
                raise WeightMapError(
                    f"{name} is {list(canonical[name].shape)} now, and upstream's tensors are of {list(size)}. Make an "
                    "upstream model of the new size, adapt it, and put this model's weights into that one."
                )
        if unknown := [name for name in self.persistent if name not in self.upstream]:
            raise WeightMapError(
                f"Upstream's state dict has {unknown[0]!r}, which is none of its parameters and buffers: it renames "
                "them or holds more, by code of its own. Take off its state dict hooks, and adapt it again."
            )
        state = self.map.backward(canonical, self.upstream)
        for name in self.upstream.keys() - set(self.persistent):
            if not torch.equal(state[name], self.upstream[name].to(state[name])):
                raise WeightMapError(f"What {name} makes was changed, and upstream's state dict does not hold it.")
        for first, *others in self.tied:
            for name in others:
                if not torch.equal(state[first], state[name].to(state[first])):
                    raise WeightMapError(
                        f"What {first} and {name} make was changed differently: upstream has one tensor under both "
                        "names and cannot hold the change. Edit both alike."
                    )
        absent = [name for name in self.persistent if state[name].is_meta]
        if absent and not all(tensor.is_meta for tensor in canonical.values()):
            raise WeightMapError(f"No part of this model makes {absent[0]} any more: it was taken out or exchanged.")
        return {name: state[name].contiguous() for name in self.persistent}


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of a module by name, shared ones under each name."""
    expect(module, nn.Module, "a module")
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def assign(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace a model's parameters and buffers by tensors, without a copy.

    Raises:
        UnknownName: the model has no parameter or buffer of a name.
        WeightMapError: a tensor holds no real numbers, and the model's does.
    """
    known = tensors_of(model)
    expect(tensors, Mapping, "tensors by name")
    for name, value in tensors.items():
        if name not in known:
            raise UnknownName(f"No parameter or buffer {name!r} in this {type(model).__name__}.{suggest(name, known)}")
        x = tensor(value, f"{name!r}")
        if known[name].is_floating_point() > x.is_floating_point():
            raise WeightMapError(f"{name}: expected real numbers, got {x.dtype}. Cast them where they are made.")
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if attribute in module._parameters:  # pyright: ignore[reportPrivateUsage]
            trainable = x.requires_grad and not x.is_inference()  # shared with a model of inference mode
            parameter = nn.Parameter(x.detach(), requires_grad=trainable)
            module._parameters[attribute] = parameter  # pyright: ignore[reportPrivateUsage]
        else:
            module._buffers[attribute] = x.detach()  # pyright: ignore[reportPrivateUsage]


@torch.library.custom_op("prisma::in_scopes", mutates_args=(), schema="(Tensor x) -> Tensor")
def _in_scopes(x: Tensor) -> Tensor:
    """Have what is being checkpointed around a compiled model computed again in the open scopes; return a copy.

    ``torch.compile`` cannot trace the search for checkpoints; an operator of its own runs in the pass.
    """
    keep_scopes(OPEN_SCOPES.get())
    return x.clone()


_in_scopes.register_fake(torch.empty_like)


def _gradient(ctx: Any, grad: Tensor) -> Tensor:
    return grad


def _batched(info: Any, dims: tuple[int | None, ...], x: Tensor) -> tuple[Any, int | None]:
    return _in_scopes(x), dims[0]


_in_scopes.register_autograd(_gradient)
_in_scopes.register_vmap(_batched)


class ZooModel(HookedModel):
    """A model in canonical form, described by its spec.

    Attributes:
        spec: the facts.
        preprocess: from images, or videos, to the tensor the model takes; set when the model is loaded. Where
            it is unset it is false, and using it raises an InputError that says what to set.
        reference: what it was loaded from.
        origin: what it was adapted from.
    """

    spec: Any  # each model says which of AnySpec
    preprocess = Processor()

    def __init__(self) -> None:
        super().__init__()
        self.preprocess = NO_PREPROCESS
        self.reference: str | None = None
        self.origin: Origin | None = None

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the classes, one each, if the model has any."""
        return vars(self).get("labels")

    @labels.setter
    def labels(self, value: Iterable[str] | None) -> None:
        names = None if value is None else tuple(several(value, "labels, a text for each class"))
        for name in names or ():
            expect(name, str, "labels, a text for each class")
        n = getattr(getattr(self, "spec", None), "n_classes", None)
        if names is not None and n not in (None, len(names)):
            raise InputError(
                f"This model has {n} classes and {shown(value)} holds {len(names)} labels: give one for each."
            )
        vars(self)["labels"] = names

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(getattr(type(self), name, None), "__set__"):  # torch would take a preprocess of its own for a part
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        compiling, scopes = torch.compiler.is_compiling(), OPEN_SCOPES.get()
        if scopes and not compiling:  # compiled hook points do not look for checkpoints
            keep_scopes(scopes)
        try:
            output = super().__call__(*inputs, **kwargs)
        except RuntimeError as error:
            if "Inference tensors cannot be saved" not in str(error):
                raise
            raise InputError(
                "This pass takes gradients, and an input, a weight or what a hook returned was made in "
                "torch.inference_mode(): it takes none. Make it outside of that: x.clone(), or load the model again; "
                "or run the pass in torch.no_grad()."
            ) from error
        hooked = compiling and scopes and isinstance(output, Tensor) and not torch.compiler.is_exporting()
        return _in_scopes(output) if hooked else output  # an exported graph knows no operator of ours

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the model, with weights that a hook computes of others (pruning), of which torch copies none."""
        for value in (value for part in self.modules() for value in vars(part).values()):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copying.deepcopy(self.__getstate__(), memo))
        return copied

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotApplicable(
            "torch.jit.script reads Python as a language of its own, without hooks. torch.export.export(model, "
            "(image,)) and torch.jit.trace(model, image) hold what runs, with the hooks that are open around them."
        )

    def extra_repr(self) -> str:
        """The first line of the repr: what it was loaded from, and its size."""
        n = sum(parameter.numel() for parameter in self.parameters())
        size = f"{n / 1e6:.1f} million" if n >= 1e6 else f"{n / 1e3:.0f} thousand"
        return ", ".join([*([self.reference] if self.reference else []), f"{size} parameters"])

    def _repr_html_(self) -> str:
        """The same line, with the parts and the hook points to unfold; everything is text."""
        points = html_table("Hook points", NameTable(self.hook_points()).rows())
        parts = f"<details><summary>Parts</summary><pre>{escape(repr(self))}</pre></details>"
        head = escape(f"{type(self).__name__}: {self.extra_repr()}")
        return f"<b>{head}</b>{parts}<details><summary>Hook points</summary>{points}</details>"

    def towers(self) -> Mapping[str, ZooModel]:
        """Return the transformers this model is made of, by the prefix of their hook points."""
        return {"": self}

    def unsaved_behaviour(self) -> str | None:
        """Return what the model does that no spec says, to follow "This model"; None for most.

        Who makes such a model says it here: what is made from the spec alone, a saved file, would lack it.
        """
        for path, module in cast("Iterator[tuple[str, nn.Module]]", self.named_modules()):
            if parametrize.is_parametrized(module) or any(isinstance(value, Tensor) for value in vars(module).values()):
                return (
                    f"computes a weight of {path!r} from other tensors (torch.nn.utils.prune.remove and "
                    "parametrize.remove_parametrizations make it plain)"
                )
        towers = (tower for tower in self.towers().values() if tower is not self)
        return next((behaviour for tower in towers if (behaviour := tower.unsaved_behaviour())), None)

    def warn_of_hooks(self) -> None:
        """Warn of what a user has set on a part: what is written holds none of it."""
        for what in set_on_parts(self):
            warnings.warn(f"{what} is not part of what is written.", stacklevel=4)

    def export(self) -> dict[str, Tensor]:
        """Write the present weights as upstream's own state dict (``prisma.export``).

        Raises:
            LoadError: the model was not adapted from an upstream one.
            NotApplicable: the model does something that no weights say.
            WeightMapError: weights were edited in a way upstream has no tensor for.
        """
        if (behaviour := self.unsaved_behaviour()) is not None:
            raise NotApplicable(f"This model {behaviour}, which upstream's weights cannot hold; export the original.")
        if self.origin is None:
            raise LoadError("This model was not adapted from an upstream one: there is nothing to export to. Use save.")
        self.warn_of_hooks()
        return self.origin.export({name: tensor.detach() for name, tensor in tensors_of(self).items()})

    @abstractmethod
    def sizes(self) -> list[Size]:
        """Return the sizes of input to try: the native one first, then others the model admits."""

    @property
    def input_like(self) -> Tensor:
        """A tensor in the dtype and on the device that images come in: ``image.to(model.input_like)``."""
        return next(each for each in self.parameters() if each.is_floating_point())

    @abstractmethod
    def sample_inputs(
        self, batch: int = 1, *, size: Size | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Return inputs of the right shapes, drawn at random on the CPU: ``model(*model.sample_inputs())``.

        Args:
            batch: how many.
            size: one of ``sizes()``; default the native one.
            generator: of the numbers; default torch's.
        """


def read_sample(batch: object, size: object, generator: object) -> int:
    """Return the batch that ``sample_inputs`` was given, once all of its arguments are of their kind."""
    if size is not None:
        for side in several(size, "a size, as model.sizes() lists them"):
            number(side, "a side of a size", 1, LARGEST)
    if generator is not None:
        expect(generator, torch.Generator, "a torch.Generator")
    return number(batch, "a batch", 1, LARGEST)


def layer_index(index: int | None, default: int, n: int) -> int:
    """Return which of ``n`` layers an index means: negative ones count from the end, ``n`` is past the last."""
    if index is None:
        return default
    layer = number(index, "a layer")
    if not -n <= layer <= n:
        raise InputError(f"No layer {layer}: layers run from 0 to {n - 1}, and {n} is past the last.")
    return layer if layer >= 0 else n + layer
