"""A device that is not there: tensors that say they are on ``cuda:0``, hold numbers on the CPU, and refuse to mix.

Whatever is computed comes out right, so a whole check runs as it would on a GPU, and fails where a tensor was made or
left on the CPU. What it cannot show: kernels and their rounding, other threads, and where numbers lie in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda", 0)
_COPIES = {"aten::_to_copy", "aten::copy_"}
_INDEXES = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}


class Elsewhere(Tensor):
    """A tensor that is said to be on the device. Below Python it has no numbers, as torch's fake ones."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        outer = torch.empty_strided(inner.shape, inner.stride(), dtype=inner.dtype, device="meta")
        made = Tensor._make_subclass(cls, outer, False)
        made.inner = inner
        return made

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return self.inner.detach().numpy()

    def __array__(self, *given: Any) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            made = self.detach().clone()
            parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = (
                torch.nn.Parameter(made, self.requires_grad) if parameter else made.requires_grad_(self.requires_grad)
            )
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, kwargs = func._schema.name, dict(kwargs)
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    if there and any(x.is_meta for x in tensors):
        raise RuntimeError(f"A tensor made below Python, on meta, has no numbers, in {name}; make it in _Functions.")
    if there and name not in _COPIES:
        left = [x for x in tensors if not isinstance(x, Elsewhere) and x.ndim]
        # An index may come from the CPU, as in torch; a tensor on the CPU takes no index from elsewhere.
        if left and (name not in _INDEXES or not isinstance(args[0], Elsewhere)):
            raise RuntimeError(f"Expected all tensors to be on the same device, found cuda:0 and cpu, in {name}.")
    asked = kwargs.get("device")
    goes = isinstance(args[0], Elsewhere) if name == "aten::copy_" else bool(there)
    if asked is not None:
        # Below Python, where these say that they are on meta, backward passes make zeros like them.
        like = bool(there) or torch._C._current_graph_task_id() != -1
        goes = torch.device(asked).type == "cuda" or (like and torch.device(asked).type == "meta")
        kwargs["device"] = torch.device("cpu") if goes else asked
    made = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if name == "aten::copy_":
        return args[0]
    known = {id(x.inner): x for x in there}  # what works in place gives back what it was given
    return tree_map(lambda x: known.get(id(x), Elsewhere(x) if goes else x) if isinstance(x, Tensor) else x, made)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, Elsewhere) else x


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Where torch reads a device below Python, or makes a tensor past any dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.to, Tensor.type_as):
            other = next((x for x in (*args[1:], *kwargs.values()) if isinstance(x, Tensor)), None)
            if other is not None:
                return args[0].to(device=other.device, dtype=other.dtype)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.new_tensor:
            made = torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype))
            return made.to(kwargs.get("device", args[0].device))
        if func in (torch.where, Tensor.where):
            args = tuple(_number(x) for x in args)
        if func is Tensor.__getitem__:
            args = (args[0], _index(args[1]))
        if func is Tensor.__setitem__:
            args = (args[0], _index(args[1]), _number(args[2], args[0].dtype))
        return func(*args, **kwargs)


def _index(index: Any) -> Any:
    """Return an index with tensors for its lists: torch would make them below Python."""
    if isinstance(index, tuple):
        return tuple(_index(part) for part in index)
    return torch.as_tensor(index) if isinstance(index, list | range | np.ndarray) else index


def _number(x: Any, dtype: torch.dtype | None = None) -> Any:
    """Return a tensor without axes for a number: torch would make it below Python."""
    return torch.tensor(x, dtype=dtype) if isinstance(x, int | float | complex) else x


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Yield a device of its own; what is moved there stays apart from what is not."""
    initialise, overwrite = torch.cuda._lazy_init, torch.__future__.get_overwrite_module_params_on_conversion()
    torch.cuda._lazy_init = lambda: None
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Functions(), _Dispatch():
            yield DEVICE
    finally:
        torch.cuda._lazy_init = initialise
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
