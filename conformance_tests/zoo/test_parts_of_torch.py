"""What torch puts in the place of parts and weights: pruning, norms of weights, quantised, traced, sharded parts.

A hooked upstream keeps it, or says what cannot be copied or hooked; a canonical form refuses it by its place, and says
the way out. Sharing and copying go on as they do without it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from third_party import Attention, Mapped, Net, Plain, drawn, image
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import prisma_core as prisma
from prisma_core import UnsupportedArchitecture
from prisma_core.plugin import HookMap, Reader

PLACE = "layers.1.attn.qkv"
pytestmark = pytest.mark.filterwarnings("ignore")


class Deep(Mapped):
    """Its hook points stand at the place and beside it."""

    def hooks(self, upstream: Reader, spec: Any) -> HookMap:
        return HookMap.parse("""
            layers.1.attn.qkv -> blocks.1.attn.hook_qkv    : batch pos d_qkv
            layers.1          -> blocks.1.hook_resid_post  : batch pos d_model
        """)


def part(net: Net) -> Any:
    return net.layers[1].attn.qkv


def exchanged(net: Net, made: nn.Module) -> None:
    attn: Any = net.layers[1].attn
    attn.qkv = made


class Mixed(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5 + weight.flip(0)


def pruned(net: Net) -> None:
    prune.l1_unstructured(part(net), "weight", 0.5)


def twice_pruned(net: Net) -> None:
    pruned(net)
    prune.random_structured(part(net), "weight", 0.3, dim=0)


def computed_since(net: Net) -> None:
    weight = part(net).weight
    del part(net).weight
    part(net).weight = weight * 2


def buffer_with_a_graph(net: Net) -> None:
    bias = part(net).bias * 2
    del part(net).bias
    part(net).register_buffer("bias", bias)


COMPUTED: dict[str, Callable[[Net], object]] = {
    "pruned": pruned,
    "pruned twice": twice_pruned,
    "weight norm of old": lambda net: nn.utils.weight_norm(part(net)),
    "weight norm": lambda net: parametrizations.weight_norm(part(net)),
    "spectral norm of old": lambda net: nn.utils.spectral_norm(part(net)),
    "spectral norm": lambda net: parametrizations.spectral_norm(part(net)),
    "orthogonal": lambda net: parametrizations.orthogonal(part(net)),
    "parametrised": lambda net: parametrize.register_parametrization(part(net), "weight", Mixed()),
    "computed since": computed_since,
    "a buffer with a graph": buffer_with_a_graph,
}


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("kind", COMPUTED)
def test_weights_that_are_computed_are_a_hooked_upstream_s_too(kind: str, copy: bool) -> None:
    net, x = drawn(), image()
    COMPUTED[kind](net)
    net.eval()
    model = prisma.adapt(net, adapter=Deep(), copy=copy)
    before = net(x)
    logits, cache = model.run_with_cache(x)
    torch.testing.assert_close(logits, before)
    assert len(cache) == 2
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "original" not in name:  # of which some are on a manifold
                parameter.mul_(1.5)
    assert torch.equal(model(x), before) is copy
    assert copy or torch.equal(model(x), net(x))
    prisma.export(model)


@pytest.mark.parametrize("kind", [kind for kind in COMPUTED if kind != "a buffer with a graph"])
def test_a_canonical_form_says_how_they_become_plain(kind: str) -> None:
    net = drawn()
    COMPUTED[kind](net)
    way = rf"{PLACE}.*(prune\.remove|remove_weight_norm|remove_parametrizations|Set an nn\.Parameter)"
    with pytest.raises(prisma.PrismaError, match=way):
        prisma.adapt(net, adapter=Plain())


def quantised(net: Net) -> None:
    made = torch.ao.quantization.quantize_dynamic(nn.Sequential(part(net).float()), {nn.Linear})
    exchanged(net.float(), made[0])


def of_bitsandbytes(net: Net) -> None:
    kind = type("Linear8bitLt", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    part(net).__class__ = kind


def scripted(net: Net) -> None:
    exchanged(net, torch.jit.script(part(net)))


def traced(net: Net) -> None:
    exchanged(net, torch.jit.trace(part(net), torch.randn(1, 6, dtype=torch.float64)))


def symbolic(net: Net) -> None:
    exchanged(net, torch.fx.symbolic_trace(part(net)))


def recomputed(net: Net) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    exchanged(net, checkpoint_wrapper(part(net)))


def parallel(net: Net) -> None:
    exchanged(net, nn.DataParallel(part(net)))


def compiled(net: Net) -> None:
    exchanged(net, torch.compile(part(net), backend="eager"))  # type: ignore[arg-type]


def locked(net: Net) -> None:
    part(net).lock = threading.Lock()


def uncopied(net: Net) -> None:
    part(net).weight = nn.Parameter(part(net).weight.detach().to_sparse(), requires_grad=False)


def elsewhere(net: Net) -> None:
    part(net).to("meta")


OTHERS: dict[Callable[[Net], None], tuple[str, str | None]] = {  # the words of a canonical form, of a hooked upstream
    quantised: (f"dynamic.*{PLACE}.*(expect|made of)", None),
    of_bitsandbytes: (f"Linear8bitLt at '{PLACE}'.*Quantised weights: adapt what they were made of", None),
    scripted: (f"ScriptModule.*{PLACE}.*made of", f"ScriptModule.*{PLACE}.*runs no hooks.*made of"),
    traced: (f"{PLACE}.*made of", f"{PLACE}.*runs no hooks"),
    symbolic: (f"GraphModule.*{PLACE}.*made of", None),
    recomputed: (f"CheckpointWrapper.*{PLACE}.*_checkpoint_wrapped_module", None),
    parallel: (rf"DataParallel.*{PLACE}.*wrapper\.module", None),
    compiled: (rf"OptimizedModule.*{PLACE}.*wrapper\._orig_mod", None),
    locked: ("", f"Linear at '{PLACE}'.*cannot be copied.*lock"),
    uncopied: (f"Linear at '{PLACE}'.*sparse_coo", f"Linear at '{PLACE}'.*cannot be copied"),
    elsewhere: (f"Linear at '{PLACE}'.*meta", f"Linear at '{PLACE}'.*meta"),
}


@pytest.mark.parametrize("change", OTHERS)
@pytest.mark.parametrize("adapter", [Plain(), Deep()], ids=["canonical", "hooked upstream"])
@torch.no_grad()
def test_parts_that_torch_makes_of_others(change: Callable[[Net], None], adapter: Any) -> None:
    net = drawn()
    change(net)
    words = OTHERS[change][isinstance(adapter, Deep)]
    if words:
        with pytest.raises((UnsupportedArchitecture, prisma.WeightMapError), match=words):
            prisma.adapt(net, adapter=adapter)
        return
    model, x = prisma.adapt(net, adapter=adapter), image().to(net.embed.weight.dtype)
    logits, cache = model.run_with_cache(x)
    torch.testing.assert_close(logits, net(x))
    assert any(name.startswith("blocks.1.") for name in cache)
    net.load_state_dict(prisma.export(model))
    torch.testing.assert_close(net(x), logits)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_codes_are_no_weights(dtype: torch.dtype) -> None:
    net = drawn()
    part(net).weight = nn.Parameter(part(net).weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(UnsupportedArchitecture, match=f"'{PLACE}'.*weight is of {dtype}: codes of quantised weights"):
        prisma.adapt(net, adapter=Plain())


def test_a_hook_map_that_names_a_part_of_what_is_wrapped() -> None:
    net: Any = drawn()
    net.layers[1] = torch.compile(net.layers[1], backend="eager")
    with pytest.raises(UnsupportedArchitecture, match=r"'layers\.1'.*no module 'attn\.qkv'.*wrapper\._orig_mod"):
        prisma.adapt(net, adapter=Deep())


def test_tensors_beside_parameters_are_shared_too() -> None:
    net, x = drawn(), image()
    attn: Any = net.layers[1].attn
    attn.scale = torch.full((6,), 2.0, dtype=torch.float64)
    forward = Attention.forward
    attn.forward = lambda x: forward(attn, x) * attn.scale
    shared, copied = (prisma.adapt(net, adapter=Deep(), copy=copy) for copy in (False, True))
    before = net(x)
    attn.scale.mul_(2)
    assert torch.equal(shared(x), net(x))
    assert torch.equal(copied(x), before)
    assert not torch.equal(net(x), before)


def test_a_state_dict_of_the_user_s_own_names_is_no_export() -> None:
    net = drawn()

    def renamed(module: nn.Module, state: dict[str, Any], *rest: Any) -> dict[str, Any]:
        return {f"module.{name}": value for name, value in state.items()}

    net._register_state_dict_hook(renamed)
    model = prisma.adapt(net, adapter=Plain())
    with pytest.raises(prisma.WeightMapError, match=r"'module\.embed\.weight'.*state dict hooks"):
        prisma.export(model)
    assert list(prisma.export(prisma.adapt(net, adapter=Deep()))) == list(net.state_dict())


# -------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", ["canonical", "hooked upstream"])
def test_draws_in_training(kind: str) -> None:
    """A hooked upstream draws as upstream does; a canonical form computes what upstream does in evaluation."""
    net, x = drawn(), image()
    plain = net(x)
    net.train()
    model = prisma.adapt(net, adapter=Plain() if kind == "canonical" else Deep())
    assert not model.training
    assert net.training
    assert all(module.training for module in net.modules())
    torch.testing.assert_close(model(x), plain)
    model.train()
    torch.manual_seed(3)
    drawn_ones = net(x)
    assert (drawn_ones - plain).abs().max() > 1e-3
    torch.manual_seed(3)
    logits, _ = model.run_with_cache(x)
    torch.testing.assert_close(logits, plain if kind == "canonical" else drawn_ones)


@pytest.mark.parametrize("adapter", [Plain(), Deep()], ids=["canonical", "hooked upstream"])
def test_adapting_draws_nothing_and_leaves_torch_as_it_was(adapter: Any) -> None:
    net, state, dtype = drawn(), torch.get_rng_state(), torch.get_default_dtype()
    grads = [parameter.requires_grad_(index % 2 == 0).requires_grad for index, parameter in enumerate(net.parameters())]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = prisma.adapt(net, adapter=adapter)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype
    assert torch.is_grad_enabled()
    assert [parameter.requires_grad for parameter in net.parameters()] == grads
    if isinstance(adapter, Deep):
        assert [parameter.requires_grad for parameter in model.parameters()] == grads
