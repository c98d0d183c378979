"""What every hooked model can do: list its hook points, open scopes, run with hooks, run with a cache."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from prisma_core.cache import ActivationCache
from prisma_core.captures import Countdown, Index, Keep, Note, all_reached, cuts
from prisma_core.errors import HookError
from prisma_core.hooks import Hook, HookContext, HookPoint, Scope, Stop, activate
from prisma_core.layout import TokenLayout
from prisma_core.names import LayerQuery, Query, resolve

HookMapping = Mapping["str | LayerQuery", Hook]


class Hooked(nn.Module):
    """A module with hook points.

    Hook points are found wherever a submodule has one as an attribute, and are named by their path.
    """

    def hook_points(self) -> dict[str, HookPoint]:
        """Return every hook point by its full name, in firing order."""
        points = self.__dict__.get("_points")
        if points is None:
            points = dict(sorted(self._walk(), key=lambda item: item[1].order))
            self.__dict__["_points"] = points
        return points

    def _walk(self) -> Iterator[tuple[str, HookPoint]]:
        for path, module in cast("Iterator[tuple[str, nn.Module]]", self.named_modules()):
            for attribute, value in vars(module).items():
                if isinstance(value, HookPoint):
                    yield (f"{path}.{attribute}" if path else attribute), value

    def resolve(self, query: Query | None) -> list[str]:
        """Return the full names of the hook points a query selects (see ``prisma_core.names``)."""
        points = self.hook_points()
        return resolve(query, list(points), frozenset(name for name, point in points.items() if point.derived))

    def layout_of(self, *inputs: Any) -> TokenLayout | None:
        """Return the token layout a pass over these inputs has, where the model knows one."""
        return None

    @property
    def only_layout(self) -> TokenLayout | None:
        """The token layout of every pass, or None where it follows the input."""
        return None

    # ---------------------------------------------------------------- scopes

    def hooks(
        self, hooks: HookMapping | None = None, *, backward: HookMapping | None = None
    ) -> AbstractContextManager[None]:
        """Return a scope in which the given hooks run at every pass of this model in this thread.

        Args:
            hooks: name, shorthand, glob or ``(shorthand, layer)`` to ``hook(activation, at) -> tensor | None``. A hook
                may edit its activation in place; what it returns, if anything, replaces it.
            backward: the same for gradients, run during the backward pass of anything computed in the scope.

        Raises:
            UnknownName: a name matches no hook point.
        """
        return activate(Scope(edits=self._placed(hooks), backward=self._placed(backward)))

    def _placed(self, hooks: HookMapping | None) -> dict[HookPoint, tuple[tuple[Hook, HookContext], ...]]:
        points = self.hook_points()
        placed: dict[HookPoint, tuple[tuple[Hook, HookContext], ...]] = {}
        given = cast(object, hooks)
        if not isinstance(given, Mapping | None):
            raise HookError(f"Expected hooks as {{name: hook}}, got {type(given).__name__}.")
        for query, hook in (hooks or {}).items():
            if not callable(hook):
                raise HookError(f"The hook for {query!r} is {type(hook).__name__}; expected hook(activation, at).")
            for name in self.resolve([query]):
                point = points[name]
                placed[point] = (*placed.get(point, ()), (hook, HookContext(name, point.axes)))
        return placed

    @contextmanager
    def caching(
        self,
        names: Query | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        pos: Index | str | None = None,
        heads: Index | None = None,
        detach: bool = True,
    ) -> Generator[ActivationCache]:
        """Open a scope that fills a cache during the next pass of this model; works on compiled models too.

        Args:
            names: which activations (see ``prisma_core.names``); None for all that are not derived.
            device: where to keep them; default where they are.
            dtype: what to keep them as; default as they are.
            pos: token positions to keep, or a subset of the layout (``"cls"``, ``"registers"``, ``"patches"``); of
                patterns and scores, the query positions. Axes stay: ``pos=0`` keeps one token.
            heads: heads to keep. Axes stay.
            detach: False keeps the autograd graph.

        The cache of a model that takes pictures of any size does not know which it was: give it
        ``cache.layout = model.layout_of(image)`` before asking it for grids.

        Raises:
            UnknownName: a name matches no hook point.
            HookError: a second pass runs in the scope.
        """
        cache = ActivationCache({}, model=self, layout=self.only_layout, pos=pos)
        captures = self._captures(cache, names, device=device, dtype=dtype, pos=pos, heads=heads, detach=detach)
        with activate(Scope(captures=captures)):
            yield cache

    def _captures(
        self, cache: ActivationCache, names: Query | None, *, pos: Index | str | None, heads: Index | None, **how: Any
    ) -> dict[HookPoint, tuple[Keep, ...]]:
        if isinstance(pos, str):
            layout = self.layout_of()
            if layout is None:
                raise HookError(f"This model has no token layout, so pos={pos!r} means nothing; give positions.")
            subset = layout.slice(pos)
            pos = slice(subset.start, None) if subset.stop == layout.n_tokens else subset  # the picture may be larger
        points = self.hook_points()
        return {
            points[name]: (Keep(cache.store, name, cuts(points[name].axes, pos, heads), **how),)
            for name in self.resolve(names)
        }

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
        fired: set[str] = set()
        watched = {**self._placed(hooks), **self._placed(backward)}
        captures = {point: tuple(Note(fired, at.name) for _, at in placed) for point, placed in watched.items()}
        with self.hooks(hooks, backward=backward), activate(Scope(captures=captures)):
            output = self(*inputs, **kwargs)
        all_reached([at.name for placed in watched.values() for _, at in placed], fired, kwargs)
        return output

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
        wanted = self.resolve(names)
        how: dict[str, Any] = {"device": device, "dtype": dtype, "pos": pos, "heads": heads}
        if loss is not None:
            if not output:
                raise HookError("A loss needs the output: leave output=True.")
            # Gradients are by what flows through the model, so cuts and casts come after the backward pass.
            in_graph = _leaves(self, wanted)
            with torch.enable_grad(), self.hooks(hooks), in_graph, self.caching(wanted, detach=False) as raw:
                result = self(*inputs, **kwargs)
                value = loss(result)
            cache = self._with_gradients(raw, value, how)
        else:
            with self.hooks(hooks), self.caching(wanted, detach=detach, **how) as cache:
                result = self(*inputs, **kwargs) if output else self._until(wanted, inputs, kwargs)
        if names is not None:  # None means whatever the pass goes through
            all_reached(wanted, cache.store.keys(), kwargs)
        cache.layout = self.layout_of(*(inputs or kwargs.values()))
        if cache.grad is not None:
            cache.grad.layout = cache.layout
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

    def _with_gradients(self, raw: ActivationCache, value: Tensor, how: dict[str, Any]) -> ActivationCache:
        if value.numel() != 1:
            raise HookError(f"The loss must be one number; got shape {list(value.shape)}. Pick a logit or take a mean.")
        names, tensors = list(raw.store), list(raw.store.values())
        found = torch.autograd.grad(value, tensors, allow_unused=True, retain_graph=True, materialize_grads=True)
        cache = ActivationCache({}, model=self, pos=how["pos"])
        cache.grad = ActivationCache({}, model=self, pos=how["pos"])
        points = self.hook_points()
        for filled, values in ((cache, tensors), (cache.grad, found)):
            captures = self._captures(filled, names, **how)
            for name, tensor in zip(names, values, strict=True):
                captures[points[name]][0](tensor.detach())
        return cache


def _owner(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _leaves(model: Hooked, names: list[str]) -> AbstractContextManager[None]:
    """Make activations asked for part of a graph even where neither input nor weights need gradients."""
    points = model.hook_points()
    return activate(Scope(edits={points[name]: ((_as_leaf, HookContext(name, points[name].axes)),) for name in names}))


def _as_leaf(x: Tensor, at: HookContext) -> Tensor:
    return x if x.requires_grad else x.detach().requires_grad_()
