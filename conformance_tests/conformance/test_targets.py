"""Targets of a check, the certificate of a result, and what counts as skipped."""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, version
from typing import Any

import pytest
import torch
from prisma_conformance import Case, Certificate, check, read_certificates, target, write_certificates
from prisma_conformance.finding import Check, Finding
from prisma_conformance.run import certify, run_check
from prisma_conformance.subject import Subject
from torch import Tensor, nn

from prisma_core import NotApplicable, UnsupportedArchitecture, hookimpl
from prisma_core import host as hosts
from prisma_core.contract.adapter import Adapter, MapAdapter
from prisma_core.contract.source import Loaded, ModelInfo, Source
from prisma_core.host import Host
from prisma_core.maps.places import HookMap
from prisma_core.maps.reader import Reader
from prisma_core.spec import MapSpec


class Net(nn.Module):
    """One layer of some width."""

    def __init__(self, width: int = 4, refused: bool = False):
        super().__init__()
        self.layer, self.refused = nn.Linear(3, width), refused

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Other(Net):
    """Has no case."""


class NetAdapter(MapAdapter):
    types = (f"{__name__}.Net", f"{__name__}.Other")

    def spec(self, upstream: Reader) -> MapSpec:
        if upstream.refused:
            raise upstream.unsupported("a net that is refused")
        return MapSpec(shape=(3,))

    def hooks(self, upstream: Reader, spec: MapSpec) -> HookMap:
        return HookMap.parse("layer -> hook_logits : batch class")


class Nets(Source):
    name = "nets"

    def load(self, rest: str, *, pretrained: bool = True, **options: Any) -> Loaded:
        kind, _, width = rest.partition("-")
        return Loaded({"net": Net, "other": Other}[kind](int(width or 4), refused=width == "9"))

    def models(self) -> Iterator[ModelInfo]:
        yield ModelInfo("nets:net")


class Plugin:
    @hookimpl
    def prisma_sources(self) -> list[Source]:
        return [Nets()]

    @hookimpl
    def prisma_adapters(self) -> list[Adapter]:
        return [NetAdapter()]

    @hookimpl
    def prisma_cases(self) -> list[Case]:
        return [Case("small net", Net)]


PLUGIN: Any = Plugin()


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nets_plugin", PLUGIN)
    host = Host([EntryPoint("nets-plugin", "nets_plugin", "prisma")])
    host.infos["nets-plugin"] = hosts.PluginInfo("nets-plugin", __name__, "nets 3.4")
    monkeypatch.setattr(hosts, "_host", host)
    monkeypatch.setattr(target, "LARGE", 100)


FAST = ["parity.logits", "weights.roundtrip"]


def test_a_small_reference_is_checked_itself(caplog: pytest.LogCaptureFixture) -> None:
    report = check("nets:net", checks=FAST)
    assert report.passed, str(report)
    assert report.certificate.name == report.certificate.reference == "nets:net"
    assert report.certificate.full
    assert not caplog.records


def test_a_case_of_the_same_class_stands_for_a_large_reference(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        report = check("nets:net-1000", checks=FAST)
    assert report.certificate.name == "small net"
    assert report.certificate.reference == "nets:net-1000"
    assert not report.certificate.full
    assert "'small net'" in caplog.text
    assert "full=True" in caplog.text
    full = check("nets:net-1000", checks=FAST, full=True).certificate
    assert full.full
    assert full.name == "nets:net-1000"


def test_a_large_reference_without_a_case_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    steps: list[tuple[str, str]] = []
    with caplog.at_level(logging.WARNING):
        report = check(
            "nets:other-1000", checks=FAST, starting=lambda subject, one: steps.append((subject.note, one.name))
        )
    assert report.certificate.full
    assert "real size, 4,000 parameters" in caplog.text
    assert [name for _, name in steps] == FAST
    assert all("4,000 parameters" in note for note, _ in steps)


def test_a_case_does_not_stand_for_a_model_that_its_adapter_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "LARGE", 1)
    with pytest.raises(UnsupportedArchitecture, match="a net that is refused"):
        check("nets:net-9", checks=FAST)


def test_an_adapter_stands_for_its_cases() -> None:
    report = check(NetAdapter(), checks=FAST)
    assert [one.name for one in report.certificates] == ["small net"]


class Lonely(NetAdapter):
    types = ("nowhere.Net",)


def test_an_adapter_without_cases_is_said_to_have_none() -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"nowhere\.Net.*no installed plugin has a conformance case"):
        check(Lonely(), checks=FAST)


# -------------------------------------------------------------------- results


def subject() -> Subject:
    return Subject(Case("small net", Net), NetAdapter(), Net())


def test_a_certificate_names_every_version(tmp_path: Any) -> None:
    certificate = certify(subject(), [])
    assert certificate.prisma == version("prisma-interp")
    assert certificate.python == platform.python_version()
    assert certificate.torch == torch.__version__
    assert certificate.plugin == "nets 3.4"
    (back,) = read_certificates(write_certificates([certificate], tmp_path / "nets.jsonl"))
    assert (back.prisma, back.plugin, back.python) == (certificate.prisma, "nets 3.4", certificate.python)


def test_certificates_without_those_versions_are_read() -> None:
    old = '{"name": "x", "upstream": "a.B", "library": "a", "version": "1", "torch": "2", "facts": "f"}'
    certificate = Certificate.model_validate_json(old)
    assert (certificate.prisma, certificate.plugin, certificate.python) == ("", "", "")


def test_not_applicable_is_a_skip_whoever_raises_it() -> None:
    def run(subject: Subject) -> Finding:
        raise NotApplicable("this model has no such thing")

    result = run_check(Check("it", "something", run, run), subject())
    assert result.skipped == "this model has no such thing"
    failed = run_check(Check("it", "something", run, lambda subject: Finding(problems=("wrong",))), subject())
    assert failed.skipped is None
    assert not failed.passed
