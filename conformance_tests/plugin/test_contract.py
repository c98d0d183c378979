"""What goes wrong in a plugin's code is one error that names it, wherever Prisma calls it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prisma_conformance import Case, check
from prisma_conformance.subject import Subject, reader_of
from torch import nn

from prisma_core import HookedViT, InputError, PluginError, UnknownName, UnsupportedArchitecture
from prisma_core.contract.adapter import Adapter
from prisma_core.contract.source import Source
from prisma_core.maps.places import HookMap
from prisma_core.maps.reader import Reader
from prisma_core.maps.weights import WeightMap
from prisma_core.spec import EmbedSpec, ModelSpec
from prisma_core.zoo import adapt_with, load_upstream


class Luci(Adapter):
    """Adapts a canonical model to itself, but for what a test says."""

    types = (f"{__name__}.Upstream",)

    def __init__(self, **wrong: Any):
        self.wrong = wrong

    def _or(self, method: str, right: Any) -> Any:
        wrong = self.wrong.get(method, right)
        return wrong() if callable(wrong) and not isinstance(wrong, type) else wrong

    def spec(self, upstream: Reader) -> Any:
        upstream.classes.update(dict(upstream.module.named_modules()))
        upstream.record.update(f"{path}.act" for path in upstream.classes)
        return self._or("spec", upstream.module.spec)

    def weights(self, upstream: Reader, spec: Any) -> Any:
        return self._or("weights", WeightMap.parse("{*} -> {*}"))

    def hooks(self, upstream: Reader, spec: Any) -> Any:
        return self._or("hooks", HookMap.parse("head -> hook_logits"))

    def stem(self, upstream: Reader, spec: Any) -> Any:
        return self._or("stem", None)

    def call(self, upstream: nn.Module, *inputs: torch.Tensor) -> Any:
        return self._or("call", upstream(*inputs))


def _raises() -> Any:
    return {}["heads"]


@pytest.fixture
def upstream(vit: HookedViT) -> HookedViT:
    return vit


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("spec", "ModelSpec or TextSpec or DualSpec"),
        ("weights", "WeightMap"),
        ("hooks", "HookMap"),
        ("stem", "Module or None"),
    ],
)
def test_an_adapters_method_that_fails(upstream: HookedViT, method: str, expected: str) -> None:
    named = rf"test_contract\.Luci\.{method}"
    assert adapt_with(Luci(), upstream).spec == upstream.spec
    with pytest.raises(
        PluginError, match=rf"{named} raised KeyError: 'heads' \(test_contract\.py, line \d+\)"
    ) as caught:
        adapt_with(Luci(**{method: _raises}), upstream)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(PluginError, match=rf"{named} returned a int; expected {expected}"):
        adapt_with(Luci(**{method: 3}), upstream)
    if method != "stem":
        with pytest.raises(PluginError, match=rf"{named} returned None; expected {expected}"):
            adapt_with(Luci(**{method: None}), upstream)
    subject = Subject(Case("luci", lambda: upstream), Luci(), upstream)
    assert reader_of(subject)
    subject.adapter = Luci(**{method: _raises})
    with pytest.raises(PluginError, match=f"{named} raised"):
        reader_of(subject)


def test_errors_of_prisma_pass_as_they_are(upstream: HookedViT) -> None:
    def refuse() -> Any:
        raise UnsupportedArchitecture("Upstream", "a feature")

    with pytest.raises(UnsupportedArchitecture, match=r"^Upstream is not supported: a feature"):
        adapt_with(Luci(spec=refuse), upstream)


def test_a_misspelt_hook_point_is_refused_where_a_model_is_adapted(upstream: HookedViT) -> None:
    rows = "head -> hook_logits\nblocks.{l}.attn @ softmax : in -> blocks.{l}.attn.hook_attn_score"
    with pytest.raises(UnknownName, match=r"hook_attn_score is no hook point of this model\. Did you mean .*scores"):
        adapt_with(Luci(hooks=lambda: HookMap.parse(rows)), upstream)


def test_facts_that_no_spec_holds_and_facts_that_there_are_not(upstream: HookedViT) -> None:
    facts = dict(upstream.spec)
    with pytest.raises(UnsupportedArchitecture) as caught:
        adapt_with(Luci(spec=lambda: ModelSpec.plain(kind="post")), upstream)
    assert "(post-norm models of images are not covered" in str(caught.value)
    assert "http" not in str(caught.value)
    assert len(str(caught.value)) < 300
    with pytest.raises(UnsupportedArchitecture, match=r"n_classes: Input should be greater than 0, not -1"):
        adapt_with(Luci(spec=lambda: type(upstream.spec)(**{**facts, "n_classes": -1})), upstream)
    with pytest.raises(PluginError, match=r"Luci\.spec raised SpecError: EmbedSpec cannot be made: patsh: Extra"):
        adapt_with(Luci(spec=lambda: EmbedSpec(patch=(2, 2), patsh=2)), upstream)  # type: ignore[call-arg]


def test_what_the_kit_calls(upstream: HookedViT, image: torch.Tensor) -> None:
    def fails() -> nn.Module:
        raise ZeroDivisionError("depth")

    with pytest.raises(PluginError, match=r"build of the case 'one' raised ZeroDivisionError: depth"):
        check(Case("one", fails), adapter=Luci())
    with pytest.raises(PluginError, match=r"build of the case 'one' returned the class Linear; expected Module"):
        check(Case("one", lambda: nn.Linear), adapter=Luci())  # type: ignore[arg-type,return-value]
    subject = Subject(Case("one", lambda: upstream), Luci(call=None), upstream)
    with pytest.raises(PluginError, match=r"Luci\.call returned None; expected Tensor"):
        subject.forward(upstream, image)
    subject = Subject(Case("one", lambda: upstream, forward=lambda model, x: (model(x),)), Luci(), upstream)
    with pytest.raises(PluginError, match=r"forward of the case 'one' returned a tuple; expected Tensor"):
        subject.forward(upstream, image)


class Shop(Source):
    name = "shop"

    def load(self, rest: str, **options: Any) -> Any:
        return nn.Linear(1, 1) if rest == "bare" else nn.Linear(1, 1, **options) if options else _raises()

    def models(self) -> Any: ...


def test_a_source_that_fails() -> None:
    with pytest.raises(PluginError, match=r"Shop\.load returned a Linear; expected Loaded"):
        load_upstream(Shop(), "bare")
    with pytest.raises(PluginError, match=r"Shop\.load raised KeyError: 'heads'"):
        load_upstream(Shop(), "x")
    with pytest.raises(InputError, match=r"shop:x takes no such option \(given: depth\)"):
        load_upstream(Shop(), "x", depth=1)
