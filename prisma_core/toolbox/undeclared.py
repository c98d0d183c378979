"""Behaviour of an upstream module that no tensor and no attribute shows: a canonical form would leave it out.

That is forward hooks, pre-hooks, forwards that were replaced on an instance or a class, attention functions of the
user's, and classes that the adapter does not know. One check for all adapters: none calls it, and none can skip it.

Harmless, and passed: wrappers that change no number (accelerate's that move tensors, ``torch.compile``).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, MethodType
from typing import Any, cast

from torch import nn

from prisma_core.errors import UnsupportedArchitecture
from prisma_core.maps.reader import TORCH, Reader, qualified_name

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
ACCELERATE = ("AlignDevicesHook", "CpuOffload", "SequentialHook")
READ_ONLY = ("transformers.utils.output_capturing",)  # modules of hooks that keep what they are shown
# transformers' hook that asks for gradients by the embeddings, where activations are checkpointed
ASKS_FOR_GRADIENTS = "enable_input_require_grads.<locals>.make_inputs_require_grads"
EAGER = (None, "eager")


def check_undeclared(
    upstream: Reader, packages: Iterable[str], is_ignored: Callable[[str], bool], stem: nn.Module | None = None
) -> None:
    """Refuse a module that does more than its tensors and attributes say.

    Args:
        upstream: the reader that the adapter has read the module with.
        packages: qualified names of classes. Of their packages, and of those of classes that the reader recognised, an
            adapter knows all classes that derive from no other.
        is_ignored: whether the adapter left a tensor out, with a reason. Modules of such tensors alone make no number.
        stem: what is copied as it is, so that nothing in it is lost.

    Raises:
        UnsupportedArchitecture: it names the module, and what to do.
    """
    known = (qualified_name(cast("object", upstream.module.get_submodule(path))) for path in upstream.classes)
    roots = {_root(name) for name in (*packages, *known)} - {"torch"}
    copied = set[nn.Module]() if stem is None else set(stem.modules())
    modules = cast("Iterator[tuple[str, nn.Module]]", upstream.module.named_modules(remove_duplicate=False))
    for path, module in modules:
        tensors = [f"{path}.{name}" if path else name for name, _ in _tensors(module)]
        if module in copied or (tensors and all(is_ignored(name) for name in tensors)):
            continue
        problem = (
            _hooked(module, path, upstream.record)
            or _replaced(module, roots)
            or _foreign_attention(module)
            or ("" if not path or path in upstream.classes else _unknown(module, roots))
        )
        if problem:
            kind = qualified_name(module)
            raise UnsupportedArchitecture(f"{kind} at {path!r}" if path else kind, problem)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _hooked(module: nn.Module, path: str, read: set[str]) -> str:
    for name in HOOKS:
        hooks = cast("dict[int, object]", getattr(module, name)).values()
        hooks = [hook for hook in hooks if not _is_harmless(hook)]
        if hooks and (f"{path}.{name}" if path else name) not in read:
            kind, hook = name.removeprefix("_").removesuffix("s").replace("_", " "), hooks[0]
            return (
                f"a {kind} ({_name(hook)}), which may change its numbers. Remove it before (handle.remove()), and edit "
                "the hooked model instead: model.hooks({name: function})"
            )
    return ""


def _is_harmless(hook: object) -> bool:
    home, name = getattr(hook, "__module__", ""), getattr(hook, "__qualname__", "")
    return home in READ_ONLY or (home.partition(".")[0] == "transformers" and name.endswith(ASKS_FOR_GRADIENTS))


def _replaced(module: nn.Module, roots: set[str]) -> str:
    if "forward" in vars(module):
        forward = vars(module)["forward"]
        if _original(forward, module):
            return ""
        return (
            f"a forward of this instance's own ({_name(forward)}) in the place of its class's. Take it off before "
            "(del module.forward)"
        )
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    if owner is nn.Module:  # a container, which is not called
        return ""
    known = {_root(f"{owner.__module__}."), "torch", *roots}
    forward: object = vars(owner)["forward"]
    while forward is not None:
        home = forward.__globals__.get("__name__", "") if isinstance(forward, FunctionType) else None
        if home is not None and _root(home) not in known:
            return f"a forward of {home} ({_name(forward)}) in the place of its class's. Put back the library's"
        forward = getattr(forward, "__wrapped__", None)
    return ""


def _original(forward: Any, module: nn.Module) -> bool:
    """Whether a forward set on an instance is that of its class in a wrapper that changes no number."""
    while isinstance(forward, FunctionType) and forward.__globals__.get("__name__", "").startswith("torch._dynamo."):
        forward = cast("Any", getattr(forward, "_torchdynamo_orig_callable", getattr(forward, "__wrapped__", None)))
    if isinstance(forward, functools.partial) and forward.func.__module__ == "accelerate.hooks":
        hooks = getattr(module, "_hf_hook", None)
        if not {type(hook).__name__ for hook in (hooks, *getattr(hooks, "hooks", ()))} <= set(ACCELERATE):
            return False
        forward = getattr(module, "_old_forward", None)
    if not isinstance(forward, MethodType):
        return False
    return forward.__self__ is module and forward.__func__ is getattr(type(module), "forward", None)


def _foreign_attention(module: nn.Module) -> str:
    """Name an attention function that is not transformers' own."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    library: Any = sys.modules.get("transformers.modeling_utils")
    if name in EAGER or not isinstance(name, str) or library is None:
        return ""
    function = library.ALL_ATTENTION_FUNCTIONS.get(name)
    if getattr(function, "__module__", "").partition(".")[0] == "transformers":
        return ""
    return (
        f"the attention function {name!r}, which is not transformers' own. Choose one of its own before: "
        "upstream.set_attn_implementation('sdpa')"
    )


def _runs_its_children(kind: type[nn.Module]) -> bool:
    """Whether all that a class computes is what its children do, one after the other."""
    names = ("forward", "__call__", "__iter__")
    return issubclass(kind, nn.Sequential) and all(getattr(kind, n) is getattr(nn.Sequential, n) for n in names)


def _unknown(module: nn.Module, roots: set[str]) -> str:
    kind = type(module)
    full = f"{kind.__module__}.{kind.__qualname__}"
    base = next((each for each in kind.__mro__[1:] if each is not nn.Module and "forward" in vars(each)), None)
    of_the_library = _root(full) in roots and (base is None or _runs_its_children(kind))
    if full.startswith(TORCH) or of_the_library:
        return ""
    derived = f" that derives from {base.__module__}.{base.__qualname__}" if base else " of another package"
    return (
        f"a class{derived}, so it may compute something else. An adapter that knows it says so: reader.expect({full!r})"
    )


def _root(name: str) -> str:
    return name.partition(".")[0]


def _name(function: object) -> str:
    home, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    return f"{home}.{name}" if name else type(function).__qualname__
