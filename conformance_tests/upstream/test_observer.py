"""The observer of upstream: what the kit records and what hooked upstreams show are the same tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from prisma_conformance.recording import Recorder
from torch import Tensor, nn

from prisma_core.maps.places import FUSED, HookMap, Place
from prisma_core.spec import MapSpec
from prisma_core.upstream.model import HookedUpstream

pytestmark = pytest.mark.usefixtures("in_float64")


class Attention(nn.Module):
    """Several results, a fused kernel, and edits in place."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x * factor).view(*x.shape[:2], 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        z = F.scaled_dot_product_attention(q, k, v)
        out = self.out(z.transpose(1, 2).flatten(2))
        doubled = 2 * out
        return out.neg_(), doubled


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.head = Attention(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out, doubled = self.attn(x, torch.tensor(0.5))
        return self.head((x + out + doubled).mean(1))


PLACES = [
    "attn : in",
    "attn : in1",
    "attn",
    "attn : out1",
    "attn.out",
    "attn @ unbind : out2",
    f"attn @ {FUSED} : in1",
    f"attn @ {FUSED} : scores",
    f"attn @ {FUSED} : pattern",
    f"attn @ {FUSED}",
    "attn @ neg : in",
    "@ add#1",
]


@pytest.fixture
def upstream() -> Model:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_every_kind_of_place_is_recorded(upstream: Model, x: Tensor) -> None:
    places = [Place.parse(text) for text in PLACES]
    with Recorder(upstream, places) as tensors:
        logits = upstream(x)
    assert set(tensors) == set(places)
    recorded = {text: tensors[place] for text, place in zip(PLACES, places, strict=True)}
    assert torch.equal(recorded["attn : in"], x)
    assert recorded["attn : in1"] == 0.5
    assert torch.equal(recorded["attn : out1"], 2 * recorded["attn.out"])  # the second of two results
    assert torch.equal(recorded["attn"], -recorded["attn.out"])  # as it was before upstream's edit in place
    pattern = recorded[f"attn @ {FUSED} : pattern"]
    assert torch.equal(pattern, recorded[f"attn @ {FUSED} : scores"].softmax(-1))
    assert torch.allclose(pattern @ recorded["attn @ unbind : out2"], recorded[f"attn @ {FUSED}"], atol=1e-14)
    assert torch.allclose(upstream.head(recorded["@ add#1"].mean(1)), logits, atol=1e-14)
    assert torch.allclose(upstream(x), logits, atol=1e-14)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in upstream.modules())


@torch.no_grad()
@pytest.mark.parametrize("text", PLACES)
def test_a_hooked_upstream_shows_what_is_recorded(upstream: Model, x: Tensor, text: str) -> None:
    place = Place.parse(text)
    with Recorder(upstream, [place]) as tensors:
        upstream(x)
    axes = " ".join(f"axis{index}" for index in range(tensors[place].ndim)) or "1"
    if place.side == "in1" and place.function is None:
        pytest.skip("a number has no axes to name")
    model = HookedUpstream(
        Model().eval(), HookMap.parse(f"{text} -> hook_it : {axes}"), MapSpec(shape=(5, 6)), lambda y: y
    )
    model.upstream.load_state_dict(upstream.state_dict())
    _, cache = model.run_with_cache(x, names="hook_it")
    assert torch.equal(cache["hook_it"], tensors[place])


def test_a_place_without_a_tensor_is_not_recorded(upstream: Model, x: Tensor) -> None:
    with Recorder(upstream, [Place.parse("attn : out2"), Place.parse("attn @ softmax")]) as tensors:
        upstream(x)
    assert not tensors
