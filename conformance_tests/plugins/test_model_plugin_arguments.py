"""Public functions of the kit and of plugins of models, with nonsense in the place of each argument in turn."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import prisma_conformance as kit
import prisma_dino as dino
import prisma_vivit as vivit
import pytest
import torch
from arguments import Call, all_faults, call, uncalled
from models import build
from windows import Adapter, Upstream

from prisma_core import HookedViT


@cache
def model() -> HookedViT:
    return build().float()


IMAGES = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
WHOLE = "int64"
GIVEN = {"device": "None", "seed": f"{WHOLE} -99 10**18", "progress": "None", "upstream": "None module"}


def head(place: Path) -> Path:
    tensors = {"head.mlp.0.weight": torch.randn(5, 4), "head.mlp.0.bias": torch.randn(5)}
    tensors |= {"head.mlp.2.weight": torch.randn(3, 5), "head.last_layer.weight": torch.randn(7, 3)}
    torch.save({"teacher": tensors}, place / "head.pth")
    return place / "head.pth"


def linear(place: Path) -> Path:
    torch.save({"linear.weight": torch.randn(3, 4), "linear.bias": torch.randn(3)}, place / "linear.pth")
    return place / "linear.pth"


def certificates(place: Path) -> Path:
    report = kit.check(Upstream(), adapter=Adapter(), checks="algebra")
    return kit.write_certificates(report.certificates, place / "c.jsonl")


def processor() -> Any:
    from transformers import VivitImageProcessor

    return VivitImageProcessor(size={"height": 8, "width": 8}, do_center_crop=False)


CALLS: dict[str, Callable[[Path], Call]] = {
    "last_layers": lambda place: call(dino.last_layers, model(), IMAGES, 1, takes={"n": ""}),
    "linear_input": lambda place: call(dino.linear_input, model(), IMAGES, 1, takes={"n": ""}),
    "load_head": lambda place: call(dino.load_head, head(place), "teacher", name="head", takes={"path": ""}),
    "load_linear_head": lambda place: call(dino.load_linear_head, linear(place), takes={"path": ""}),
    "preprocess_of": lambda place: call(vivit.preprocess_of, processor(), 2),
    "select": lambda place: call(kit.select, "algebra"),
    "check": lambda place: call(
        kit.check, Upstream(), adapter=Adapter(), checks="algebra",
        takes={"adapter": "", **GIVEN, **dict.fromkeys(["checks", "dtypes", "starting"], "None")},
    ),
    "diagnose": lambda place: call(kit.diagnose, Upstream(), adapter=Adapter(), takes={"adapter": "", **GIVEN}),
    "randomise": lambda place: call(
        kit.randomise, torch.nn.Linear(2, 2), torch.Generator(), takes={"module": "module"}
    ),
    "read_certificates": lambda place: call(kit.read_certificates, certificates(place), takes={"path": ""}),
    "write_certificates": lambda place: call(
        kit.write_certificates,
        kit.read_certificates(certificates(place)),
        place / "again.jsonl",
        takes={"certificates": "[] set() array"},
    ),
}  # fmt: skip

# Why something public is not called with nonsense.
EXEMPT = {
    **dict.fromkeys(["prisma_dino.DinoHead", "prisma_conformance.Check"], "made by the function that returns it"),
    "prisma_dino.DinoHead.forward": "a module of torch's, with torch's errors",
    "prisma_conformance.Check.run": "called by check",
    **dict.fromkeys(["prisma_vivit.Predictor", "prisma_vivit.Predictor.forward"], "made by the adapter"),
    **dict.fromkeys(["prisma_vivit.prisma_adapters", "prisma_vivit.prisma_cases"], "called by the host"),
}


def test_every_public_function_of_these_is_called(place: Path) -> None:
    assert not uncalled([kit, dino, vivit], (make(place) for make in CALLS.values()), EXEMPT)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("name", CALLS)
def test_nonsense_in_every_place(name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = CALLS[name](place)
    one.run()
    assert not all_faults(one)
