"""The base of every model with hook points: runs, with hooks and with a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from prisma_core.errors import HookError, InputError
from prisma_core.errors.arguments import check_call, check_eager, check_flags, device_of, dtype_of
from prisma_core.errors.migration import check_keywords, keyword_names, keywords, module_getattr
from prisma_core.hooks.cache import ActivationCache
from prisma_core.hooks.capture import Countdown, Keep, gradients
from prisma_core.hooks.point import (
    OPEN_SCOPES,
    Capture,
    HookContext,
    HookPoint,
    PlacedHook,
    Scope,
    ScopeContext,
    Splice,
    Stop,
)
from prisma_core.hooks.query import LayerQuery, Query
from prisma_core.hooks.sites import HookMapping, Site, by_name, select, splicing_scope, with_splices
from prisma_core.spec.brief import NameTable
from prisma_core.spec.layout import Index, TokenLayout, check_axes, index_slices

_OF_TORCH = frozenset(vars(nn.Module()))


class HookedModel(nn.Module):
    """A module with hook points.

    A hook point is an attribute of a submodule at any depth, named by its path. They are looked up at each call, so a
    submodule may be replaced at any time.

    Attributes:
        cache_type: the class of the model's caches.
    """

    cache_type: ClassVar[type[ActivationCache]] = ActivationCache

    __getattr__ = module_getattr()  # pyright: ignore[reportAssignmentType]

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        try:
            output = super().__call__(*inputs, **kwargs)
        except TypeError:
            self._refuse_keywords(kwargs)
            raise
        except Stop as stop:
            inner = "A pass began inside of one that is cached, in a hook of torch's: begin it in one of model.hooks."
            raise HookError(inner) if self in stop.args else stop from None
        scopes = OPEN_SCOPES.get()
        for scope in scopes:
            if self in scope.completed:
                scope.completed[self] = True
        # A copy in a scope: the user may edit the output in place, and a cache may hold it.
        return output.clone() if scopes and isinstance(output, Tensor) else output

    def hook_points(self) -> dict[str, HookPoint]:
        """Return every hook point by its full name, in firing order."""
        return NameTable({name: site.point for name, site in self._sites().items()})

    def resolve(self, query: Query | None) -> list[str]:
        """Return the full names of the hook points a query selects (see ``prisma_core.hooks.query``)."""
        return select(self._sites(), query)

    def open_hooks(self) -> dict[str, list[Callable[..., object]]]:
        """Return what runs now at each hook point of the model, in this thread or task and in this order.

        Splices, then hooks, then backward hooks, then caches that are being filled; hook points at which nothing runs
        are left out.

        >>> with model.hooks({("z", 0): lambda z, hook: z / 2}):
        ...     list(model.open_hooks())
        ['blocks.0.attn.hook_z']
        """
        scopes, hooks = OPEN_SCOPES.get(), dict[str, list[Callable[..., object]]]()
        for name, point in self.hook_points().items():
            placed: list[Any] = [each.splices[point.key].splice for each in scopes if point.key in each.splices]
            placed += [hook.hook for scope in scopes for hook in scope.edits.get(point.key, ())]
            placed += [hook.hook for scope in scopes for hook in scope.backward.get(point.key, ())]
            captures = [capture for scope in scopes for capture in scope.captures.get(point.key, ())]
            if placed or captures:
                hooks[name] = [*placed, *captures]
        return hooks

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
        """Return a scope in which the given hooks run at every pass of this model in this thread or task.

        Scopes nest, and may be left in any order, by another thread or task too. Those who copy the context, such as a
        new task, see the scope while it is open; so does the caller of a generator that yields inside it. While a hook
        runs, the scopes of its model pause: a pass inside a hook is a pass of its own.

        Args:
            hooks: name, shorthand, glob or ``(shorthand, layer)`` to ``hook(activation, at) -> tensor | None``. A hook
                may edit its activation in place; what it returns, if anything, replaces it.
            backward: the same for gradients, run during the backward pass of anything computed in the scope.

        Raises:
            UnknownName: a name matches no hook point.
            HookError: a hook cannot be called; or, on leaving the scope, passes of the model came to their end in it
                and none went by a hook point that has a hook. For a tower's hook points it is the tower's own passes
                that count, so a scope in which no pass ran to its end leaves in silence.

        >>> with model.hooks({("z", 0): lambda z, at: z * 0}):  # no attention in the first block
        ...     logits = model(image)
        """
        if unknown:
            check_keywords("hooks", unknown, keyword_names(self.hooks))
        return ScopeContext(self._scope(self._sites(), hooks, backward), None)

    def caching(
        self,
        names: Query | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        pos: Index | str | None = None,
        heads: Index | None = None,
        detach: bool = True,
        **unknown: Any,
    ) -> AbstractContextManager[ActivationCache]:
        """Return a scope that fills a cache during the next pass of this model; works on compiled models too.

        Args:
            names: which activations (see ``prisma_core.hooks.query``); None for all that are not derived.
            device: where to keep them; default where they are.
            dtype: what to keep them as; default as they are.
            pos: token positions to keep, or a subset of the layout (``"cls"``, ``"registers"``, ``"patches"``,
                ``"frame 3"``); of patterns and scores, the query positions. Axes stay: ``pos=0`` keeps one token. Where
                frames have an axis of their own, ``pos`` counts one frame's tokens, and a frame is not cut.
            heads: heads to keep. Axes stay. Activations without such an axis are kept whole.
            detach: False keeps the autograd graph.

        The cache of a model that takes images of any size does not know which it was: give it
        ``cache.layout = model.layout_for(image)`` before asking it for grids; and of one that reads texts
        ``cache.tokens = tokens`` before asking what it read.

        Raises:
            UnknownName: a name matches no hook point.
            HookError: a second pass runs in the scope; or, on leaving it, a pass came to its end without going by a
                hook point that was asked for (see ``hooks``).

        >>> with model.caching("resid_post", pos=0) as cache:
        ...     logits = model(image)
        >>> cache["resid_post", -1].shape
        torch.Size([1, 1, 128])
        """
        if unknown:
            check_keywords("caching", unknown, keyword_names(self.caching))
        sites = self._sites()
        scope, cache = self._scope(sites), self._cache(sites, layout=self.fixed_layout, pos=pos)
        keeps = self._keeps(cache, sites, names, heads=heads, device=device, dtype=dtype, detach=detach)
        for name, keep in keeps.items():
            scope.captures[sites[name].point.key] = (keep,)
            if names is not None:  # None means whatever the pass goes by
                scope.expect(keep, sites[name].owner)
        return ScopeContext(scope, cache)

    def splicing(
        self, splices: Mapping[str | LayerQuery, Splice], *, reads: Mapping[str | LayerQuery, Capture] | None = None
    ) -> AbstractContextManager[None]:
        """Return a scope in which functions stand in the place of activations, with hook points of their own.

        While it is open, in this thread or task, the hook points of a splice are hook points of this model, named by
        the one that the splice is at: hooks, caches and whatever else takes names finds them. Scopes that were opened
        before a splicing run before it, those opened inside see what it made.

        Args:
            splices: by a hook point, what takes the place of its activation.
            reads: by a hook point, what is given the activation there, as hooks have left it: for a splice that
                computes from another place than its own.

        Raises:
            UnknownName: a name matches no hook point, or several.
            HookError: there are splices at a hook point already whose hook points have the same names; or, on leaving
                the scope, passes came to their end in it without going by a splice.
        """
        return ScopeContext(splicing_scope(self._sites(), splices, {} if reads is None else reads), None)

    # ---------------------------------------------------------------- runs

    def run_with_hooks(
        self, *inputs: Any, hooks: HookMapping | None = None, backward: HookMapping | None = None, **kwargs: Any
    ) -> Any:
        """Run the model with hooks (see ``hooks``) and return its output.

        Raises:
            UnknownName: a name matches no hook point.
            HookError: a hook returned something unusable, or its hook point was not reached.

        >>> logits = model.run_with_hooks(image, hooks={"blocks.0.hook_mlp_out": lambda x, at: x * 0})
        """
        scope = self._scope(self._sites(), hooks, backward, surely=True)
        return self._one_pass(self.run_with_hooks, scope, inputs, kwargs)

    def run_with_cache(
        self,
        *inputs: Any,
        names: Query | None = None,
        hooks: HookMapping | None = None,
        loss: Callable[[Any], Tensor] | None = None,
        output: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
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

        >>> logits, cache = model.run_with_cache(image, names=["resid_post", ("pattern", 0)])
        >>> cache["resid_post", -1].shape, cache["pattern", 0].shape
        (torch.Size([1, 145, 128]), torch.Size([1, 4, 145, 145]))
        """
        if loss is not None:
            check_call(loss, 1, "The loss", "a function from the output to one number", HookError)
            if not output:
                raise HookError("A loss needs the output: leave output=True.")
        check_flags(output=output, remove_batch_dim=remove_batch_dim)
        sites = self._sites()
        scope = self._scope(sites, hooks)
        layout = self.layout_for(*inputs, *kwargs.values())  # how many patches a frame has depends on the input
        about: dict[str, Any] = {"layout": layout, "tokens": self.tokens_in(*inputs, **kwargs), "pos": pos}
        cache, whole = self._cache(sites, **about), dict[str, Tensor]()
        keeps = self._keeps(cache, sites, names, heads=heads, device=device, dtype=dtype, detach=detach)
        stop = Countdown(len(keeps), self)
        for name, keep in keeps.items():
            key = sites[name].point.key
            if loss is not None:  # gradients are by what flows through the model: cuts and casts come after them
                scope.backward[key] = ()
                keep = Keep(whole, name, detach=False, copy=keep.copy)
            scope.captures[key] = (keep,) if output else (keep, stop)
            if names is not None:
                scope.expect(keep, None)
        with nullcontext() if loss is None else torch.enable_grad():
            result = self._one_pass(self.run_with_cache, scope, inputs, kwargs, output=output)
            if loss is not None:
                cache.gradients = self._cache(sites, **about)
                for store, tensors in ((cache.gradients.store, gradients(loss, result, whole)), (cache.store, whole)):
                    store.update({name: keeps[name].cut(x.detach()) for name, x in tensors.items()})
        return result, cache.remove_batch_dim() if remove_batch_dim else cache

    def _one_pass(
        self, method: Callable[..., Any], scope: Scope, inputs: Any, kwargs: dict[str, Any], *, output: bool = True
    ) -> Any:
        """Run one pass in a scope, for a method that passes keywords on; without output, until a capture stops it."""
        try:
            with ScopeContext(scope, None, kwargs):
                if output:
                    return self(*inputs, **kwargs)
                self._call_impl(*inputs, **kwargs)  # torch's hooks run too; compiled code cannot stop
        except Stop:
            return None
        except (TypeError, InputError):
            self._refuse_keywords(kwargs, method)
            raise

    def _code(self) -> Callable[..., Any]:
        """What takes the keywords of a pass."""
        return self.forward

    def _refuse_keywords(self, kwargs: Mapping[str, Any], method: Callable[..., Any] | None = None) -> None:
        """Refuse a keyword that the forward pass does not take; ``method`` is what was called with it, if any."""
        if (names := keywords(self._code())) is not None:
            names = [*(keyword_names(method) if method else []), *names]
            check_keywords(method.__name__ if method else type(self).__name__, kwargs, names)

    # ---------------------------------------------------------------- the parts of a scope

    def _sites(self) -> dict[str, Site]:
        """Walk the modules, and return every hook point with its owner by full name, in firing order."""
        check_eager()
        spliced = [scope.splices for scope in OPEN_SCOPES.get() if scope.splices]
        return dict(with_splices(sites_below(self), spliced)) if spliced else sites_below(self)

    def _scope(
        self,
        sites: Mapping[str, Site],
        hooks: HookMapping | None = None,
        backward: HookMapping | None = None,
        *,
        surely: bool = False,
    ) -> Scope:
        """Return a scope with hooks at their hook points, to be reached ``surely``, or else if a pass completes."""
        scope = Scope(frozenset(site.point for site in sites.values()))
        for mapping, places in ((hooks, scope.edits), (backward, scope.backward)):
            for name, hook in by_name(sites, mapping):
                point, owner = sites[name]
                placed = PlacedHook(HookContext(name, point.axes), hook, scope.points)
                places[point.key] = (*places.get(point.key, ()), placed)
                scope.expect(placed, None if surely else owner)
        return scope

    def _cache(self, sites: Mapping[str, Site], **fields: Any) -> ActivationCache:
        return self.cache_type({}, axes={name: site.point.axes for name, site in sites.items()}, model=self, **fields)

    def _keeps(
        self, cache: ActivationCache, sites: Mapping[str, Site], query: Query | None, heads: Index | None, **how: Any
    ) -> dict[str, Keep]:
        """Return the captures that fill a cache, by full name; ``how`` is ``device``, ``dtype`` and ``detach``."""
        check_flags(detach=how["detach"])
        how = {**how, "device": device_of(how["device"]), "dtype": dtype_of(how["dtype"])}
        axes = {name: sites[name].point.axes for name in select(sites, query)}
        pos, whole = cache.pos, set[str]()
        if isinstance(pos, str):
            layout, subset = cache.layout or self.layout_for(), pos
            if layout is None:
                raise HookError(f"This model has no token layout, so pos={pos!r} means nothing; give positions.")
            layout.positions(subset)  # refuses one of which there is no token
            places = layout.slice(subset)
            pos = slice(places.start, None) if subset in ("patches", "all") else places  # the image may be larger
            whole = {name for name in axes if not _has_subset(sites[name], subset)}
            if axes and len(whole) == len(axes):
                name = next(iter(axes))
                raise InputError(
                    f"pos={subset!r} does not cut {name} ({axes[name]}): it is of a text, or has its frames on an "
                    "axis of their own. Cache it whole; of frames take cache.frame(...)."
                )
        check_axes(list(axes.values()), pos, heads)
        kinds = {name: (each, name in whole) for name, each in axes.items()}
        cuts = {kind: index_slices(kind[0], None if kind[1] else pos, heads) for kind in set(kinds.values())}
        return cache.keeps({name: cuts[kind] for name, kind in kinds.items()}, **how)


def _has_subset(site: Site, subset: str) -> bool:
    """Return whether a subset of the layout selects among the tokens of a hook point."""
    framed = subset.startswith("frame ") and "frame" in site.point.axes.split()
    return not framed and cast(HookedModel, site.owner).layout_for() is not None


def sites_below(module: nn.Module) -> dict[str, Site]:
    """Return every hook point of a module and its parts, by name within it, in firing order."""
    found = dict[str, Site]()
    _walk(module, module, "", found, set())
    return dict(sorted(found.items(), key=lambda item: item[1].point.order))


def _walk(module: nn.Module, owner: nn.Module, path: str, sites: dict[str, Site], seen: set[nn.Module]) -> None:
    """Add each hook point below a module by full name; of a module used twice, under its first name."""
    seen.add(module)
    for name, value in vars(module).items():
        if name not in _OF_TORCH and isinstance(value, HookPoint):
            sites[path + name] = Site(value, owner)
    for name, child in vars(module)["_modules"].items():
        if child is not None and child not in seen:
            _walk(child, child if isinstance(child, HookedModel) else owner, f"{path}{name}.", sites, seen)
