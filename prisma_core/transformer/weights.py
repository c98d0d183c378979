"""Weights under the field's names: views that write through, and stacks of all layers that refuse to be written."""

from __future__ import annotations

import copy
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from prisma_core.errors import InputError


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
    """Weights of all layers in one tensor: a copy, so writing to it, or to a part of it taken by index, raises.

    All else gives plain tensors; of those that share its memory (``view``, ``T``, iteration) writes are not noticed.
    """

    __torch_function__ = cast("Any", torch._C._disabled_torch_function_impl)  # pyright: ignore[reportPrivateUsage]
    place: str

    @classmethod
    def of(cls, x: Tensor, place: str) -> Tensor:
        """Return ``x`` as a stack of what stands at a place of the model, such as ``model.blocks[l].attn.W_O``."""
        if torch.compiler.is_compiling() or type(x) is not Tensor:  # another library's kind of tensor stays what it is
            return x
        stack = x.as_subclass(cls)
        stack.place = place
        return stack

    def __getitem__(self, index: Any) -> Tensor:
        return Stack.of(super().__getitem__(index), self.place)

    def __reduce_ex__(self, proto: Any) -> Any:
        return cast("Any", self.as_subclass(Tensor)).__reduce_ex__(proto)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def _refuse(self, *values: object, **options: object) -> NoReturn:
        raise InputError(
            f"This stack of weights is a copy, so writing to it would leave the model as it was. Write to "
            f"{self.place}, or to a copy of your own: .clone()."
        )


for _name in dir(Tensor):
    augmented = _name.startswith("__i") and hasattr(Tensor, f"__{_name[3:]}")  # `__iadd__` of `__add__`
    in_place = _name.endswith("_") and not _name.startswith("_") and _name not in ("requires_grad_", "detach_")
    if augmented or in_place or _name == "__setitem__":
        setattr(Stack, _name, Stack._refuse)  # pyright: ignore[reportPrivateUsage]
