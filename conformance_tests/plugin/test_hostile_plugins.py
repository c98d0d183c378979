"""What a plugin raises, prints, changes, lists or names wrongly harms itself alone, and is told by its name."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import nn

from prisma_core import hookimpl
from prisma_core.cli.app import main
from prisma_core.contract.adapter import Refusal
from prisma_core.contract.source import Loaded, ModelInfo, Source
from prisma_core.host import Host
from prisma_core.toolbox.screen import printable
from prisma_core.zoo import load_upstream

NO_SOURCES = "from prisma_core import hookimpl\n@hookimpl\ndef prisma_sources(): return []\n"
Found = Callable[..., EntryPoint]


class Bad(Source):
    name = "bad"
    listed: ClassVar[list[Any]] = []
    answer: ClassVar[Callable[[], Any]] = lambda: None

    def load(self, rest: str, **options: Any) -> Loaded:
        return Loaded(nn.Linear(1, 1))

    def models(self) -> Iterator[ModelInfo]:
        yield from self.listed or [ModelInfo("bad:one", "ones", pretrained=True)]

    def loadable(self, rests: Collection[str]) -> Collection[str] | None:
        return type(self).answer()


class Fine(Bad):
    name = "fine"
    listed: ClassVar[list[Any]] = [ModelInfo("fine:one", "ones", pretrained=True)]


def having(**facts: Any) -> list[Source]:
    return [type("Bad", (Bad,), facts)()]


@pytest.fixture
def fine(found: Found) -> EntryPoint:
    return found("fine", prisma_sources=lambda: [Fine()])


def alone(plugins: Host) -> str:
    """Assert that the fine plugin works, and return what is said of the bad one."""
    assert plugins.source("fine").name == "fine"
    assert "fine:one" in [info.reference for info in plugins.models()]
    assert plugins.infos["fine"].error is None
    return plugins.infos["bad"].error or ""


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def throws(problem: BaseException) -> Callable[[], Any]:
    def throw() -> Any:
        raise problem

    return throw


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit(), "GeneratorExit"),
        (StopIteration(), "StopIteration"),
        (Unspeakable(), r"Unspeakable: \(its text cannot be made: RuntimeError\)"),
        (ValueError("x" * 1_000_000), r"ValueError: x+ \(and more\)"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_whatever_a_plugin_raises(found: Found, fine: EntryPoint, problem: BaseException, words: str) -> None:
    told = alone(Host([found("bad", prisma_sources=throws(problem)), fine]))
    assert re.fullmatch(f"prisma_sources: {words}", told)
    assert len(told) < 3_000


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_a_plugin_runs_names_it(found: Found) -> None:
    import _thread

    def hang() -> list[Source]:
        _thread.interrupt_main()
        for _ in range(10_000_000):
            pass
        return []

    with pytest.raises(KeyboardInterrupt, match=r"while the plugin bad \(plugin_for_tests_bad\) ran"):
        Host([found("bad", prisma_sources=hang)])


class Odd:
    """An object as a plugin, which takes itself for every other."""

    @hookimpl
    def prisma_sources(self) -> list[Source]:
        return [Bad()]

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1


def test_a_plugin_that_equals_all_others(found: Found, fine: EntryPoint, monkeypatch: pytest.MonkeyPatch) -> None:
    point = found("bad")
    monkeypatch.setattr(sys.modules["plugin_for_tests_bad"], "odd", Odd(), raising=False)
    assert alone(Host([EntryPoint("bad", f"{point.module}:odd", "prisma"), fine])) == ""


class Once(str):
    """A name that cannot be a key."""

    __slots__ = ()

    def __hash__(self) -> int:
        raise RuntimeError("no key")


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"name": ""}, "Bad.name is ''; expected the part of a reference"),
        ({"name": "ti mm"}, "Bad.name is 'ti mm'"),
        ({"name": " file"}, "Bad.name is ' file'"),
        ({"name": "timm:vit"}, "Bad.name is 'timm:vit'"),
        ({"name": "bad\x1b[31m\u202e\n"}, "Bad.name is "),
        ({"name": Once("bad")}, "no key"),
        ({"library": 3}, "Bad.library is 3; expected text"),
        ({"unlisted": "["}, "prisma_sources: "),
        ({"unlisted": 3}, "Bad.unlisted is 3; expected text"),
        ({"listed": [ModelInfo(None, "ones", True)]}, "models of bad: None where a ModelInfo has a text"),  # type: ignore[arg-type]
        ({"listed": [ModelInfo("bad:a", "ones", True, 3)]}, "models of bad: a int where"),  # type: ignore[arg-type]
        ({"listed": [ModelInfo("fine:one", "ones", True)]}, "'fine:one' does not begin with 'bad:'"),
        ({"listed": [ModelInfo("bad:\x1b[2J", "ones", True)]}, "has letters that cannot be shown"),
        ({"listed": [ModelInfo("bad:a", "ones", True)] * 2}, "'bad:a' is listed twice"),
    ],
)
def test_names_that_a_plugin_may_not_give(found: Found, fine: EntryPoint, facts: dict[str, Any], words: str) -> None:
    plugins = Host([found("bad", prisma_sources=lambda: having(**facts)), fine])
    plugins.missing()
    assert words in alone(plugins)
    assert [info.reference for info in plugins.models()].count("fine:one") == 1


@pytest.mark.parametrize("answer", [throws(ValueError("lost")), lambda: 3, lambda: (1 / 0 for _ in "a")])
def test_what_an_adapter_takes_is_asked_of_each_source_alone(
    found: Found, fine: EntryPoint, use: Callable[..., Host], answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plugins = use(found("bad", prisma_sources=lambda: having(answer=answer)), fine)
    assert main(["models"]) == 0
    shown = capsys.readouterr()
    assert "fine:one" in shown.out
    assert "plugin left out: bad" in shown.err
    assert "loadable of bad" in alone(plugins)


def test_a_library_whose_search_raises(found: Found, fine: EntryPoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", throws(ValueError("search")))
    plugins = Host([found("bad", prisma_sources=lambda: having(library="acme", install="x")), fine])
    assert plugins.missing() == {"bad": "x"}
    alone(plugins)


def test_what_a_plugin_prints_is_no_answer(found: Found, capsys: pytest.CaptureFixture[str]) -> None:
    out = sys.stdout

    def closing() -> list[Source]:
        print("noise")  # noqa: T201
        sys.stdout = None  # type: ignore[assignment]
        return []

    Host([found("bad", prisma_sources=closing)])
    assert sys.stdout is out
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "noise\n"

    class Loud(Bad):
        def load(self, rest: str, **options: Any) -> Loaded:
            print("noise")  # noqa: T201
            return super().load(rest, **options)

    load_upstream(Loud(), "one")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "noise\n")


# -------------------------------------------------------------------- Prisma's own come first


def test_what_is_known_of_a_library_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the order of hooks nor a name that resembles Prisma's brings a plugin before Prisma's own."""
    (tmp_path / "taker.py").write_text(
        "from prisma_core import hookimpl\nfrom prisma_core.plugin import Loaded, Refusal, Source\n"
        "class Taker(Source):\n    name, library = 'taker', 'timm'\n    def load(self, rest): ...\n"
        "    def models(self): return iter(())\n"
        "    def describe(self, upstream): return Loaded(upstream, labels=('taken',))\n"
        "@hookimpl(trylast=True)\ndef prisma_sources(): return [Taker()]\n"
    )
    info = tmp_path / "prisma_interp_x-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: prisma-interp aaa\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[prisma]\na = taker\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = Host()
    assert plugins.infos["a"].error is None
    assert "taker" in plugins.sources()
    upstream = type("Upstream", (nn.Module,), {"__module__": "timm.models"})()
    assert plugins.source_of(upstream) is plugins.source("timm")


def test_the_first_refusal_of_a_type_stays(found: Found) -> None:
    refusals = [found(name, prisma_adapters=lambda name=name: [Refusal(("acme.Net",), name)]) for name in ("a", "b")]
    assert Host(refusals)._refusals["acme.Net"].feature == "a"


@pytest.mark.parametrize(
    "metadata", [b"Name: ev\xff\xfeil\nVersion: 1\n", b"Version: 1\n", b"Name: evil\n", b"\n", None]
)
@pytest.mark.parametrize("points", [b"[prisma]\nbroken = taker_lost\n", b"[prisma]\nbroken = \xff\n"])
def test_damaged_metadata_harm_their_distribution_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metadata: bytes | None, points: bytes
) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    if metadata is not None:
        (info / "METADATA").write_bytes(metadata)
    (info / "entry_points.txt").write_bytes(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = Host()
    broken = {name: one.error for name, one in plugins.infos.items() if one.error}
    assert len(broken) == 1
    assert {"timm", "toy"} <= set(plugins.sources())


def test_a_plugin_of_one_module_carries_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[..., Host]
) -> None:
    from prisma_conformance.report.supported import read_supported

    (tmp_path / "plugin_of_one_module.py").write_text(NO_SOURCES)
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = use(EntryPoint("one", "plugin_of_one_module", "prisma"))
    assert read_supported(plugins) == {}
    assert plugins.infos["one"].error is None


def test_letters_that_turn_the_order_round_are_escaped() -> None:
    assert printable("a\u202eb\u2066\x9b") == r"a\u202eb\u2066\x9b"
