"""The toolbox's readers of parts: torch's classes are known, a library's are data, and a subclass is unsupported."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import prisma_core as prisma
from prisma_core import UnsupportedArchitecture
from prisma_core.plugin import (
    MapAdapter,
    MlpNames,
    MlpSpec,
    NormClass,
    NormSpec,
    PartReader,
    Reader,
    installed,
    plain_patches,
    qualified_name,
)

pytest.importorskip("timm", reason="timm is not installed: pip install 'prisma-interp[timm]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'prisma-interp[hf]'")
pytest.importorskip("open_clip", reason="open_clip is not installed: pip install 'prisma-interp[clip]'")


class Quick(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Double(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Centred(nn.Module):
    def __init__(self, eps: float):
        super().__init__()
        self.variance_epsilon = eps


class Gated(nn.Module):
    def __init__(self, *, gate_last: bool = False):
        super().__init__()
        self.up, self.down, self.act, self.norm = nn.Linear(5, 14), nn.Linear(7, 5), nn.SiLU(), nn.LayerNorm(7, 3e-4)
        self.gate_last = gate_last


NAMES = MlpNames("up", "down", fused=True, gate_last="gate_last", ln="norm")
READ = PartReader(
    norms={qualified_name(Centred(1.0)): NormClass("rms", "variance_epsilon", in_float32=True)},
    activations={qualified_name(Quick()): "quick_gelu"},
    mlps={qualified_name(Gated()): NAMES},
)


def test_plain_names_mean_torchs_own_classes() -> None:
    class Linear(nn.Linear):
        pass

    assert Reader(nn.Linear(1, 1)).is_a("Linear")
    assert Reader(nn.Linear(1, 1)).is_a("torch.nn.modules.linear.Linear")
    assert not Reader(Linear(1, 1)).is_a("Linear")
    assert Reader(Linear(1, 1)).is_a(qualified_name(Linear(1, 1)))
    with pytest.raises(UnsupportedArchitecture, match="Linear"):
        Reader(Linear(1, 1)).expect("Linear")


def test_norms() -> None:
    assert READ.norm(Reader(nn.LayerNorm(3, eps=2e-3))) == NormSpec(eps=2e-3)
    assert READ.norm(Reader(nn.RMSNorm(3, eps=2e-3))) == NormSpec(kind="rms", eps=2e-3)
    assert READ.norm(Reader(Centred(0.25))) == NormSpec(kind="rms", eps=0.25, in_float32=True)
    assert READ.norm(Reader(nn.Identity())) is None
    for module in (nn.RMSNorm(3), nn.BatchNorm1d(3), type("LayerNorm", (nn.LayerNorm,), {})(3)):
        with pytest.raises(UnsupportedArchitecture, match="norm"):
            READ.norm(Reader(module))
    with pytest.raises(UnsupportedArchitecture, match="queries and keys"):
        READ.qk_norm(Reader(nn.LayerNorm(3)), Reader(nn.LayerNorm(3, eps=1e-3)))


def test_activations() -> None:
    modules = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "silu": nn.SiLU(), "relu": nn.ReLU()}
    assert {name: READ.activation(Reader(module)) for name, module in modules.items()} == {
        name: name for name in modules
    }
    assert READ.activation(Reader(Quick())) == "quick_gelu"
    with pytest.raises(UnsupportedArchitecture, match="activation"):
        READ.activation(Reader(nn.Mish()))


@pytest.mark.parametrize("gate_last", [False, True])
def test_a_fused_mlp(gate_last: bool) -> None:
    module = Reader(Gated(gate_last=gate_last))
    assert READ.mlp(module) == MlpSpec(d_mlp=7, act="silu", gated=True, inner_norm=NormSpec(eps=3e-4))
    order = "fc_in.weight, to.fc_gate" if gate_last else "fc_gate.weight, to.fc_in"
    assert f"at.up.weight        ->  [to.{order}.weight]" in READ.mlp_rows(module, "at", "to")
    hooks = READ.mlp_hooks(module, "at", "to")
    assert f"at @ mul : {'in ' if gate_last else 'in1'}" in hooks
    assert "at.act : in  ->  to.hook_pre " in hooks
    with pytest.raises(UnsupportedArchitecture, match="MLP"):
        PartReader().mlp(module)
    module.module.down = Double(7, 5)
    with pytest.raises(UnsupportedArchitecture, match=r"Double at 'down'.*linear layer"):
        READ.mlp(module)


@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"padding": 1}, {"dilation": 2}, {"groups": 3}, {"padding_mode": "circular", "padding": 1}],
)
@pytest.mark.parametrize("conv", ["Conv2d", "Conv3d"])
def test_patches_that_are_more_than_a_matrix(conv: Any, options: dict[str, Any]) -> None:
    plain_patches(Reader(getattr(nn, conv)(3, 6, 4, stride=4, padding="valid")), conv)
    with pytest.raises(UnsupportedArchitecture, match="patch"):
        plain_patches(Reader(getattr(nn, conv)(3, 6, 4, **{"stride": 4, **options})), conv)


def test_projections_without_biases_are_filled() -> None:
    def rows(*biased: bool) -> str:
        module = nn.Module()
        for name, bias in zip(("q_proj", "k_proj", "v_proj"), biased, strict=True):
            module.add_module(name, nn.Linear(4, 4, bias=bias))
        return READ.qkv_rows(Reader(module), "at", "to")

    assert "[at.q_proj.bias, zeros, at.v_proj.bias]" in rows(True, False, True)
    assert "[zeros, at.v_proj.bias]" in rows(False, False, True)
    assert re.search(r"\n *zeros +->  to.bias", rows(False, False, False))
    with pytest.raises(UnsupportedArchitecture, match="keys alone"):
        rows(False, True, False)


# One model of each kind of adapter: in none of its places may a class of torch's be replaced by a subclass.
MODELS = {
    "timm": ["test_vit", "beit_base_patch16_224", "eva02_tiny_patch14_224", "test_vit_relpos", "deepseek_vit_412m"],
    "hf": [
        "ViTForImageClassification",
        "Sapiens2Model",
        "Qwen3VLVisionModel",
        "BridgeTowerVisionModel",
        "BlipVisionModel",
    ],
    "clip": [
        "ViT-B-32",
        "roberta-ViT-B-32/whole",
        "hf/CLIPModel",
        "hf/SiglipModel",
        "hf/ChineseCLIPModel",
        "hf/AltCLIPModel",
    ],
    "dino": ["dinov2_swiglu", "dinov3", "meta_v2_giant", "meta_v3_plus"],
    "vivit": ["VivitForVideoClassification", "VideoMAEForVideoClassification", "VJEPA2Model"],
}


@pytest.mark.parametrize(("plugin", "name"), [(plugin, name) for plugin, names in MODELS.items() for name in names])
def test_a_subclass_in_any_place_is_unsupported(plugin: str, name: str) -> None:
    upstream = next(case for case, _ in installed().cases({plugin}) if case.name == name).build()
    adapter = installed().adapter(upstream)
    assert not isinstance(adapter, MapAdapter)
    weights = adapter.weights(Reader(upstream), adapter.spec(Reader(upstream)))
    places = 0
    for path, module in list(upstream.named_modules()):
        tensors = [f"{path}.{tensor}" for tensor, _ in module.named_parameters()]
        used = any(weights.reason_to_ignore(tensor) is None for tensor in tensors)
        if not used or not qualified_name(module).startswith("torch.nn.modules.") or list(module.children()):
            continue
        own = type(module)
        module.__class__ = type(own.__name__, (own,), {"__module__": "acme.layers"})
        with pytest.raises(UnsupportedArchitecture, match=rf"acme\.layers\.{own.__name__}|{re.escape(path)}"):
            prisma.adapt(upstream)
        module.__class__ = own
        places += 1
    assert places > 5
    prisma.adapt(upstream)
