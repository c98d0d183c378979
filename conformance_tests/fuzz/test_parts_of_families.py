"""What torch puts in the place of parts and weights, in every family: upstream's numbers, or the part by its name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import prisma_core as prisma
from prisma_core import UnsupportedArchitecture
from prisma_core.plugin import installed

from .hf_sweep import drawn, sample

pytestmark = pytest.mark.filterwarnings("ignore")


class Mixed(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 0.5 + weight.flip(0)


FAMILIES = [("timm", "test_vit"), ("timm", "swin_base_patch4_window7_224"), ("hf", "ViTForImageClassification")]
FAMILIES += [
    ("clip", "ViT-B-16"),
    ("clip", "hf/CLIPModel"),
    ("dino", "dinov2"),
    ("vivit", "VivitForVideoClassification"),
]


def tied(upstream: nn.Module, linear: nn.Linear) -> None:
    others = [one for one in upstream.modules() if isinstance(one, nn.Linear) and one is not linear]
    other = next(one for one in others if one.weight.shape == linear.weight.shape)
    other.weight = linear.weight


def put(upstream: nn.Module, linear: nn.Linear, made: nn.Module) -> None:
    path = next(path for path, module in upstream.named_modules() if module is linear)
    above, _, name = path.rpartition(".")
    setattr(upstream.get_submodule(above), name, made)


def as_sparse(upstream: nn.Module, linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().to_sparse(), requires_grad=False)


STATES: dict[str, Callable[[nn.Module, nn.Linear], object]] = {
    "pruned": lambda upstream, linear: prune.l1_unstructured(linear, "weight", 0.5),
    "weight norm": lambda upstream, linear: parametrizations.weight_norm(linear),
    "weight norm of old": lambda upstream, linear: nn.utils.weight_norm(linear),
    "parametrised": lambda upstream, linear: parametrize.register_parametrization(linear, "weight", Mixed()),
    "scripted": lambda upstream, linear: put(upstream, linear, torch.jit.script(linear)),
    "symbolic": lambda upstream, linear: put(upstream, linear, torch.fx.symbolic_trace(linear)),
    "parallel": lambda upstream, linear: put(upstream, linear, nn.DataParallel(linear)),
    "sparse": as_sparse,
    "frozen": lambda upstream, linear: linear.requires_grad_(False),
    "tied": tied,
}


@pytest.mark.parametrize(("plugin", "name"), FAMILIES)
@torch.no_grad()
def test_it_has_upstream_s_numbers_or_names_the_part(plugin: str, name: str) -> None:
    pytest.importorskip({"timm": "timm", "clip": "open_clip"}.get(plugin, "transformers"))
    case = next(one for one, _ in installed().cases({plugin}) if one.name == name)
    upstream = drawn(case.build())
    inputs, outcomes = sample(prisma.adapt(upstream)), list[str]()
    for state in STATES:
        upstream = drawn(case.build())
        parts = [(path, one) for path, one in upstream.named_modules() if isinstance(one, nn.Linear)]
        path, linear = parts[1]
        STATES[state](upstream, linear)
        try:
            ours = prisma.adapt(upstream, copy=False)(*inputs)
        except UnsupportedArchitecture as error:
            outcomes.append("refused" if path in str(error) else f"{state}: {error}")
            continue
        theirs = (case.forward or installed().adapter(upstream).call)(upstream, *inputs)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        outcomes.append("agrees")
    assert set(outcomes) == {"agrees", "refused"}
    assert outcomes[-2:] == ["agrees", "agrees"]
