"""What every module with hook points can do: list them, and open scopes in which hooks run and caches fill."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from prisma_core.errors import HookError, InputError
from prisma_core.hooks.cache import ActivationCache
from prisma_core.hooks.capture import Index, Keep, check_axes, check_device, cuts, refuse_unreached
from prisma_core.hooks.keywords import check_keywords, elsewhere, named
from prisma_core.hooks.point import Hook, HookContext, HookPoint, Passes, Placed, Scope, activate, check_hook
from prisma_core.hooks.points import Points
from prisma_core.hooks.query import LayerQuery, Query, resolve
from prisma_core.hooks.tokens import TokenLayout

HookMapping = Mapping["str | LayerQuery", Hook]


class Scoped(nn.Module):
    """The part of a ``HookedModel`` that opens scopes."""

    cache_type: ClassVar[type[ActivationCache]] = ActivationCache

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if answer := elsewhere(name):
                raise AttributeError(f"{type(self).__name__} has no attribute {name!r}: {answer}") from error
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_points"}  # a copy finds its own

    def hook_points(self) -> dict[str, HookPoint]:
        """Return every hook point by its full name, in firing order."""
        return self._points_now().found

    def _points_now(self) -> Points:
        points = self.__dict__.setdefault("_points", None)
        if points is None or not points.hold(self):
            points = self.__dict__["_points"] = Points(self, Scoped)
        return points

    def resolve(self, query: Query | None) -> list[str]:
        """Return the full names of the hook points a query selects (see ``prisma_core.hooks.query``)."""
        points = self.hook_points()
        return resolve(query, list(points), frozenset(name for name, point in points.items() if point.derived))

    def layout_for(self, *inputs: Any) -> TokenLayout | None:
        """Return the token layout a pass over these inputs has, where the model knows one."""
        return None

    def tokens_in(self, *inputs: Any, **kwargs: Any) -> Tensor | None:
        """Return the tokens ``[text pos]`` among the inputs of a pass, where the model reads texts."""
        return None

    @property
    def fixed_layout(self) -> TokenLayout | None:
        """The token layout of every pass, or None where it follows the input."""
        return None

    # ---------------------------------------------------------------- scopes

    def hooks(
        self, hooks: HookMapping | None = None, *, backward: HookMapping | None = None, **unknown: Any
    ) -> AbstractContextManager[None]:
        """Return a scope in which the given hooks run at every pass of this model in this thread.

        Args:
            hooks: name, shorthand, glob or ``(shorthand, layer)`` to ``hook(activation, at) -> tensor | None``. A hook
                may edit its activation in place; what it returns, if anything, replaces it.
            backward: the same for gradients, run during the backward pass of anything computed in the scope.

        Raises:
            UnknownName: a name matches no hook point.
            HookError: a hook cannot be called; or, on leaving the scope, passes of the model came to their end in it
                and none went by a hook point that has a hook. For a tower's hook points it is the tower's own passes
                that count, so a scope in which no pass ran to its end leaves in silence.
        """
        check_keywords("hooks", unknown, named(self.hooks))
        return self._hooked(hooks, backward)

    def _hooked(
        self, hooks: HookMapping | None, backward: HookMapping | None, kwargs: Mapping[str, Any] | None = None
    ) -> AbstractContextManager[None]:
        edits, gradients = self._placed(hooks), self._placed(backward)
        placed = [hook for at_point in (*edits.values(), *gradients.values()) for hook in at_point]
        return self._watched(
            Scope(edits=edits, backward=gradients),
            {hook.at.name for hook in placed},
            lambda: [hook.at.name for hook in placed if not hook.reached],
            kwargs,
        )

    @contextmanager
    def _watched(
        self,
        scope: Scope,
        names: Collection[str],
        unreached: Callable[[], list[str]],
        kwargs: Mapping[str, Any] | None = None,
    ) -> Generator[None]:
        """Activate a scope, and refuse hook points that no pass in it went by.

        Args:
            names: the hook points that count.
            unreached: those of them that were not reached, in the end.
            kwargs: of the one pass that was to reach all of them; None where it is not known whether one ran.
        """
        owners = self._points_now().owners
        passes = {path: Passes() for path in {owners[name] for name in names}}
        scope.passes = {self.get_submodule(path): (each,) for path, each in passes.items()}
        with activate(scope):
            yield
        refuse_unreached(
            [name for name in unreached() if kwargs is not None or passes[owners[name]].ended], kwargs or {}
        )

    def _placed(self, hooks: HookMapping | None) -> dict[HookPoint, tuple[Placed, ...]]:
        points = self.hook_points()
        placed: dict[HookPoint, tuple[Placed, ...]] = {}
        given = cast(object, hooks)
        if not isinstance(given, Mapping | None):
            pairs = " Of a list of pairs, dict(pairs) makes one." if type(given) in (list, tuple) else ""
            raise HookError(f"Expected hooks as {{name: hook}}, got {type(given).__name__}.{pairs}")
        for query, hook in (hooks or {}).items():
            check_hook(query, hook)
            for name in self.resolve([query]):
                point = points[name]
                placed[point] = (*placed.get(point, ()), Placed(hook, HookContext(name, point.axes)))
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
        **unknown: Any,
    ) -> Generator[ActivationCache]:
        """Open a scope that fills a cache during the next pass of this model; works on compiled models too.

        Args:
            names: which activations (see ``prisma_core.hooks.query``); None for all that are not derived.
            device: where to keep them; default where they are.
            dtype: what to keep them as; default as they are.
            pos: token positions to keep, or a subset of the layout (``"cls"``, ``"registers"``, ``"patches"``,
                ``"frame 3"``); of patterns and scores, the query positions. Axes stay: ``pos=0`` keeps one token. Where
                frames have an axis of their own, ``pos`` counts one frame's tokens, and a frame is not cut.
            heads: heads to keep. Axes stay. Activations without such an axis are kept whole.
            detach: False keeps the autograd graph.

        The cache of a model that takes pictures of any size does not know which it was: give it
        ``cache.layout = model.layout_for(image)`` before asking it for grids; and of one that reads texts
        ``cache.tokens = tokens`` before asking what it read.

        Raises:
            UnknownName: a name matches no hook point.
            HookError: a second pass runs in the scope; or, on leaving it, a pass came to its end without going by a
                hook point that was asked for (see ``hooks``).
        """
        check_keywords("caching", unknown, named(self.caching))
        wanted = self.resolve(names)
        check_device(device)
        asked = () if names is None else wanted  # None means whatever the pass goes by
        filling = self._filling(wanted, device=device, dtype=dtype, pos=pos, heads=heads, detach=detach)
        with (
            filling as cache,
            self._watched(Scope(), asked, lambda: [each for each in asked if each not in cache.store]),
        ):
            yield cache

    def _cache(self, **fields: Any) -> ActivationCache:
        axes = {name: point.axes for name, point in self.hook_points().items()}
        return self.cache_type({}, axes=axes, model=self, **fields)

    @contextmanager
    def _filling(self, names: list[str], *, pos: Index | str | None = None, **how: Any) -> Generator[ActivationCache]:
        cache = self._cache(layout=self.fixed_layout, pos=pos)
        with activate(Scope(captures=self._captures(cache, names, pos=pos, **how))):
            yield cache

    def _refilled(self, store: Mapping[str, Tensor], *, pos: Index | str | None, **how: Any) -> ActivationCache:
        """Return a cache of activations at hand, cut and cast as one of a pass would be."""
        cache, points = self._cache(pos=pos), self.hook_points()
        captures = self._captures(cache, list(store), pos=pos, **how)
        for name, tensor in store.items():
            captures[points[name]][0](tensor.detach())
        return cache

    def _captures(
        self,
        cache: ActivationCache,
        names: list[str],
        *,
        pos: Index | str | None = None,
        heads: Index | None = None,
        layout: TokenLayout | None = None,
        **how: Any,
    ) -> dict[HookPoint, tuple[Keep, ...]]:
        points = self.hook_points()
        axes = {name: points[name].axes for name in names}
        places = None if isinstance(pos, str) else pos
        if isinstance(pos, str):
            layout = layout or self.layout_for()
            if layout is None:
                raise HookError(f"This model has no token layout, so pos={pos!r} means nothing; give positions.")
            subset = layout.slice(pos)
            places = slice(subset.start, None) if pos in ("patches", "all") else subset  # the picture may be larger
        whole = {name for name in names if isinstance(pos, str) and not self._has_subset(name, pos)}
        if names and len(whole) == len(names):
            raise InputError(
                f"pos={pos!r} does not cut {names[0]} ({axes[names[0]]}): it is of a text, or has its frames on an "
                "axis of their own. Cache it whole; of frames take cache.frame(...)."
            )
        check_axes(list(axes.values()), places, heads)
        return {
            points[name]: (Keep(cache.store, name, cuts(axes[name], None if name in whole else places, heads), **how),)
            for name in names
        }

    def _has_subset(self, name: str, subset: str) -> bool:
        """Whether the tokens of a hook point are those that a subset of the layout is of."""
        points = self._points_now()
        owner = self.get_submodule(points.owners[name])
        framed = subset.startswith("frame ") and "frame" in points.found[name].axes.split()
        return not framed and isinstance(owner, Scoped) and owner.layout_for() is not None
