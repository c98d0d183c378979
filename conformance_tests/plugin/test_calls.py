"""Plugins' code is called in few places, once where once is enough, and what it raises names it there."""

from __future__ import annotations

import itertools
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from typing import Any

import pluggy
import pytest
from networks import Counting, Network, NetworkAdapter, fails

import prisma_core as prisma
from prisma_core import UnknownName
from prisma_core.contract.adapter import Adapter
from prisma_core.contract.source import ModelInfo, Reference, Source
from prisma_core.host import DISTRIBUTION, Host
from prisma_core.maps.reader import Reader
from prisma_core.zoo import adapt_with, reference_of

Found = Callable[..., EntryPoint]


# ------------------------------------------------------------------ once


def test_every_plugin_is_asked_once(found: Found, use: Callable[..., Host]) -> None:
    asked: Counter[str] = Counter()

    def sources() -> list[Source]:
        asked["sources"] += 1
        return [Counting()]

    def adapters() -> list[Adapter]:
        asked["adapters"] += 1
        return [NetworkAdapter()]

    host = use(found("counting", prisma_sources=sources, prisma_adapters=adapters))
    for name in ("countng:one", "countin:one", "other:one"):
        with pytest.raises(UnknownName, match="No source"):
            prisma.load(name)
    prisma.load("counting:one")
    prisma.adapt(Network())
    assert host.plugins()[0].error is None
    assert (host.types(), host.homes(Counting())) == ({"networks.Network": "counting"}, {"counting"})
    assert asked == {"sources": 1, "adapters": 1}


def test_one_reader_is_asked_for_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    readers: list[Reader] = []

    class Noting(NetworkAdapter):
        def spec(self, upstream: Reader) -> Any:
            readers.append(upstream)
            return super().spec(upstream)

        def hooks(self, upstream: Reader, spec: Any) -> Any:
            readers.append(upstream)
            return super().hooks(upstream, spec)

    adapt_with(Noting(), Network())
    assert readers[0] is readers[1]
    assert readers[0].record == {"head", "head.out_features"}


# ------------------------------------------------------------------ by pluggy's own rules


def test_a_wrapper_of_a_plugin_wraps_what_it_returns(found: Found) -> None:
    point = found("wrapping", prisma_sources=lambda: [Counting()])
    module = point.load()
    marker = pluggy.HookimplMarker("prisma")

    @marker(wrapper=True, specname="prisma_sources")
    def around() -> Iterator[None]:
        lists = yield
        return [[type("More", (Counting,), {"name": "more"})(), *sources] for sources in lists]  # type: ignore[attr-defined]

    module.around = around
    host = Host([point])
    assert host.plugins()[0].error is None
    assert set(host.sources()) == {"more", "counting"}


def test_arguments_go_by_name_and_may_be_left_out(found: Found) -> None:
    host = Host([found("silent", prisma_commands=lambda: None)])
    assert [plugin for _, plugin in host.commands(lambda: None)] == ["silent"]  # type: ignore[arg-type,return-value]
    assert host.plugins()[0].error is None


# ------------------------------------------------------------------ apart


class Skipped(BaseException):
    """What pytest raises to skip, which is no Exception."""


def _skips() -> Any:
    raise Skipped("not here")


def _endless() -> Iterator[Source]:
    while True:
        yield Counting()


@pytest.mark.parametrize(
    ("hooks", "error"),
    [
        ({"prisma_adapters": _skips}, "prisma_adapters: Skipped: not here"),
        ({"prisma_sources": _skips}, "prisma_sources: Skipped: not here"),
        ({"prisma_sources": _endless}, "the source 'counting' is claimed by itself too"),
    ],
)
def test_what_is_no_exception_and_what_has_no_end(
    found: Found, hooks: dict[str, Any], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prisma_core.host.MOST", 5)
    good = found("good", prisma_adapters=lambda: [NetworkAdapter()])
    host = Host([found("bad", **hooks), good])
    assert {info.name: info.error for info in host.plugins()} == {"bad": error, "good": None}
    assert isinstance(host.adapter(Network()), NetworkAdapter)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_is_the_users(found: Found) -> None:
    def interrupted() -> Any:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        Host([found("slow", prisma_sources=interrupted)])


def _names(source: Source) -> Any:
    return ["counting:one"]


def _fails(source: Source) -> Any:
    return fails()


def _nothing(source: Source) -> Any:
    return None


@pytest.mark.parametrize(
    ("models", "error"),
    [
        (_names, "_names returned a str; expected ModelInfo"),
        (_fails, "models of counting: KeyError: 'heads'"),
        (_nothing, "models of counting: TypeError"),
    ],
)
def test_a_list_of_models_that_is_none(found: Found, models: Callable[[Source], Any], error: str) -> None:
    broken = type("CountingBadly", (Counting,), {"models": models})
    fine = type("Fine", (Counting,), {"name": "fine"})
    host = Host([found("bad", prisma_sources=lambda: [broken()]), found("fine", prisma_sources=lambda: [fine()])])
    assert [info.reference for info in host.models()] == ["fine:one"]
    assert error in str(host.infos["bad"].error)
    assert host.infos["fine"].error is None


def test_a_list_of_models_that_never_ends_is_told(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prisma_core.host.MOST", 5)

    def models(source: Source) -> Iterator[ModelInfo]:
        yield from (ModelInfo(f"counting:{n}", "many", pretrained=True) for n in itertools.count())

    endless = type("Endless", (Counting,), {"models": models})
    host = Host([found("bad", prisma_sources=lambda: [endless()])])
    assert len(host.models()) == 5
    assert host.infos["bad"].error == "models of counting: it lists 5 and more, which are left out"


class Distribution:
    def __init__(self, name: str):
        self.name, self.version = name, "1"


def of(point: EntryPoint, distribution: str) -> EntryPoint:
    return point._for(Distribution(distribution))  # type: ignore[attr-defined,no-any-return]


def test_prismas_own_plugins_keep_their_names(found: Found) -> None:
    """Sorted by name and module the third-party one would come first."""
    ours = of(found("timm", module="z_ours", prisma_sources=lambda: [Counting()]), DISTRIBUTION)
    taker = of(found("timm", module="a_theirs", prisma_sources=lambda: [Counting()]), "acme")
    clasher = of(found("also", prisma_sources=lambda: [Counting()]), "acme")
    host = Host([taker, clasher, ours])
    errors = {info.name: info.error for info in host.plugins()}
    assert errors["timm"] is None
    assert errors["timm (a_theirs)"] == f"the name 'timm' is taken by z_ours of {DISTRIBUTION} 1"
    assert errors["also"] == "the source 'counting' is claimed by timm too"
    assert host.source("counting").name == "counting"


# ------------------------------------------------------------------ references


class Hub(Counting):
    name = "hub"
    unlisted = r"[\w.-]+/[\w.-]+"


def test_a_reference_and_its_text() -> None:
    reference = reference_of("open_clip:ViT-B-32@laion2b:e16")
    assert reference == Reference("open_clip", "ViT-B-32@laion2b:e16")
    assert str(reference) == "open_clip:ViT-B-32@laion2b:e16"
    assert ModelInfo(str(reference), "family", pretrained=True).rest == reference.rest


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("openai/clip-vit-base-patch32", r"Did you mean hub:openai/clip-vit-base-patch32\?"),
        ("on", r"Did you mean counting:one or hub:one\?"),
        ("here", r"Did you mean file:here\?"),
        ("nothing alike", r"patch16_224\. `prisma models`"),
        (":x", r"patch16_224\. `prisma models`"),
        ("x" * 300, "is not a reference"),
    ],
)
def test_a_reference_without_a_source(
    found: Found, use: Callable[..., Host], text: str, hint: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    listing = type("Listing", (Hub,), {"models": lambda self: [ModelInfo("hub:one", "ones", pretrained=True)]})
    use(found("some", prisma_sources=lambda: [Counting(), listing()]))
    with pytest.raises(UnknownName, match=hint):
        prisma.load(text)


def test_no_plugin_is_asked_for_a_file(
    use: Callable[..., Host], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    def never() -> Host:
        raise AssertionError("a file needs no plugin")

    monkeypatch.setattr("prisma_core.zoo.installed", never)
    with pytest.raises(prisma.LoadError, match="holds no"):
        prisma.load(f"file:{tmp_path}")
