"""Plugins that are broken, absent or at odds with each other leave the rest as it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import typer
from torch import nn

from prisma_core import HookedViT, PluginError, PrismaError, UnknownName, UnsupportedArchitecture, host
from prisma_core.cli.app import build
from prisma_core.contract.adapter import Adapter
from prisma_core.contract.source import Loaded, ModelInfo, Source
from prisma_core.host import Host

NO_SOURCES = "from prisma_core import hookimpl\n@hookimpl\ndef prisma_sources(): return []\n"
Found = Callable[..., EntryPoint]


class Upstream(nn.Module):
    """A stand-in for a library's model."""


class Heir(Upstream):
    """A subclass, which may compute something else."""


class FakeAdapter(Adapter):
    types = (f"{Upstream.__module__}.Upstream",)

    def spec(self, upstream: Any) -> Any: ...

    def weights(self, upstream: Any, spec: Any) -> Any: ...

    def hooks(self, upstream: Any, spec: Any) -> Any: ...


class TextForTypes(FakeAdapter):
    types = "library.Model"  # type: ignore[assignment]


class NoTypes(Adapter):
    spec = weights = hooks = FakeAdapter.spec


class Nameless(Source):
    def load(self, rest: str, **options: Any) -> Loaded: ...

    def models(self) -> Iterator[ModelInfo]: ...


def source_of(name: str, library: str | None = None) -> type[Source]:
    class FakeSource(Source):
        def load(self, rest: str, **options: Any) -> Loaded:
            return Loaded(Upstream())

        def models(self) -> Iterator[ModelInfo]:
            yield ModelInfo(f"{name}:one", "ones", pretrained=True)

    FakeSource.name, FakeSource.library = name, library
    FakeSource.install = f'pip install "prisma[{name}]"'
    return FakeSource


@pytest.fixture
def good(found: Found) -> EntryPoint:
    return found("good", prisma_sources=lambda: [source_of("good")()], prisma_adapters=lambda: [FakeAdapter()])


def states(host: Host) -> dict[str, str | None]:
    return {info.name: info.error for info in host.plugins()}


def assert_good_works(host: Host) -> None:
    assert host.source("good").name == "good"
    assert isinstance(host.adapter(Upstream()), FakeAdapter)
    assert "good:one" in [info.reference for info in host.models()]


def test_a_plugin_that_raises_on_import(good: EntryPoint, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, line in (("raises", "1 / 0"), ("leaves", "raise SystemExit(3)"), ("garbled", "def")):
        (tmp_path / f"plugin_that_{name}.py").write_text(line + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    broken = [EntryPoint(name, f"plugin_that_{name}", "prisma") for name in ("raises", "leaves", "garbled", "vanished")]
    broken += [EntryPoint(f"odd {value}", value, "prisma") for value in ("", "a module", "a.b:c d")]
    host = Host([*broken, good])
    told = states(host)
    assert told["raises"] == "ZeroDivisionError: division by zero"
    assert told["leaves"] == "SystemExit: 3"
    assert told["garbled"] is not None
    assert told["garbled"].startswith("SyntaxError")
    assert told["vanished"] == "ModuleNotFoundError: No module named 'plugin_that_vanished'"
    for value in ("", "a module", "a.b:c d"):
        assert str(told[f"odd {value}"]).startswith(f"its entry point is {value!r}; expected a module")
    assert told["good"] is None
    assert_good_works(host)
    with pytest.raises(UnknownName, match=r"raises .ZeroDivisionError"):
        host.source("raises")


def _raises() -> Any:
    raise ValueError("two\nlines")


def _stops_midway() -> Iterator[Source]:
    yield source_of("half")()
    raise ValueError("halfway")


@pytest.mark.parametrize(
    ("hooks", "error"),
    [
        ({"prisma_sources": _raises}, "prisma_sources: ValueError: two lines"),
        ({"prisma_adapters": _raises}, "prisma_adapters: ValueError: two lines"),
        ({"prisma_sources": _stops_midway}, "prisma_sources: ValueError: halfway"),
        ({"prisma_sources": lambda: [source_of("x")]}, "gave the class FakeSource; expected instances of Source"),
        ({"prisma_adapters": lambda: ["timm"]}, "gave a str; expected instances of Adapter"),
        (
            {"prisma_adapters": lambda: [TextForTypes()]},
            "TextForTypes.types is 'library.Model'; expected a tuple: types = ('library.Model',)",
        ),
        ({"prisma_adapters": lambda: [NoTypes()]}, "NoTypes.types is no tuple of names; expected a tuple"),
        ({"prisma_sources": lambda: [Nameless()]}, "Nameless.name is None; expected the part of a reference"),
        (
            {"prisma_sources": lambda: source_of("x")()},
            "gave a FakeSource; return a list of them: return [FakeSource()]",
        ),
        ({"prisma_adapters": lambda: FakeAdapter()}, "gave a FakeAdapter; return a list of them"),
        ({"prisma_sauces": lambda: []}, "unknown hook"),
        ({"prisma_sources": lambda wrong: []}, "wrong"),
    ],
)
def test_a_plugin_that_breaks_the_contract(
    good: EntryPoint, found: Found, hooks: dict[str, Callable[..., Any]], error: str
) -> None:
    host = Host([found("bad", **hooks), good])
    told = states(host)
    assert told["bad"] is not None
    assert error in told["bad"]
    assert "\n" not in told["bad"]
    assert told["good"] is None
    assert_good_works(host)


def test_a_function_that_was_not_marked_is_told(
    good: EntryPoint, found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [found("bad", prisma_adapters=lambda: []), found("techniques_alone"), good]
    monkeypatch.setattr(sys.modules[points[0].value], "prisma_sources", lambda: [], raising=False)
    told = states(Host(points))
    assert told["bad"] == "its prisma_sources is no hook: put @hookimpl over the function"
    assert (told["techniques_alone"], told["good"]) == (None, None)


def test_two_plugins_of_one_name(good: EntryPoint, found: Found) -> None:
    other = found("good", module="plugin_for_tests_other", prisma_sources=lambda: [source_of("other")()])
    host = Host([other, good])
    told = states(host)
    assert told["good"] is None
    assert told["good (plugin_for_tests_other)"] == (
        "the name 'good' is taken by plugin_for_tests_good of unknown distribution"
    )
    assert_good_works(host)
    with pytest.raises(UnknownName, match="No source 'other'"):
        host.source("other")


def test_two_plugins_that_claim_one_source(good: EntryPoint, found: Found) -> None:
    one = found("one", prisma_sources=lambda: [source_of("same")()])
    two = found("two", prisma_sources=lambda: [source_of("same")(), source_of("fine")()])
    host = Host([two, good, one])
    with pytest.raises(PluginError, match="'one' and 'two' both claim the source 'same'"):
        host.source("same")
    assert host.source("fine").name == "fine"
    assert set(host.sources()) == {"good", "fine"}
    assert "same:one" not in [info.reference for info in host.models()]
    with pytest.raises(UnknownName, match=r"Plugins that failed: .*one \(the source 'same' is claimed by two too\)"):
        host.source("none")
    told = states(host)
    assert told["one"] == "the source 'same' is claimed by two too"
    assert told["two"] == "the source 'same' is claimed by one too"
    assert_good_works(host)


def test_two_plugins_that_claim_one_adapter(good: EntryPoint, found: Found) -> None:
    host = Host([good, found("twin", prisma_adapters=lambda: [FakeAdapter()])])
    with pytest.raises(PluginError, match=r"'good' and 'twin' both adapt .*Upstream\. Uninstall one"):
        host.adapter(Upstream())
    told = states(host)
    assert "is claimed by twin too" in str(told["good"])
    assert "is claimed by good too" in str(told["twin"])


def test_a_plugin_that_claims_the_name_file(good: EntryPoint, found: Found) -> None:
    host = Host([good, found("grabber", prisma_sources=lambda: [source_of("file")()])])
    assert "file" not in host.sources()
    assert states(host)["grabber"] == "the source 'file' is claimed by Prisma too"


@pytest.mark.parametrize("library", ["no_such_library_for_tests", "no_such_library_for_tests.part"])
def test_a_library_that_is_missing(good: EntryPoint, found: Found, library: str) -> None:
    host = Host([good, found("hungry", prisma_sources=lambda: [source_of("hungry", library)()])])
    with pytest.raises(PluginError) as caught:
        host.source("hungry")
    assert str(caught.value) == (
        f"The source 'hungry' needs {library}, which is not installed: pip install \"prisma[hungry]\""
    )
    assert host.missing() == {"hungry": 'pip install "prisma[hungry]"'}
    assert [info.missing for info in host.plugins()] == [None, 'pip install "prisma[hungry]"']
    assert_good_works(host)


def test_an_unknown_source_suggests_the_nearest(good: EntryPoint) -> None:
    with pytest.raises(UnknownName, match=r"No source 'goood'\. Sources: good, file\. Did you mean good\?"):
        Host([good]).source("goood")


def test_a_type_nobody_adapts(good: EntryPoint) -> None:
    host = Host([good])
    told = r"Linear is not supported: no installed plugin adapts this type; a hook map of your own.*--classes"
    with pytest.raises(UnsupportedArchitecture, match=told):
        host.adapter(nn.Linear(1, 1))
    with pytest.raises(UnsupportedArchitecture, match=r"it derives from .*Upstream, but a subclass may compute"):
        host.adapter(Heir())
    twin = type("Upstream", (nn.Module,), {"__module__": "elsewhere.models"})
    with pytest.raises(UnsupportedArchitecture, match=r"\.Upstream, which the plugin 'good' adapts, is another class"):
        host.adapter(twin())


def test_a_source_may_hand_over_a_hooked_model(
    found: Found, vit: HookedViT, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import prisma_core as prisma
    from prisma_core import host as plugins

    names = tuple(f"class {index}" for index in range(vit.spec.n_classes or 0))

    class Ready(source_of("ready")):  # type: ignore[misc]
        def load(self, rest: str, **options: Any) -> Loaded:
            return Loaded(vit, labels=names)

    host = Host([found("ready", prisma_sources=lambda: [Ready()])])
    monkeypatch.setattr(plugins, "_host", host)
    model = prisma.load("ready:any")
    assert model is vit
    assert vit.labels == names
    assert vit.reference == "ready:any"
    assert torch.isfinite(model(image)).all()


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"model": None}, r"Ready\.load returned None; expected Module"),
        ({"model": nn.Linear}, r"Ready\.load returned the class Linear; expected Module"),
        ({"labels": 5}, "Expected labels, a text for each class, got 5"),
        ({"labels": "abc"}, "Expected labels, a text for each class, got 'abc'"),
    ],
)
def test_what_a_source_hands_over_is_looked_at(
    found: Found, vit: HookedViT, use: Callable[..., Host], facts: dict[str, Any], words: str
) -> None:
    import prisma_core as prisma

    class Ready(source_of("ready")):  # type: ignore[misc]
        def load(self, rest: str, **options: Any) -> Loaded:
            return Loaded(**{"model": vit, **facts})

    use(found("ready", prisma_sources=lambda: [Ready()]))
    with pytest.raises(PrismaError, match=words):
        prisma.load("ready:any")


def test_the_plugins_that_come_along_are_all_well() -> None:
    host = Host()
    told = states(host)
    assert {"timm", "toy", "conformance", "view"} <= set(told)
    assert not {name: error for name, error in told.items() if error}
    assert {"timm", "toy"} <= set(host.sources())


# -------------------------------------------------------------------- what one plugin does stays with it


def test_a_plugin_that_takes_long_is_named(
    found: Found, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "PATIENCE", 0.01)
    waited: list[str] = []

    def slow() -> list[Source]:
        deadline = time.monotonic() + 20
        while "slow" not in (said := capsys.readouterr().err) and time.monotonic() < deadline:
            time.sleep(0.01)
        waited.append(said)
        return [source_of("late")()]

    sources = Host([found("slow", prisma_sources=slow)]).sources()
    assert "plugin_for_tests_slow" in waited[0]
    assert list(sources) == ["late"]


def test_a_plugin_that_is_quick_is_not_named(found: Found, capsys: pytest.CaptureFixture[str]) -> None:
    Host([found("quick", prisma_sources=lambda: [source_of("soon")()])])
    assert capsys.readouterr().err == ""


def test_entry_points_that_are_no_text_harm_their_distribution_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in (("broken", b"[prisma]\nbad = \xff\xfe\n"), ("fine", b"[prisma]\nfine = fine_plugin\n")):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_bytes(content)
    (tmp_path / "fine_plugin.py").write_text(NO_SOURCES)
    monkeypatch.syspath_prepend(str(tmp_path))
    infos = Host().infos
    assert "UnicodeDecodeError" in str(infos["broken"].error)
    assert infos["fine"].error is None
    assert infos["timm"].error is None


def _by_docstring(app: Any) -> None:
    @app.command()
    def mine() -> None:
        """Show [/nope] at once."""


def _by_option(app: Any) -> None:
    @app.command()
    def mine(size: Annotated[int, typer.Option(help="The [/nope]")] = 1) -> None:
        """Show."""


def _by_group(app: Any) -> None:
    group = typer.Typer()
    _by_option(group)
    app.add_typer(group, name="mine")


@pytest.mark.parametrize("commands", [_by_docstring, _by_option, _by_group])
def test_a_command_whose_help_is_broken_is_left_out(
    found: Found, commands: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def good(app: Any) -> None:
        @app.command()
        def other() -> None:
            """Show [bold]this[/bold] and [link]."""

    plugins = Host([found("bad", prisma_commands=commands), found("good", prisma_commands=good)])
    command = typer.main.get_command(build(plugins))
    command.main(args=["--help"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "other" in shown
    assert "mine" not in shown
    assert "nope" in str(plugins.infos["bad"].error)
    assert plugins.infos["good"].error is None
