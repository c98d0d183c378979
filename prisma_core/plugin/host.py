"""The host: finds plugins through entry points, keeps what is broken apart, and asks them for their parts."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pluggy

from prisma_core.errors import (
    InputError,
    LoadError,
    PluginError,
    PrismaError,
    UnknownName,
    UnsupportedArchitecture,
    suggest,
    told,
)
from prisma_core.hooks.model import HookedModel
from prisma_core.maps.reader import qualified_name
from prisma_core.plugin import hookspecs
from prisma_core.plugin.adapter import Adapter, Refusal
from prisma_core.plugin.source import ModelInfo, Source

if TYPE_CHECKING:
    from typer import Typer

    from prisma_core.plugin.case import Case

Part = TypeVar("Part")
RESERVED = ("file",)  # what prisma.save writes; no plugin may claim it


@dataclass(frozen=True)
class PluginInfo:
    """One plugin as found.

    Attributes:
        name: its entry point's name.
        module: the module the entry point names.
        distribution: the distribution it comes from, with version.
        error: why it could not be used, or None.
        missing: the command that installs the libraries its sources lack, or None.
    """

    name: str
    module: str
    distribution: str
    error: str | None = None
    missing: str | None = None


class Host:
    """Holds the plugins of one set of entry points.

    What is broken is kept apart: ``plugins()`` says why, and everything else works.
    """

    def __init__(self, found: Iterable[EntryPoint] | None = None):
        self.manager = pluggy.PluginManager(hookspecs.GROUP)
        self.manager.add_hookspecs(hookspecs)
        self.infos: dict[str, PluginInfo] = {}
        points = entry_points(group=hookspecs.GROUP) if found is None else found
        for point in sorted(points, key=lambda point: (point.name, point.value)):
            self._add(point)

    def _add(self, point: EntryPoint) -> None:
        distribution = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown distribution"
        if point.name in self.infos:
            holder = self.infos[point.name]
            name = f"{point.name} ({point.value})"
            error = f"the name {point.name!r} is taken by {holder.module} of {holder.distribution}"
            self.infos[name] = PluginInfo(name, point.value, distribution, error)
            return
        self.infos[point.name] = PluginInfo(point.name, point.value, distribution, self._register(point))

    def _register(self, point: EntryPoint) -> str | None:
        try:
            self.manager.register(point.load(), point.name)
            self.manager.check_pending()
        except (Exception, SystemExit) as problem:  # noqa: BLE001  # a stranger's module may raise anything
            if self.manager.get_plugin(point.name) is not None:
                self.manager.unregister(name=point.name)
            return told(problem)
        return None

    def plugins(self) -> list[PluginInfo]:
        """Return every plugin found, by name, broken ones with their error."""
        missing = {plugin: command for source, plugin in self._all_sources() if (command := _missing(source))}
        claims = [
            *_claims("source", self._all_sources(), lambda source: (source.name,)),
            *_claims("adapter of", self._all_adapters(), lambda adapter: adapter.types),
        ]
        for what, name, plugins in claims:
            if len(plugins) > 1:
                for plugin in (plugin for plugin in plugins if plugin in self.infos):
                    others = " and ".join(other for other in plugins if other != plugin) or "itself"
                    self.broke(plugin, f"the {what} {name!r} is claimed by {others} too")
        return [
            PluginInfo(info.name, info.module, info.distribution, info.error, missing.get(info.name))
            for info in self.infos.values()
        ]

    def broke(self, plugin: str, error: str) -> None:
        """Note why a plugin, or a part of it, is left out; the first reason stays."""
        info = self.infos[plugin]
        self.infos[plugin] = PluginInfo(info.name, info.module, info.distribution, info.error or error)

    def _ask(self, hook: str, kind: type[Part], only: Container[str] | None = None) -> list[tuple[Part, str]]:
        """Return each part plugins answer a hook with, next to the plugin's name."""
        parts: list[tuple[Part, str]] = []
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            name = implementation.plugin_name
            if only is not None and name not in only:
                continue
            try:
                made: object = implementation.function()
                if isinstance(made, Source | Adapter):
                    one = type(made).__name__
                    self.broke(name, f"{hook} gave a {one}; return a list of them: return [{one}()]")
                    continue
                found = list(cast("Iterable[object]", made or ()))
            except (Exception, SystemExit) as problem:  # noqa: BLE001  # one broken plugin must not take the others down
                self.broke(name, f"{hook}: {told(problem)}")
                continue
            for part in found:
                if isinstance(part, kind):
                    if (wrong := _misnamed(part)) is None:
                        parts.append((part, name))
                    else:
                        self.broke(name, f"{hook}: {wrong}")
                else:
                    got = f"the class {part.__name__}" if isinstance(part, type) else f"a {type(part).__name__}"
                    self.broke(name, f"{hook} gave {got}; expected instances of {kind.__name__}")
        return parts

    def _all_sources(self) -> list[tuple[Source, str]]:
        return self._ask("prisma_sources", Source)

    def _all_adapters(self) -> list[tuple[Adapter, str]]:
        return self._ask("prisma_adapters", Adapter)

    def sources(self) -> dict[str, Source]:
        """Return every source by name, those left out that several plugins claim."""
        claims = _claims("source", self._all_sources(), lambda source: (source.name,))
        alone = {name for _, name, plugins in claims if len(plugins) == 1 and name not in RESERVED}
        return {source.name: source for source, _ in self._all_sources() if source.name in alone}

    def source(self, name: str) -> Source:
        """Return a source, its library installed.

        Raises:
            UnknownName: no plugin has it.
            PluginError: its library is missing, or two plugins claim it.
            InputError: it is Prisma's own.
        """
        if name in RESERVED:
            raise InputError(f"A {name}: model was saved hooked: there is no upstream to adapt or compare with.")
        found = [(source, plugin) for source, plugin in self._all_sources() if source.name == name]
        if len(found) > 1:
            raise PluginError(
                f"The plugins {found[0][1]!r} and {found[1][1]!r} both claim the source {name!r}. "
                "Uninstall one of them."
            )
        if not found:
            sources = [*self.sources(), *RESERVED]
            broken = [f"{info.name} ({info.error})" for info in self.plugins() if info.error]
            raise UnknownName(
                f"No source {name!r}. Sources: {', '.join(sources)}.{suggest(name, sources)}"
                + (f" Plugins that failed: {'; '.join(broken)}." if broken else "")
            )
        source = found[0][0]
        if command := _missing(source):
            raise PluginError(f"The source {name!r} needs {source.library}, which is not installed: {command}")
        return source

    def keep(self, companion: object, folder: Path) -> str:
        """Have a source write what makes a companion of a model again; return the source's name.

        Raises:
            LoadError: no source knows it, or one does and cannot keep it.
        """
        for name, source in self.sources().items():
            if not _missing(source) and source.keep(companion, folder):
                return name
        called = getattr(companion, "__qualname__", type(companion).__qualname__)
        module = getattr(companion, "__module__", type(companion).__module__)
        raise LoadError(f"no source of an installed plugin keeps {module}.{called}")

    def kept(self, source: str, folder: Path) -> Any:
        """Return what a source wrote into a folder with ``keep``.

        Raises:
            UnknownName: no plugin has the source.
            PluginError: its library is missing.
            LoadError: the files cannot be read.
        """
        try:
            return self.source(source).kept(folder)
        except PrismaError:
            raise
        except Exception as problem:  # so that a file that is broken is one error, whoever reads it
            raise LoadError(f"The source {source!r} cannot read {folder}: {told(problem)}") from problem

    def missing(self) -> dict[str, str]:
        """Return the sources whose library is not installed, with the command that installs it."""
        return {name: command for name, source in self.sources().items() if (command := _missing(source))}

    def models(self) -> list[ModelInfo]:
        """Return what the sources can load, those left out whose library is missing."""
        models: list[ModelInfo] = []
        alone = self.sources()
        for source, plugin in self._all_sources():
            if source.name not in alone or _missing(source):
                continue
            try:
                models += source.models()
            except (Exception, SystemExit) as problem:  # noqa: BLE001  # one broken plugin must not hide the others' models
                self.broke(plugin, f"models of {source.name}: {told(problem)}")
        return models

    def adapter(self, upstream: object) -> Adapter:
        """Return the adapter for an upstream model's type.

        Raises:
            UnsupportedArchitecture: no plugin takes this type.
            PluginError: two plugins claim it.
            InputError: the model is hooked already.
        """
        if isinstance(upstream, HookedModel):
            raise InputError("This model came hooked, from no library: there is no upstream to adapt or compare with.")
        kind = qualified_name(upstream)
        adapters = self._all_adapters()
        found = [(adapter, plugin) for adapter, plugin in adapters if kind in adapter.types]
        if len(found) > 1:
            raise PluginError(
                f"The plugins {found[0][1]!r} and {found[1][1]!r} both adapt {kind}. Uninstall one of them."
            )
        if not found:
            bases = [f"{base.__module__}.{base.__qualname__}" for base in type(upstream).__mro__[1:]]
            known = [base for base in bases if any(base in adapter.types for adapter, _ in adapters)]
            hint = f" (it derives from {known[0]}, but a subclass may compute something else)" if known else ""
            short = f".{type(upstream).__name__}"
            alike = [(name, plugin) for adapter, plugin in adapters for name in adapter.types if name.endswith(short)]
            if alike and not known:
                hint = (
                    f" ({alike[0][0]}, which the plugin {alike[0][1]!r} adapts, is another class: what types "
                    "hold is the module that defines it)"
                )
            raise UnsupportedArchitecture(
                kind,
                f"no installed plugin adapts this type{hint}; a hook map of your own can "
                "(docs/how-to-other-architectures.md), and `prisma models --classes` lists the types that come through",
            )
        return found[0][0]

    def types(self) -> dict[str, str]:
        """Return the qualified names of all upstream types that some adapter takes, with the plugin's name."""
        taking = [found for found in self._all_adapters() if not isinstance(found[0], Refusal)]
        return dict(sorted((kind, plugin) for adapter, plugin in taking for kind in adapter.types))

    def homes(self, part: Source | Adapter) -> set[str]:
        """Return the names of the plugins that have a source or an adapter of this kind."""
        parts = [*self._all_sources(), *self._all_adapters()]
        return {plugin for theirs, plugin in parts if type(theirs) is type(part)}

    def cases(self, only: Container[str] | None = None) -> list[tuple[Case, str]]:
        """Return every conformance case next to its plugin's name; of some plugins alone, if given."""
        return cast("list[tuple[Case, str]]", self._ask("prisma_cases", object, only))

    def commands(self, new: Callable[[], Typer]) -> list[tuple[Typer, str]]:
        """Return an app for each plugin that has commands, made by ``new``, next to the plugin's name."""
        apps: list[tuple[Typer, str]] = []
        for implementation in self.manager.hook.prisma_commands.get_hookimpls():
            app = new()
            try:
                implementation.function(app)
            except (Exception, SystemExit) as problem:  # noqa: BLE001  # the other commands must stay
                self.broke(implementation.plugin_name, f"prisma_commands: {told(problem)}")
            else:
                apps.append((app, implementation.plugin_name))
        return apps


def _claims(
    what: str, parts: Iterable[tuple[Part, str]], names: Callable[[Part], Iterable[str]]
) -> list[tuple[str, str, list[str]]]:
    claimed: dict[str, list[str]] = {}
    for part, plugin in parts:
        for name in names(part):
            claimed.setdefault(name, []).append(plugin)
    taken = [(what, name, [*claimed[name], "Prisma"]) for name in RESERVED if name in claimed]
    return [*taken, *((what, name, plugins) for name, plugins in claimed.items() if name not in RESERVED)]


def _misnamed(part: object) -> str | None:
    """Return why nothing can find a source or an adapter, or None."""
    kind = type(part)
    if isinstance(part, Adapter):
        types = cast("object", getattr(part, "types", None))
        if isinstance(types, tuple | list) and all(isinstance(one, str) for one in cast("tuple[object, ...]", types)):
            return None
        text = types if isinstance(types, str) else None
        came, example = (repr(text), text) if text else ("no tuple of names", "package.module.Class")
        return f"{kind.__name__}.types is {came}; expected a tuple: types = ({example!r},)"
    if isinstance(part, Source) and not isinstance(name := cast("object", getattr(part, "name", None)), str):
        return f"{kind.__name__}.name is {name!r}; expected the part of a reference before the colon: name = 'mine'"
    return None


def _missing(source: Source) -> str | None:
    if source.library is None:
        return None
    try:
        installed = importlib.util.find_spec(source.library) is not None
    except (ImportError, ValueError):  # the package a dotted name lies in is missing, or was half imported
        installed = False
    return None if installed else source.install


_lock = threading.Lock()
_host: Host | None = None


def host() -> Host:
    """Return the host of the installed plugins, made at first use."""
    global _host
    with _lock:
        if _host is None:
            _host = Host()
        return _host
