"""A fake device: tensors that report ``cuda:0``, hold numbers on the CPU, and raise where the two mix.

Results are right, so a whole check runs as it would on a GPU, and fails where a tensor is created or stays on the CPU.
Kernels and their rounding, other threads and the layout of memory are a real device's alone.
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

from prisma_core.upstream import undeclared

DEVICE = torch.device("cuda", 0)
_COPIES = {"aten::_to_copy", "aten::copy_"}
_INDEXES = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}


class DeviceTensor(Tensor):
    """A tensor on the fake device. Below Python it has no numbers, as torch's fake tensors."""

    __module__ = "torch.fake_device"  # as a device of torch's own is

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> DeviceTensor:
        outer = torch.empty_strided(inner.shape, inner.stride(), dtype=inner.dtype, device="meta")
        tensor = Tensor._make_subclass(cls, outer, False)
        tensor.inner = inner
        return tensor

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return self.inner.detach().numpy()

    def __array__(self, *arguments: Any) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            clone = self.detach().clone()
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = (
                torch.nn.Parameter(clone, self.requires_grad)
                if is_parameter
                else clone.requires_grad_(self.requires_grad)
            )
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, kwargs = func._schema.name, dict(kwargs)
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    on_device = [x for x in tensors if isinstance(x, DeviceTensor)]
    if on_device and any(x.is_meta for x in tensors):
        raise RuntimeError(
            f"A tensor created below Python, on meta, has no numbers, in {name}; create it in _Functions."
        )
    if on_device and name not in _COPIES:
        on_cpu = [x for x in tensors if not isinstance(x, DeviceTensor) and x.ndim]
        # An index may come from the CPU, as in torch; a tensor on the CPU takes no index from the device.
        if on_cpu and (name not in _INDEXES or not isinstance(args[0], DeviceTensor)):
            raise RuntimeError(f"Expected all tensors to be on the same device, found cuda:0 and cpu, in {name}.")
    target = kwargs.get("device")
    goes = isinstance(args[0], DeviceTensor) if name == "aten::copy_" else bool(on_device)
    if target is not None:
        # Below Python, where these say that they are on meta, backward passes make zeros like them.
        like = bool(on_device) or torch._C._current_graph_task_id() != -1
        goes = torch.device(target).type == "cuda" or (like and torch.device(target).type == "meta")
        kwargs["device"] = torch.device("cpu") if goes else target
    result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if name == "aten::copy_":
        return args[0]
    inputs = {id(x.inner): x for x in on_device}  # what works in place returns its input
    return tree_map(lambda x: inputs.get(id(x), DeviceTensor(x) if goes else x) if isinstance(x, Tensor) else x, result)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, DeviceTensor) else x


class _Dispatch(TorchDispatchMode):
    __module__ = "torch.fake_device"  # as a device of torch's own is

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Functions in which torch reads a device below Python, or creates a tensor past any dispatch."""

    __module__ = "torch.fake_device"  # as a device of torch's own is

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
            tensor = torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype))
            return tensor.to(kwargs.get("device", args[0].device))
        if func in (torch.where, Tensor.where):
            args = tuple(_number(x) for x in args)
        if func is Tensor.__getitem__:
            args = (args[0], _index(args[1]))
        if func is Tensor.__setitem__:
            args = (args[0], _index(args[1]), _number(args[2], args[0].dtype))
        return func(*args, **kwargs)


def _index(index: Any) -> Any:
    """Return an index with tensors for its lists: torch would create them below Python."""
    if isinstance(index, tuple):
        return tuple(_index(part) for part in index)
    return torch.as_tensor(index) if isinstance(index, list | range | np.ndarray) else index


def _number(x: Any, dtype: torch.dtype | None = None) -> Any:
    """Return a tensor without axes for a number: torch would create it below Python."""
    return torch.tensor(x, dtype=dtype) if isinstance(x, int | float | complex) else x


@contextmanager
def fake_device() -> Iterator[torch.device]:
    """Yield the fake device; tensors moved there stay apart from the CPU's."""
    initialise, overwrite = torch.cuda._lazy_init, torch.__future__.get_overwrite_module_params_on_conversion()
    torch.cuda._lazy_init = lambda: None
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    plain = undeclared.TENSORS
    undeclared.TENSORS = (*plain, DeviceTensor)  # as a real device's are
    try:
        with _Functions(), _Dispatch():
            yield DEVICE
    finally:
        undeclared.TENSORS = plain
        torch.cuda._lazy_init = initialise
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
