"""The kit on another device and in half precision: what it compares, what it catches, and how a run is set up.

``fake_device`` holds numbers apart from the CPU's as a GPU does. The last test needs a real GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kinds import passes
from prisma_conformance import Case, check, devices
from prisma_conformance.devices import exact
from prisma_conformance.registry import select
from prisma_conformance.run import run_check
from prisma_conformance.subject import Subject
from torch import Tensor, nn

from prisma_core import InputError
from prisma_core.contract.adapter import Adapter, MapAdapter
from prisma_core.errors import qualified_name
from prisma_core.host import installed
from prisma_core.maps.places import HookMap
from prisma_core.spec import MapSpec
from prisma_core.zoo import adapt_with

HALF = [torch.bfloat16, torch.float16]


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and no CUDA device is here")


class Upstream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.shifted(x + self.mlp(x).relu()).mean(1))

    def shifted(self, x: Tensor) -> Tensor:
        return x


class Careless(Upstream):
    def shifted(self, x: Tensor) -> Tensor:
        return x + torch.arange(x.shape[1])[:, None]  # made on the CPU, wherever x is


class Mapped(MapAdapter):
    types = (qualified_name(Upstream()), qualified_name(Careless()))

    def spec(self, upstream: Any) -> MapSpec:
        return MapSpec(shape=(6, 4), n_classes=5)

    def hooks(self, upstream: Any, spec: Any) -> HookMap:
        return HookMap.parse(
            """
            embed       ->  blocks.0.hook_resid_pre   : batch pos d_model
            mlp         ->  blocks.0.mlp.hook_pre     : batch pos d_mlp
            head : in   ->  hook_pooled               : batch d_model
            head        ->  hook_logits               : batch class
            """
        )


def subject(upstream: type[nn.Module], adapter: Adapter, **given: Any) -> Subject:
    return Subject(Case(upstream.__name__, upstream), adapter, upstream(), **given)


def test_a_mapped_model_runs_where_it_is(device: torch.device) -> None:
    found = subject(Upstream, Mapped(), device=device)
    for name in ("parity.logits", "parity.hooks", "parity.gradients"):
        assert run_check(select(name)[0], found).passed, run_check(select(name)[0], found).detail
    model = adapt_with(Mapped(), Upstream().to(device))
    passes(model, device, torch.float32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_mapped_model_in_half_precision(dtype: torch.dtype) -> None:
    found = subject(Upstream, Mapped(), dtypes=[dtype])
    result = run_check(select("parity.logits")[0], found)
    assert result.passed, result.detail
    assert [(one.dtype, one.equal) for one in result.precisions] == [(str(dtype).removeprefix("torch."), True)]


def test_the_kit_runs_on_another_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "machine", lambda place: f"made up for {place}")
    case = next(case for case, _ in installed().cases({"toy"}) if case.name == "published-norms")
    report = check(case, device=device, checks=["parity.*", "weights.*", "algebra", "save.load"])
    assert report.passed, str(report)
    assert report.certificate.device == "cuda:0"
    assert report.certificate.machine == "made up for cuda:0"
    assert {one.dtype for one in report.certificate["parity.logits"].precisions} == {"float32", "bfloat16", "float16"}


def test_a_tensor_created_on_the_cpu_inside_a_pass_is_caught(device: torch.device) -> None:
    result = run_check(select("parity.hooks")[0], subject(Careless, Mapped(), device=device))
    assert not result.passed
    assert "same device, found cuda:0 and cpu, in aten::add" in result.detail
    with pytest.raises(RuntimeError, match="same device"):
        Careless().to(device)(torch.zeros(1, 6, 4).to(device))
    Careless()(torch.zeros(1, 6, 4))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_arithmetic_worse_than_upstreams_is_caught_in_half_precision(dtype: torch.dtype) -> None:
    """What float64 cannot show: products rounded once more."""

    class Rounded(Upstream):
        def forward(self, x: Tensor) -> Tensor:
            coarse = torch.float8_e4m3fn if x.dtype == torch.bfloat16 else torch.bfloat16
            x = x if x.dtype == torch.float64 else x.to(coarse).to(x.dtype)
            return super().forward(x)

    found = subject(Upstream, Mapped(), dtypes=[dtype])

    def make(adapter: Adapter, upstream: nn.Module) -> Any:
        upstream.__class__ = Rounded
        made = adapt_with(adapter, upstream)
        upstream.__class__ = Upstream
        return made

    Mapped.types = (*Mapped.types, qualified_name(Rounded()))
    result = run_check(select("parity.logits")[0], found.variant(found.adapter, make))
    assert not result.passed
    assert "more than 1.5 times that" in result.detail


def test_tensorfloat_is_off_during_checks_and_as_before_afterwards() -> None:
    def state() -> list[object]:
        matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
        return [matmul.fp32_precision, conv.fp32_precision, torch.backends.cudnn.deterministic]

    seen: list[list[object]] = []

    class Seen(Upstream):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(state())
            return super().forward(x)

    class Adapter(Mapped):
        types = (qualified_name(Seen()),)

    before = state()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        changed = state()
        found = subject(Seen, Adapter())
        run_check(select("parity.logits")[0], found)
        assert state() == changed
    finally:
        torch.backends.cuda.matmul.fp32_precision = before[0]
    assert seen
    assert all(each == ["ieee", "ieee", True] for each in seen)
    with pytest.raises(ZeroDivisionError), exact():
        raise ZeroDivisionError
    assert state() == before


def test_a_device_that_fails_is_reported_and_ends_no_run() -> None:
    class Full(Upstream):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    class Adapter(Mapped):
        types = (qualified_name(Full()),)

    result = run_check(select("parity.logits")[0], subject(Full, Adapter()))
    assert not result.passed
    assert result.detail == "cpu has not enough memory for this model: CUDA out of memory"


def test_unknown_devices_and_dtypes_are_named() -> None:
    with pytest.raises(InputError, match="got 'abacus'; there is cpu"):
        check("toy:scenes-3l", device="abacus")
    with pytest.raises(InputError, match="float32, bfloat16, float16; got 'int8'"):
        check("toy:scenes-3l", dtypes=["int8"])


@GPU
def test_on_a_gpu() -> None:
    case = next(case for case, _ in installed().cases({"toy"}) if case.name == "published-norms")
    report = check(case, device="cuda")
    assert report.passed, str(report)
    assert torch.cuda.get_device_name() in report.certificate.machine
