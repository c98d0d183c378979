"""Plugins' code is called in few places, once where once is enough, and what it raises names it there."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import EntryPoint
from typing import Any

import pluggy
import pytest
import torch
from torch import Tensor, nn

import prisma_core as prisma
from prisma_core import InputError, PluginError, UnknownName, UnsupportedArchitecture
from prisma_core.contract.adapter import Adapter, MapAdapter, Refusal
from prisma_core.contract.source import Loaded, ModelInfo, Reference, Source
from prisma_core.errors import blaming, returned
from prisma_core.host import DISTRIBUTION, Host
from prisma_core.maps.places import HookMap
from prisma_core.maps.reader import Reader
from prisma_core.spec import MapSpec
from prisma_core.zoo import adapt_with, reference_of, unfused

Found = Callable[..., EntryPoint]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.body(x).relu())}


class NetworkAdapter(MapAdapter):
    """Adapts the network, with a mistake in one method."""

    types = (f"{__name__}.Network",)

    def __init__(self, **mistakes: Callable[[], Any]):
        self.mistakes = mistakes

    def _or(self, method: str, value: Any) -> Any:
        return self.mistakes[method]() if method in self.mistakes else value

    def spec(self, upstream: Reader) -> Any:
        return self._or("spec", MapSpec(shape=(4,), n_classes=upstream.head.out_features))

    def hooks(self, upstream: Reader, spec: Any) -> Any:
        table = "body -> blocks.0.hook_mlp_out : batch d\nhead -> hook_logits : batch class"
        return self._or("hooks", HookMap.parse(table))

    def output(self, result: Any) -> Any:
        return self._or("output", super().output(result))

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return self._or("unfused_attention", super().unfused_attention(upstream))


class Counting(Source):
    name = "counting"

    def load(self, rest: str, **options: Any) -> Loaded:
        return Loaded(Network())

    def models(self) -> Iterator[ModelInfo]:
        yield ModelInfo("counting:one", "ones", pretrained=False)


def fails() -> Any:
    return {}["heads"]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Host]:
    """Return a way to make the plugins of a test the installed ones."""

    def use(*points: EntryPoint) -> Host:
        host = Host(points)
        monkeypatch.setattr("prisma_core.host._host", host)
        return host

    return use


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
    assert (host.types(), host.homes(Counting())) == ({f"{__name__}.Network": "counting"}, {"counting"})
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


def test_an_interruption_is_the_users(found: Found) -> None:
    def interrupted() -> Any:
        raise KeyboardInterrupt

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
    assert [info.reference for info in host.models()] == ["counting:one"]  # of the other source
    assert error in str(host.infos["bad"].error)
    assert host.infos["fine"].error is None


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


# ------------------------------------------------------------------ refusals


def test_a_refusal_names_the_module_and_the_feature(found: Found) -> None:
    refusal = Refusal(NetworkAdapter.types, "a body of its own; adapt(model.head) takes the head", "body")
    host = Host([found("refusing", prisma_adapters=lambda: [refusal])])
    assert host.types() == {}
    linear = r"torch\.nn\.modules\.linear\.Linear at 'body' is not supported: a body of its own; adapt"
    with pytest.raises(UnsupportedArchitecture, match=linear):
        host.adapter(Network())


def test_an_adapter_comes_before_a_refusal(found: Found) -> None:
    refusing = found("a", prisma_adapters=lambda: [Refusal(NetworkAdapter.types, "anything")])
    host = Host([refusing, found("b", prisma_adapters=lambda: [NetworkAdapter()])])
    assert isinstance(host.adapter(Network()), NetworkAdapter)
    assert [info.error for info in host.plugins()] == [None, None]


def test_a_refusal_whose_types_are_text(found: Found) -> None:
    host = Host([found("a", prisma_adapters=lambda: [Refusal("acme.Net", "anything")])])  # type: ignore[arg-type]
    assert (
        host.infos["a"].error == "prisma_adapters: Refusal.types is 'acme.Net'; expected a tuple: types = ('acme.Net',)"
    )


# ------------------------------------------------------------------ blame


def test_an_error_names_the_method_and_the_line() -> None:
    named = rf"{__name__.rpartition('.')[2]}\.NetworkAdapter"
    with pytest.raises(PluginError, match=rf"{named}\.spec raised KeyError: 'heads' \(test_calls\.py, line \d+\)"):
        adapt_with(NetworkAdapter(spec=fails), Network())
    with pytest.raises(PluginError, match=rf"{named}\.hooks returned None; expected HookMap"):
        adapt_with(NetworkAdapter(hooks=lambda: None), Network())
    model = adapt_with(NetworkAdapter(output=fails), Network())
    with pytest.raises(PluginError, match=rf"{named}\.output raised KeyError: 'heads'"):
        model(torch.ones(1, 4))
    model = adapt_with(NetworkAdapter(output=dict), Network())
    with pytest.raises(PluginError, match=rf"{named}\.output returned a dict; expected Tensor"):
        model(torch.ones(1, 4))
    with (
        pytest.raises(PluginError, match=rf"{named}\.unfused_attention raised"),
        unfused(NetworkAdapter(unfused_attention=fails), Network()),
    ):
        raise AssertionError("never entered")


def test_what_happens_in_the_scope_is_not_the_adapters() -> None:
    left: list[str] = []

    @contextmanager
    def scope() -> Iterator[None]:
        try:
            yield
        finally:
            left.append("left")

    with pytest.raises(ZeroDivisionError), unfused(NetworkAdapter(unfused_attention=scope), Network()):
        raise ZeroDivisionError
    assert left == ["left"]


class Base:
    def inherited(self) -> None:
        raise KeyError("k")

    def deep(self) -> None:
        self.inherited()

    @functools.lru_cache  # noqa: B019  # a wrapper written in C, which has no frame
    def wrapped(self) -> None:
        raise KeyError("k")


class Derived(Base):
    pass


def test_the_outermost_method_of_the_object_is_named() -> None:
    for method in ("inherited", "deep", "wrapped"):
        with pytest.raises(PluginError, match=rf"Derived\.{method} raised KeyError: 'k' \("), blaming(one := Derived()):
            getattr(one, method)()
    with (
        pytest.raises(PluginError, match=r"\.Derived raised TypeError: .*inherited\(\) takes 1 positional"),
        blaming(one),
    ):
        one.inherited(3)  # type: ignore[call-arg]
    with pytest.raises(UnknownName, match="of Prisma"), blaming(one):
        raise UnknownName("of Prisma")
    assert returned(one.deep, 3, int) == 3


# ------------------------------------------------------------------ an adapter given by hand


def test_an_adapter_given_by_hand_needs_no_plugin(use: Callable[..., Host]) -> None:
    use()
    upstream, x = Network(), torch.randn(2, 4)
    with pytest.raises(UnsupportedArchitecture):
        prisma.adapt(upstream)
    model = prisma.adapt(upstream, adapter=NetworkAdapter())
    assert torch.equal(model(x), upstream(x)["logits"])


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (NetworkAdapter, "takes an Adapter, such as .*got the class NetworkAdapter"),
        ("timm", "got a str"),
        (Refusal(NetworkAdapter.types, "anything"), "got a Refusal"),
    ],
)
def test_what_is_no_adapter(adapter: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        prisma.adapt(Network(), adapter=adapter)


def test_an_adapter_of_another_type_is_refused() -> None:
    class Heir(Network):
        """Which may compute something else."""

    with pytest.raises(InputError, match=r"NetworkAdapter adapts .*\.Network; this model is a .*Heir"):
        prisma.adapt(Heir(), adapter=NetworkAdapter())


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
