"""The installed plugins: each is asked once for its parts, and what is broken is set apart by name."""

from __future__ import annotations

import importlib.util
import re
import threading
from collections.abc import Callable, Collection, Container, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import pluggy
from torch import nn

from prisma_core.contract import hookspecs
from prisma_core.contract.adapter import Adapter, Refusal
from prisma_core.contract.case import Case
from prisma_core.contract.source import ModelInfo, Source
from prisma_core.errors import (
    WAYS_OUT,
    InputError,
    PluginError,
    UnknownName,
    UnsupportedArchitecture,
    describe,
    format_error,
    qualified_name,
    returned,
    suggest,
)
from prisma_core.hooks.model import HookedModel
from prisma_core.toolbox.screen import aside, note
from prisma_core.toolbox.settings import kept_settings, raised_by_code, told

if TYPE_CHECKING:
    from typer import Typer

T = TypeVar("T")
Owned: TypeAlias = list[tuple[T, str]]  # parts, each with the name of its plugin
RESERVED = ("file",)  # written by prisma.save; no plugin may claim it
DISTRIBUTION = "prisma-interp"
PATIENCE = 5.0  # seconds until a plugin whose code runs is named
MOST = 100_000  # parts of one plugin: an endless iterator must not hang every command


@dataclass(frozen=True)
class PluginInfo:
    """One installed plugin.

    Attributes:
        name: its entry point's name.
        module: the module the entry point names.
        distribution: the distribution it comes from, with version.
        error: why it, or a part of it, is left out; or None.
        missing: the command that installs the libraries its sources lack, or None.
    """

    name: str
    module: str
    distribution: str
    error: str | None = None
    missing: str | None = None


class Host:
    """The plugins of a set of entry points, by default of all installed ones."""

    def __init__(self, points: Iterable[EntryPoint] | None = None):
        self.infos: dict[str, PluginInfo] = {}
        self._managers: dict[str, pluggy.PluginManager] = {}  # one each: pluggy compares the plugins of a manager
        entries = self._installed() if points is None else points
        for point in sorted(entries, key=lambda point: (not _is_ours(_distribution(point)), point.name, point.value)):
            self._add(point)
        adapters = self._parts("prisma_adapters", Adapter, Refusal)
        self._refusals: dict[str, Refusal] = {}
        for part, _ in adapters:  # Prisma's own come first
            if isinstance(part, Refusal):
                self._refusals = dict.fromkeys(part.types, part) | self._refusals
        self._adapters = self._claims(
            "adapter of", [(part, by) for part, by in adapters if isinstance(part, Adapter)], lambda part: part.types
        )
        self._sources = self._claims("source", self._parts("prisma_sources", Source), lambda part: (part.name,))

    def _installed(self) -> list[EntryPoint]:
        """The entry points of all distributions; one whose list cannot be read is noted."""
        try:
            return list(entry_points(group=hookspecs.GROUP))
        except Exception:  # noqa: BLE001  # of one distribution, whose name the error does not say
            points: dict[str, list[EntryPoint]] = {}  # the first of a name is the one that is imported
            for dist in distributions():
                if (name := _named(dist).rpartition(" ")[0]) in points:
                    continue
                try:
                    points[name] = [point for point in dist.entry_points if point.group == hookspecs.GROUP]
                except Exception as problem:  # noqa: BLE001
                    error = f"its entry points cannot be read: {format_error(problem)}"
                    self.infos[name] = PluginInfo(name, "", _named(dist), error)
            return [point for several in points.values() for point in several]

    def _add(self, point: EntryPoint) -> None:
        name, error = point.name, None
        if holder := self.infos.get(name):
            name = f"{name} ({point.value})"
            error = f"the name {point.name!r} is taken by {holder.module} of {holder.distribution}"
        elif point.pattern.match(point.value) is None:
            error = f"its entry point is {point.value!r}; expected a module, as in my_plugin or my.package:plugin"
        self.infos[name] = PluginInfo(name, point.value, _distribution(point), error)
        if error is None:
            with self._apart(name):
                manager = pluggy.PluginManager(hookspecs.GROUP)
                manager.add_hookspecs(hookspecs)
                manager.register(module := point.load(), name)
                manager.check_pending()
                for hook, call in vars(manager.hook).items():
                    if hasattr(module, hook) and not call.get_hookimpls():
                        self.broke(name, f"its {hook} is no hook: put @hookimpl over the function")
                self._managers[name] = manager

    @contextmanager
    def _apart(self, plugin: str, place: str = "") -> Generator[None]:
        """Note what a plugin's code raises or changes for all, and go on without it."""
        late = threading.Timer(PATIENCE, note, ("waiting for", f"the plugin {plugin} ({self.infos[plugin].module})"))
        late.daemon = True
        late.start()
        changed: list[str] = []
        try:
            with aside(), kept_settings(changed):
                yield
        except BaseException as problem:  # SystemExit, or pytest's Skipped: it must not end the others
            if isinstance(problem, KeyboardInterrupt) and not raised_by_code(problem):
                raise KeyboardInterrupt(f"while the plugin {plugin} ({self.infos[plugin].module}) ran") from problem
            self.broke(plugin, place + format_error(problem))
        finally:
            late.cancel()
        if changed:
            self.broke(plugin, told(f"{place}it", changed))

    def broke(self, plugin: str, error: str) -> None:
        """Note why a plugin, or a part of it, is left out; the first reason stays."""
        self.infos[plugin] = replace(self.infos[plugin], error=self.infos[plugin].error or error)

    def _callers(self, hook: str) -> Generator[tuple[str, Callable[..., list[Any]]]]:
        """Yield each plugin that implements a hook, with pluggy's own call of it."""
        for name, manager in self._managers.items():
            call = getattr(manager.hook, hook)
            if call.get_hookimpls():
                yield name, call

    def _parts(self, hook: str, *kinds: type[T], only: Container[str] | None = None) -> Owned[T]:
        """Collect the parts that plugins return for a hook; those of the wrong kind are left out."""
        parts: Owned[T] = []
        for plugin, call in self._callers(hook):
            if only is None or plugin in only:
                with self._apart(plugin, f"{hook}: "):
                    for answer in call():
                        if isinstance(answer, kinds):
                            name = type(answer).__name__
                            self.broke(plugin, f"{hook} gave a {name}; return a list of them: return [{name}()]")
                            continue
                        for part in list(islice(cast("Iterable[T]", answer), MOST)):
                            if flaw := flaw_of(part, kinds):
                                self.broke(plugin, hook + flaw)
                            else:
                                parts.append((part, plugin))
        return parts

    def _claims(self, what: str, parts: Owned[T], names: Callable[[T], Iterable[str]]) -> dict[str, Owned[T]]:
        """Group parts by the names they claim; Prisma's own keep theirs, and a clash is noted where it comes from."""
        claims: dict[str, Owned[T]] = {}
        for plugin, several in groupby(parts, lambda owned: owned[1]):
            with self._apart(plugin):
                for part, _ in several:
                    for name in names(part):
                        claims.setdefault(name, []).append((part, plugin))
        for name, owners in claims.items():
            claimants = [plugin for _, plugin in owners] + (["Prisma"] if name in RESERVED else [])
            ours = [owner for owner in owners if _is_ours(self.infos[owner[1]].distribution)]
            claims[name] = ours if len(ours) == 1 else owners
            for plugin in claimants if len(claimants) > 1 else ():
                if plugin in self.infos and (len(ours) != 1 or plugin != ours[0][1]):
                    others = " and ".join(other for other in claimants if other != plugin) or "itself"
                    self.broke(plugin, f"the {what} {name!r} is claimed by {others} too")
        return {name: owners for name, owners in claims.items() if name not in RESERVED}

    def plugins(self) -> list[PluginInfo]:
        """Every plugin, by name, broken ones with their error."""
        owned = [owner for owners in self._sources.values() for owner in owners]
        missing = {plugin: command for source, plugin in owned if (command := _missing(source))}
        return [replace(info, missing=missing.get(info.name)) for info in self.infos.values()]

    def sources(self) -> dict[str, Source]:
        """Every source by name, those left out that several plugins claim."""
        return {name: owners[0][0] for name, owners in self._sources.items() if len(owners) == 1}

    def source(self, name: str) -> Source:
        """Look up a source whose library is installed.

        Raises:
            UnknownName: no plugin has it.
            PluginError: its library is missing, or two plugins claim it.
            InputError: it is Prisma's own.
        """
        if name in RESERVED:
            raise InputError(f"A {name}: model was saved hooked: there is no upstream to adapt or compare with.")
        source = _only(self._sources.get(name, []), f"claim the source {name!r}")
        if source is None:
            sources = [*self.sources(), *RESERVED]
            broken = "; ".join(f"{info.name} ({info.error})" for info in self.infos.values() if info.error)
            failed = f" Plugins that failed: {broken}." if broken else ""
            raise UnknownName(f"No source {name!r}. Sources: {', '.join(sources)}.{suggest(name, sources)}{failed}")
        if command := _missing(source):
            raise PluginError(f"The source {name!r} needs {source.library}, which is not installed: {command}")
        return source

    def source_of(self, part: object) -> Source | None:
        """Return the source whose library, or whose own package, an object's class comes from."""
        package = qualified_name(part).split(".")[0]
        sources = self.sources().values()
        return next((each for each in sources if package in (each.library, qualified_name(each).split(".")[0])), None)

    def missing(self) -> dict[str, str]:
        """The sources whose library is not installed, with the command that installs it."""
        return {name: command for name, source in self.sources().items() if (command := _missing(source))}

    def models(self) -> list[ModelInfo]:
        """The models that the sources can load, those left out whose library is missing."""
        models: list[ModelInfo] = []
        for name, source in self.sources().items():
            if not _missing(source):
                plugin = self._sources[name][0][1]
                with self._apart(plugin, f"models of {name}: "):
                    infos: dict[str, ModelInfo] = {}
                    for info in islice(source.models(), MOST):
                        if flaw := _unlistable(returned(source.models, info, ModelInfo), name, infos):
                            self.broke(plugin, f"models of {name}: {flaw}")
                        else:
                            infos[info.reference] = info
                    if len(infos) == MOST:
                        self.broke(plugin, f"models of {name}: it lists {MOST} and more, which are left out")
                    models += infos.values()
        return models

    def loadable(self, name: str, rests: Collection[str]) -> Collection[str] | None:
        """Ask a source which of its models an adapter takes; None if that is not known, or where it fails."""
        with self._apart(self._sources[name][0][1], f"loadable of {name}: "):
            answer = self.source(name).loadable(rests)
            return None if answer is None else {rest for rest in rests if rest in answer}
        return None

    def adapter(self, upstream: object) -> Adapter:
        """Look up the adapter for an upstream model's type.

        Raises:
            UnsupportedArchitecture: no plugin takes this type.
            PluginError: two plugins claim it.
            InputError: the model is hooked already.
        """
        if isinstance(upstream, HookedModel):
            raise InputError("This model came hooked, from no library: there is no upstream to adapt or compare with.")
        kind = qualified_name(upstream)
        if (adapter := _only(self._adapters.get(kind, []), f"adapt {kind}")) is not None:
            return adapter
        if kind in self._refusals:
            refusal = self._refusals[kind]
            feature = f"{refusal.feature}{self._within(upstream)}"
            raise replace(refusal, feature=feature).error(cast(nn.Module, upstream))
        raise UnsupportedArchitecture(
            kind,
            f"no installed plugin adapts this type{self._alike(type(upstream))}{self._within(upstream)}; a hook map of "
            "your own can (docs/how-to-other-architectures.md), and `prisma models --classes` lists the types that "
            "come through",
        )

    def _within(self, upstream: object) -> str:
        """Name the outermost part of a model whose type is adapted: what a wrapper wraps, or a backbone."""
        modules: Any = getattr(upstream, "named_modules", list)
        if qualified_name(upstream).startswith(tuple(WAYS_OUT)):
            return ""
        for path, part in cast("Iterable[tuple[str, object]]", modules()):
            if path and (kind := qualified_name(part)) in self._adapters:
                return f". Its {path!r} is a {kind}, which is: pass model.{path}"
        return ""

    def _alike(self, kind: type) -> str:
        """Name an adapted type that a type derives from, or one of the same name."""
        bases = (f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__[1:])
        if base := next((base for base in bases if base in self._adapters), None):
            return f" (it derives from {base}, but a subclass may compute something else)"
        if name := next((name for name in self._adapters if name.endswith(f".{kind.__name__}")), None):
            plugin = self._adapters[name][0][1]
            module = "is another class: what types hold is the module that defines it"
            return f" ({name}, which the plugin {plugin!r} adapts, {module})"
        return ""

    def types(self) -> dict[str, str]:
        """The qualified names of all upstream types that some adapter takes, with the plugin's name."""
        return {kind: owners[-1][1] for kind, owners in sorted(self._adapters.items())}

    def homes(self, part: Source | Adapter) -> set[str]:
        """The names of the plugins that have a source or an adapter of this kind."""
        claims = (*self._sources.values(), *self._adapters.values())
        return {plugin for owners in claims for theirs, plugin in owners if type(theirs) is type(part)}

    def cases(self, only: Container[str] | None = None) -> list[tuple[Case, str]]:
        """Every conformance case next to its plugin's name; of some plugins alone, if given."""
        return self._parts("prisma_cases", Case, only=only)

    def commands(self, new: Callable[[], Typer]) -> list[tuple[Typer, str]]:
        """An app for each plugin that has commands, made by ``new``, next to the plugin's name."""
        apps: list[tuple[Typer, str]] = []
        for plugin, call in self._callers("prisma_commands"):
            with self._apart(plugin, "prisma_commands: "):
                call(app=(app := new()))
                apps.append((app, plugin))
        return apps


def _distribution(point: EntryPoint) -> str:
    return _named(point.dist) if point.dist else "unknown distribution"


def _named(dist: Distribution) -> str:
    """A distribution's name and version; its folder's where the first cannot be read."""
    try:
        name, version = dist.name, dist.version
    except Exception:  # noqa: BLE001  # of any kind: a folder may hold anything
        name = version = None
    return f"{name} {version}" if name and version else f"{getattr(dist, '_path', 'a distribution')} unreadable"


def _is_ours(distribution: str) -> bool:
    return re.fullmatch(rf"{DISTRIBUTION} \S+", distribution) is not None


def _only(owners: Owned[T], claim: str) -> T | None:
    """The one part that claims a name, or None; a ``PluginError`` where there are several."""
    if len(owners) > 1:
        raise PluginError(f"The plugins {owners[0][1]!r} and {owners[1][1]!r} both {claim}. Uninstall one of them.")
    return owners[0][0] if owners else None


def flaw_of(part: object, kinds: tuple[type, ...]) -> str | None:
    """The reason why a part cannot be used, to follow the hook's name; None if it can."""
    name = type(part).__name__
    if not isinstance(part, kinds):
        return f" gave {describe(part)}; expected instances of {kinds[0].__name__}"
    if isinstance(part, Adapter | Refusal):
        types = cast("object", getattr(part, "types", None))
        if isinstance(types, tuple | list) and all(isinstance(one, str) for one in cast("tuple[object, ...]", types)):
            return None
        text = types if isinstance(types, str) else None
        came, example = (repr(text), text) if text else ("no tuple of names", "package.module.Class")
        return f": {name}.types is {came}; expected a tuple: types = ({example!r},)"
    if isinstance(part, Source):
        label = cast("object", getattr(part, "name", None))
        if not isinstance(label, str) or not re.fullmatch(r"[\w.-]+", label):
            return f": {name}.name is {label!r}; expected the part of a reference before the colon: name = 'mine'"
        for field in ("library", "install", "unlisted"):
            if not isinstance(value := cast("object", getattr(part, field)), str | None):
                return f": {name}.{field} is {value!r}; expected text"
        re.compile(part.unlisted or "")
    return None


def _unlistable(info: ModelInfo, source: str, others: Container[str]) -> str | None:
    """The reason why a line of ``prisma models`` cannot be shown; None if it can."""
    texts = cast("tuple[object, ...]", (info.reference, info.family, info.note))
    if not all(isinstance(text, str) for text in texts):
        return f"{describe(next(text for text in texts if not isinstance(text, str)))} where a ModelInfo has a text"
    if not f"{info.reference}{info.family}".isprintable():
        return f"{info.reference!r} of {info.family!r} has letters that cannot be shown"
    if info.reference in others:
        return f"{info.reference!r} is listed twice"
    return None if info.reference.startswith(f"{source}:") else f"{info.reference!r} does not begin with '{source}:'"


def _missing(source: Source) -> str | None:
    if source.library is None:
        return None
    try:
        installed = importlib.util.find_spec(source.library) is not None
    except Exception:  # noqa: BLE001  # the package a dotted name lies in is missing, half imported, or raises
        installed = False
    return None if installed else source.install


_lock = threading.Lock()
_host: Host | None = None


def installed() -> Host:
    """The host of the installed plugins, made at first use."""
    global _host
    with _lock:
        _host = _host or Host()
        return _host
