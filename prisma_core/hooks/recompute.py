"""Activation checkpointing: what torch computes again for gradients is computed in the scopes it was first computed in.

``torch.utils.checkpoint`` runs a function a second time in the backward pass, when other scopes may be open. Nothing
says that it runs, so its calls are looked for on the stack.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from contextvars import Context
from dataclasses import dataclass, field
from inspect import currentframe
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint

from prisma_core.errors import HookError

Calls = tuple[FrameType, ...]
Enter = Callable[[], AbstractContextManager[object]]
_TORCHS = torch.utils.checkpoint.__dict__
_AGAIN = ("backward", "unpack_hook")  # torch's functions that run one again, with use_reentrant=True and False


@dataclass
class _Function:
    """A function that runs in contexts of its own, and in no others."""

    function: Callable[..., Any]
    contexts: dict[object, Enter] = field(default_factory=dict[object, Enter])

    def __call__(self, *args: Any) -> Any:
        return Context().run(self._entered, *args)

    def _entered(self, *args: Any) -> Any:
        with ExitStack() as stack:
            for enter in self.contexts.values():
                stack.enter_context(enter())
            return self.function(*args)


def checkpoints() -> Calls:
    """Return the running calls of ``torch.utils.checkpoint``, innermost first; none in a compiled model."""
    calls, frame = (), None if torch.compiler.is_compiling() else currentframe()
    while frame is not None:
        if frame.f_globals is _TORCHS:
            calls = (*calls, frame)
        frame = frame.f_back
    return calls


def keep(calls: Calls, key: object, began: Calls, again: Callable[[], Enter], optional: bool = False) -> None:
    """Have what is being checkpointed computed again in a context, as it is now.

    Args:
        calls: the checkpoints that run.
        key: of the context, which is entered once.
        began: the checkpoints that ran when it was entered.
        again: returns what enters such a context.
        optional: whether it does without where gradients are off at first (``use_reentrant=True``).

    Raises:
        HookError: this is the second computation, and the first was not in the context.
    """
    for call in calls:
        if call in began or (optional and call.f_code.co_name == "backward"):
            return
        if call.f_code.co_name in _AGAIN:
            raise HookError(
                "A checkpointed function runs again for gradients, in a scope that was not open when it ran first. "
                "Leave the scope before backward(), or open it around the forward pass too."
            )
        for holder, name in _kept_by(call.f_locals):
            if not isinstance(getattr(holder, name), _Function):
                setattr(holder, name, _Function(getattr(holder, name)))
            contexts = getattr(holder, name).contexts
            contexts[key] = contexts.get(key) or again()


def is_second() -> bool:
    """Return whether this is computed again."""
    return any(call.f_code.co_name in _AGAIN for call in checkpoints())


def has_no_graph() -> bool:
    """Return whether ``checkpoint(use_reentrant=True)`` runs, and will make the graph of what it computes later."""
    return not torch.is_grad_enabled() and any("run_function" in call.f_locals for call in checkpoints())


def _kept_by(values: dict[str, Any]) -> list[tuple[Any, str]]:
    """Return what keeps the function that a call will run again, and under which name, from the call's variables."""
    if "run_function" in values:
        return [(values["ctx"], "run_function")]
    holders = values["gen"].gi_frame.f_locals.values() if "gen" in values else ()
    return [(each, "recompute_fn") for each in holders if hasattr(each, "recompute_fn")]
