"""What a user has added to a model, or changed in it, that neither its spec nor its weights say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from prisma_core.errors import qualified_name
from prisma_core.errors.arguments import shown
from prisma_core.hooks.point import HookPoint

HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def set_on_parts(model: nn.Module) -> list[str]:
    """Name what a user has set on a model's modules, with its place: hooks of torch's, and forwards.

    A library's own hooks are its code, and are left out.

    >>> handle = model.blocks[0].mlp.register_forward_hook(print)
    >>> set_on_parts(model)
    ["A hook of torch's at 'blocks.0.mlp'"]
    >>> handle.remove()
    """
    everywhere = [hook for name in HOOKS for hook in getattr(nn.modules.module, f"_global{name}").values()]
    additions = ["A hook of torch's in all modules"] if any(map(_is_users, everywhere)) else []
    for path, module in cast("Iterator[tuple[str, nn.Module]]", model.named_modules()):
        own = vars(module)
        if any(_is_users(hook) for name in HOOKS for hook in own[name].values()):
            additions.append(f"A hook of torch's at {path!r}")
        elif "forward" in own and "_hf_hook" not in own:  # accelerate's move tensors
            additions.append(f"A forward of its own at {path!r}")
    return additions


def _is_users(hook: object) -> bool:
    return (getattr(hook, "__module__", None) or "").partition(".")[0] not in ("prisma_core", "torch", "transformers")


def behaviour_of(model: nn.Module) -> str | None:
    """Say what a model computes that neither its spec nor its weights say; None for most.

    What names a model by its weights alone, such as a file of results, is of another model where this differs.
    """
    own: str | None = getattr(model, "unsaved_behaviour", lambda: None)()
    return "; ".join([*filter(None, [own]), *set_on_parts(model)]) or None


def changed_part(model: nn.Module, plain: nn.Module) -> str | None:
    """Say what of a model's parts is another than in a model as its spec makes it, to follow "This model".

    Compared are classes, and attributes that are no tensors: sizes, functions, the specs of parts.
    """
    parts = dict(cast("Iterator[tuple[str, nn.Module]]", plain.named_modules()))
    for path, part in cast("Iterator[tuple[str, nn.Module]]", model.named_modules()):
        like = parts.get(path)
        if type(part) is not type(like):
            return f"has a {qualified_name(part)} at {path!r}, where its spec has {like and qualified_name(like)}"
        names = vars(like).keys() | {name for name in vars(part) if hasattr(type(part), name)}
        for name in sorted(names - {"training", "forward"}) if path else ():
            own, value = vars(part).get(name), vars(like).get(name)
            sized = type(part) is nn.Linear and name in vars(like)  # as its tensors say
            if name[0] != "_" and not sized and not _alike(own, value):
                return f"has {name}={shown(own)} at {path!r}, where its spec has {shown(value)}"
    return None


def _alike(own: Any, value: Any) -> bool:
    return type(own) is type(value) if isinstance(value, HookPoint) else bool(own == value)
