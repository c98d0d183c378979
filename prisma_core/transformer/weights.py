"""Weights under the field's names: views that write through, and stacks of all layers that refuse to be written."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map_only

from prisma_core.errors import InputError, NotApplicable, qualified_name
from prisma_core.toolbox.additions import set_on_parts

_AS_TENSORS = cast("Any", torch)._C.DisableTorchFunctionSubclass
_share_memory: Callable[[Tensor, Tensor], bool] = cast("Any", torch)._C._is_alias_of


def check_linear(layer: nn.Module, name: str, what: str) -> None:
    """Refuse what is computed from the weights of a layer, in its place, where it is more than these.

    Raises:
        NotApplicable: another class, such as a quantised or LoRA layer, a hook of torch's, or a forward of its own.
    """
    kind, added = type(layer).__mro__[parametrize.is_parametrized(layer)], set_on_parts(layer)
    if kind is not nn.Linear or added:
        more = added[0].partition(" at ")[0] if added else f"A {qualified_name(layer)}"
        raise NotApplicable(
            f"{what} would be made from the weights of {name} alone. {more} stands there, which computes more, so the "
            "numbers would not be the model's. Ask for other hook points, or put a plain nn.Linear there."
        )


def held(layer: nn.Module, name: str) -> Tensor:
    """Return the weight or bias of a layer.

    Raises:
        NotApplicable: it is packed, as quantised layers hold theirs, and read by a method.
    """
    value = getattr(layer, name)
    if callable(value):
        raise NotApplicable(
            f"A {qualified_name(layer)} packs its {name}, so there is no tensor to show. Take the model that it was "
            "made of; activations, edits and patches work here all the same."
        )
    return value


class WeightViews(nn.Module):
    """A module whose properties ``W_Q`` and the like show its weights: writing into one edits the model."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith(("W_", "b_")) or not isinstance(getattr(type(self), name, None), property):
            return super().__setattr__(name, value)
        if not (isinstance(value, Tensor) and value.is_set_to(getattr(self, name))):  # `+=` ends here too
            raise InputError(
                f"{name} shows weights that are stored in another shape, so no other tensor can take its place. Write "
                f"into it: with torch.no_grad(): {self.place_of(name)}[...] = value."
            )
        return None

    def place_of(self, name: str) -> str:
        """Return where weights of a name can be written."""
        return f"module.{name}"


class Stack(Tensor):
    """Weights of all layers in one tensor: a copy, so writing to it, or to whatever shares its memory, raises.

    Results that share no memory with it are plain tensors.
    """

    place: str

    @classmethod
    def of(cls, x: Tensor, place: str) -> Tensor:
        """Return ``x`` as a stack of what stands at a place of the model, such as ``model.blocks[l].attn.W_O``."""
        if torch.compiler.is_compiling() or type(x) is not Tensor:  # another library's kind of tensor stays what it is
            return x
        stack = x.as_subclass(cls)
        stack.place = place
        return stack

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        stacks = _stacks((args, options))
        for stack in _stacks(_written(func, args, options)):
            stack.set_()
        with _AS_TENSORS():
            result = func(*args, **options)
        if func is Tensor.numpy or func is Tensor.__array__:
            result.flags.writeable = False
            return result
        return tree_map_only(Tensor, lambda x: _of_memory(x, stacks), result) if stacks else result

    def set_(self, *values: object, **options: object) -> NoReturn:  # the one method that torch does not ask about
        raise InputError(
            "This stack of weights is a copy, so writing to it would leave the model as it was. Write to "
            f"{self.place}, or to a copy of your own: .clone()."
        )

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.unbind(0))

    def __reduce_ex__(self, proto: Any) -> Any:
        return cast("Any", self._plain()).__reduce_ex__(proto)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return copy.deepcopy(self._plain(), memo)

    def _plain(self) -> Tensor:
        with _AS_TENSORS():
            return self.as_subclass(Tensor)


def _stacks(values: object) -> list[Stack]:
    return [each for each in tree_leaves(values) if isinstance(each, Stack)]


def _written(func: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> object:
    """Return the arguments that a function of torch writes to, by torch's naming of such functions."""
    name = str(getattr(func, "__name__", ""))
    augmented = name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}")  # `__iadd__` of `__add__`
    in_place = name.endswith("_") and not name.endswith("__") and name not in ("requires_grad_", "detach_")
    data = func == cast("Any", Tensor).data.__set__
    if augmented or in_place or data or name == "__setitem__" or options.get("inplace"):
        return args[:1], [options.get(name) for name in ("out", "input", "tensor")]
    return options.get("out")


def _of_memory(x: Tensor, stacks: list[Stack]) -> Tensor:
    """Return a result as a stack if it shares memory with one of these."""
    owner = next((stack for stack in stacks if _share_memory(x, stack)), None)
    return x if owner is None else Stack.of(x.as_subclass(Tensor) if type(x) is Stack else x, owner.place)
