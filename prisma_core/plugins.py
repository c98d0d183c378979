"""The host: finds plugins through entry points, keeps what is broken apart, and asks them for their parts."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from prisma_core import hookspecs
from prisma_core.adapter import Adapter, qualified_name
from prisma_core.errors import PluginError, UnknownName, UnsupportedArchitecture, suggest
from prisma_core.sources import Source

if TYPE_CHECKING:
    from prisma_core.conformance.case import Case


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
    """Holds the plugins of one set of entry points."""

    def __init__(self, found: Iterable[EntryPoint] | None = None):
        self.manager = pluggy.PluginManager(hookspecs.GROUP)
        self.manager.add_hookspecs(hookspecs)
        self.infos: dict[str, PluginInfo] = {}
        for point in sorted(entry_points(group=hookspecs.GROUP) if found is None else found, key=lambda p: p.name):
            self._add(point)

    def _add(self, point: EntryPoint) -> None:
        distribution = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown distribution"
        error: str | None = None
        name = point.name
        if name in self.infos:
            error = f"the name {name!r} is taken by {self.infos[name].module} of {self.infos[name].distribution}"
            name = f"{name} ({point.value})"
        else:
            try:
                plugin = point.load()
                self.manager.register(plugin, name)
                self.manager.check_pending()
            except Exception as problem:  # noqa: BLE001  # a stranger's module may raise anything; the rest must work
                error = f"{type(problem).__name__}: {problem}"
                if self.manager.get_plugin(name) is not None:
                    self.manager.unregister(name=name)
        self.infos[name] = PluginInfo(name, point.value, distribution, error)

    def plugins(self) -> list[PluginInfo]:
        """Return every plugin found, broken ones with their error."""
        missing = {plugin: command for source, plugin in self._sources() if (command := _missing(source))}
        return [
            PluginInfo(info.name, info.module, info.distribution, info.error, missing.get(info.name))
            for info in self.infos.values()
        ]

    def _ask(self, hook: str, **kwargs: Any) -> list[tuple[Any, str]]:
        """Return each part plugins answer a hook with, next to the plugin's name."""
        parts: list[tuple[Any, str]] = []
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            name = implementation.plugin_name
            try:
                parts += [(part, name) for part in implementation.function(**kwargs) or ()]
            except Exception as problem:  # noqa: BLE001  # one broken plugin must not take the others down
                self.infos[name] = PluginInfo(
                    name, self.infos[name].module, self.infos[name].distribution, f"{hook}: {problem}"
                )
        return parts

    def _sources(self) -> list[tuple[Source, str]]:
        return self._ask("prisma_sources")

    def sources(self) -> dict[str, Source]:
        """Return every source by name.

        Raises:
            PluginError: two plugins claim one name.
        """
        claimed: dict[str, tuple[Source, str]] = {}
        for source, plugin in self._sources():
            if source.name in claimed:
                raise PluginError(
                    f"The plugins {claimed[source.name][1]!r} and {plugin!r} both claim the source {source.name!r}. "
                    "Uninstall one of them."
                )
            claimed[source.name] = (source, plugin)
        return {name: source for name, (source, _) in claimed.items()}

    def source(self, name: str) -> Source:
        """Return a source, its library installed.

        Raises:
            UnknownName: no plugin has it.
            PluginError: its library is missing, or two plugins claim it.
        """
        sources = self.sources()
        if name not in sources:
            broken = [f"{info.name} ({info.error})" for info in self.infos.values() if info.error]
            raise UnknownName(
                f"No source {name!r}. Sources: {', '.join([*sources, 'file'])}.{suggest(name, sources)}"
                + (f" Plugins that failed: {'; '.join(broken)}." if broken else "")
            )
        if command := _missing(sources[name]):
            raise PluginError(f"The source {name!r} needs {sources[name].library}, which is not installed: {command}")
        return sources[name]

    def adapter(self, upstream: object) -> Adapter:
        """Return the adapter for an upstream model's type.

        Raises:
            UnsupportedArchitecture: no plugin takes this type.
            PluginError: two plugins claim it.
        """
        kind = qualified_name(upstream)
        found = [(adapter, plugin) for adapter, plugin in self._ask("prisma_adapters") if kind in adapter.types]
        if len(found) > 1:
            raise PluginError(
                f"The plugins {found[0][1]!r} and {found[1][1]!r} both adapt {kind}. Uninstall one of them."
            )
        if not found:
            bases = [f"{base.__module__}.{base.__qualname__}" for base in type(upstream).__mro__[1:]]
            known = [base for base in bases if any(base in a.types for a, _ in self._ask("prisma_adapters"))]
            hint = f" It derives from {known[0]}, which has one; a subclass may compute something else." if known else ""
            raise UnsupportedArchitecture(kind, f"no installed plugin adapts this type.{hint} It")
        return found[0][0]

    def cases(self) -> list[tuple[Case, str]]:
        """Return every conformance case next to its plugin's name."""
        return self._ask("prisma_cases")


def _missing(source: Source) -> str | None:
    if source.library is None or importlib.util.find_spec(source.library) is not None:
        return None
    return source.install


_lock = threading.Lock()
_host: Host | None = None


def host() -> Host:
    """Return the host of the installed plugins, made at first use."""
    global _host
    with _lock:
        if _host is None:
            _host = Host()
        return _host
