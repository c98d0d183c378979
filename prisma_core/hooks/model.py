"""What every hooked model can do: be run, with hooks and with a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from prisma_core.errors import HookError
from prisma_core.hooks.cache import ActivationCache
from prisma_core.hooks.capture import Countdown, Index, check_device, refuse_unreached
from prisma_core.hooks.gradients import gradients, leaves
from prisma_core.hooks.keywords import check_keywords, keywords, named
from prisma_core.hooks.point import Scope, Stop, activate, ended
from prisma_core.hooks.query import Query
from prisma_core.hooks.scoped import HookMapping, Scoped


class HookedModel(Scoped):
    """A module with hook points.

    Hook points are found wherever a submodule has one as an attribute, and are named by their path. They are looked for
    again when a submodule was replaced or added.
    """

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        if kwargs and not torch.compiler.is_compiling():
            self._check_keywords(kwargs)
        output = super().__call__(*inputs, **kwargs)
        ended(self)
        return output

    # ---------------------------------------------------------------- runs

    def run_with_hooks(
        self,
        *inputs: Any,
        hooks: HookMapping | None = None,
        backward: HookMapping | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model with hooks (see ``hooks``) and return its output.

        Raises:
            UnknownName: a name matches no hook point.
            HookError: a hook returned something unusable, or its hook point was not reached.
        """
        self._check_keywords(kwargs, self.run_with_hooks)
        with self._hooked(hooks, backward, kwargs):
            return self(*inputs, **kwargs)

    def _check_keywords(self, given: Mapping[str, Any], method: Callable[..., Any] | None = None) -> None:
        taken = keywords(self.forward)
        if method is not None and taken is not None:
            taken = [*named(method), *taken]
        check_keywords(type(self).__name__ if method is None else method.__name__, given, taken)

    def run_with_cache(
        self,
        *inputs: Any,
        names: Query | None = None,
        hooks: HookMapping | None = None,
        loss: Callable[[Any], Tensor] | None = None,
        output: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        pos: Index | str | None = None,
        heads: Index | None = None,
        detach: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """Run the model and return its output with a cache of its activations.

        Args:
            inputs: what the model itself takes.
            names, device, dtype, pos, heads, detach: what is cached and how (see ``caching``).
            hooks: hooks to run in the same pass; the cache holds what they made of the activations.
            loss: a function of the output that returns a scalar. Gradients of it by every cached activation are then
                in ``cache.grad``; the output still carries its graph.
            output: False stops the pass after the last activation asked for; the output is then None.
            remove_batch_dim: drop the batch axis of a batch of one.
            kwargs: passed on to the model, such as ``stop_at_layer``.

        Raises:
            UnknownName: a name matches no hook point.
            HookError: a hook point asked for was not reached.
        """
        self._check_keywords(kwargs, self.run_with_cache)
        wanted = self.resolve(names)
        check_device(device)
        # How many patches a frame has depends on the input.
        layout = self.layout_for(*inputs, *kwargs.values()) if isinstance(pos, str) else None
        how: dict[str, Any] = {"device": device, "dtype": dtype, "pos": pos, "heads": heads, "layout": layout}
        if loss is not None:
            if not output:
                raise HookError("A loss needs the output: leave output=True.")
            # Gradients are by what flows through the model, so cuts and casts come after the backward pass.
            in_graph = leaves(self.hook_points(), wanted)
            with torch.enable_grad(), self.hooks(hooks), in_graph, self._filling(wanted, detach=False) as raw:
                result = self(*inputs, **kwargs)
                value = loss(result)
            found = gradients(value, raw.store)
            cache = self._refilled(raw.store, **how)
            cache.gradients = self._refilled(found, **how)
        else:
            with self.hooks(hooks), self._filling(wanted, detach=detach, **how) as cache:
                result = self(*inputs, **kwargs) if output else self._until(wanted, inputs, kwargs)
        if names is not None:  # None means whatever the pass goes by
            refuse_unreached([name for name in wanted if name not in cache.store], kwargs)
        for each in (cache, cache.gradients):
            if each is not None:
                each.layout, each.tokens = self.layout_for(*inputs, *kwargs.values()), self.tokens_in(*inputs, **kwargs)
        if isinstance(result, Tensor) and _owner(result) in {_owner(kept) for kept in cache.store.values()}:
            result = result.clone()  # the user may edit it in place
        return result, cache.remove_batch_dim() if remove_batch_dim else cache

    def _until(self, names: list[str], inputs: Any, kwargs: Any) -> None:
        points = self.hook_points()
        stopper = Countdown(len(names))
        try:
            with activate(Scope(captures={points[name]: (stopper,) for name in names})):
                self.forward(*inputs, **kwargs)
        except Stop:
            pass


def _owner(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
