"""Behaviour of upstream that no tensor shows is kept or refused, for any adapter; harmless wrappers pass."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from third_party import Mapped, Net, Plain, drawn, image
from torch import Tensor, nn

import prisma_core as prisma
from prisma_core import UnsupportedArchitecture
from prisma_core.plugin import Adapter, ModelSpec, Reader, installed


@pytest.fixture
def net() -> Net:
    return drawn()


def error(net: nn.Module, adapter: Adapter | None = None) -> float:
    x = image()
    with torch.no_grad():
        return (prisma.adapt(net, adapter=adapter or Plain())(x) - net(x)).abs().max().item()


PATHS = [path for path, _ in Net().named_modules() if path != "unused"]
CALLED = [path for path in PATHS if path != "layers"]


def test_a_model_that_does_what_it_declares(net: Net) -> None:
    assert error(net) < 1e-12


@pytest.mark.parametrize("path", CALLED)
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_at_any_depth(net: Net, path: str, kind: str) -> None:
    def half(module: nn.Module, values: Any, out: Any = None) -> Any:
        return values[0] * 0.5 if out is None else out * 0.5

    handle = getattr(net.get_submodule(path), kind)(half)
    with pytest.raises(UnsupportedArchitecture, match=r"hook .*half") as caught:
        error(net)
    assert not path or repr(path) in str(caught.value)
    assert error(net, Mapped()) < 1e-12  # upstream's own code: kept
    handle.remove()
    assert error(net) < 1e-12


@pytest.mark.parametrize("path", CALLED)
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wraps"])
def test_forwards_replaced_on_an_instance(net: Net, path: str, wrapped: bool) -> None:
    module: Any = net.get_submodule(path)
    forward = module.forward

    def zero(*args: Any) -> Tensor:
        return forward(*args) * 0

    module.forward = functools.wraps(forward)(zero) if wrapped else zero
    with pytest.raises(UnsupportedArchitecture, match=r"del module\.forward"):
        error(net)
    assert error(net, Mapped()) < 1e-12
    del module.forward
    assert error(net) < 1e-12


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wraps"])
@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm, nn.GELU, nn.Conv2d])
def test_forwards_replaced_on_a_class_of_torch(
    net: Net, kind: Any, wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = kind.forward

    def twice(self: nn.Module, x: Tensor) -> Tensor:
        return 2 * forward(self, x)

    home: dict[str, Any] = {"__name__": "acme.patches", "forward": forward}
    made = types.FunctionType(twice.__code__, home, "twice", None, twice.__closure__)
    monkeypatch.setattr(kind, "forward", functools.wraps(forward)(made) if wrapped else made)
    with pytest.raises(UnsupportedArchitecture, match=r"acme\.patches"):
        error(net)
    assert error(net, Mapped()) < 1e-12


@pytest.mark.parametrize("path", PATHS[1:])
@pytest.mark.parametrize("home", [Net.__module__, "acme.layers"])
def test_subclasses_in_any_slot(net: Net, path: str, home: str) -> None:
    """Also those of the user's own module, which the model's class comes from too."""
    module = net.get_submodule(path)
    own = type(module)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return own.forward(self, x) * 2

    forward.__qualname__ = "Acme.forward"
    module.__class__ = type("Acme", (own,), {"__module__": home, "forward": forward})
    asked = path in ("embed", "norm") or path.endswith(("norm1", "norm2", "act"))  # by the adapter
    beside = path == "layers" and home == Net.__module__  # known by its file, but for the forward
    problem = "not its class's own" if beside else "expected a" if asked else rf"reader\.expect\('{home}\.Acme'\)"
    with pytest.raises(UnsupportedArchitecture, match=rf"{home}\.Acme at '{path}'.*{problem}"):
        error(net)
    assert error(net, Mapped()) < 1e-12


def test_a_class_that_the_adapter_knows(net: Net) -> None:
    class Known(Plain):
        def spec(self, upstream: Reader) -> ModelSpec:
            upstream.head.expect("acme.layers.Dense")
            return super().spec(upstream)

    net.head.__class__ = type("Dense", (nn.Linear,), {"__module__": "acme.layers"})
    assert error(net, Known()) < 1e-12
    with pytest.raises(UnsupportedArchitecture, match=r"acme\.layers\.Dense"):
        error(net)


@pytest.mark.parametrize(
    "change",
    [
        nn.utils.weight_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.orthogonal,
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_computed(net: Net, change: Callable[..., Any]) -> None:
    change(net.layers[0].fc1)
    with pytest.raises((UnsupportedArchitecture, prisma.WeightMapError), match=r"layers\.0\.fc1"):
        error(net)


def moved(module: nn.Module, *args: Any) -> Any:
    return module._old_forward(*args)


moved.__module__ = "accelerate.hooks"


class AlignDevicesHook:
    pass


def accelerate(module: Any) -> None:
    module._old_forward, module._hf_hook = module.forward, AlignDevicesHook()
    module.forward = functools.update_wrapper(functools.partial(moved, module), module._old_forward)


def compiled_forward(module: Any) -> None:
    module.forward = torch.compile(module.forward, backend="eager")


def hook_that_is_removed(module: nn.Module) -> None:
    module.register_forward_hook(lambda *args: None).remove()


@pytest.mark.parametrize("path", ["", "layers.0", "layers.1.attn", "head"])
@pytest.mark.parametrize(
    "wrap", [accelerate, compiled_forward, hook_that_is_removed, lambda module: module.compile(backend="eager")]
)
def test_wrappers_that_change_no_number_pass(net: Net, path: str, wrap: Callable[[Any], None]) -> None:
    wrap(net.get_submodule(path))
    assert error(net) < 1e-12


def test_other_hooks_of_accelerate_are_refused(net: Net) -> None:
    accelerate(net.head)
    net.head._hf_hook = type("LayerwiseCastingHook", (), {})()  # type: ignore[assignment]
    with pytest.raises(UnsupportedArchitecture, match="'head'"):
        error(net)


def test_what_makes_no_number_may_do_what_it_likes(net: Net) -> None:
    net.unused.register_forward_hook(lambda *args: None)
    net.unused.__class__ = type("Acme", (nn.Linear,), {"__module__": "acme"})
    assert error(net) < 1e-12


# -------------------------------------------------------------------- the libraries' own models

CASES = {
    "timm": ["test_vit", "beit_base_patch16_224"],
    "hf": ["ViTForImageClassification", "BridgeTowerVisionModel"],
    "clip": ["ViT-B-32", "roberta-ViT-B-32/whole", "hf/CLIPModel", "hf/SiglipModel"],
    "dino": ["dinov2_swiglu", "meta_v2_giant", "dinov3"],
    "vivit": ["VivitForVideoClassification", "VideoMAEForVideoClassification", "VJEPA2Model"],
}


@pytest.mark.parametrize(("plugin", "name"), [(plugin, name) for plugin, names in CASES.items() for name in names])
def test_every_adapter_of_the_house(plugin: str, name: str) -> None:
    pytest.importorskip({"hf": "transformers", "clip": "open_clip", "vivit": "transformers"}.get(plugin, "timm"))
    upstream = next(case for case, _ in installed().cases({plugin}) if case.name == name).build()
    prisma.adapt(upstream)
    holders = [(path, module) for path, module in upstream.named_modules() if path and any(module.children())]
    holders = [(path, module) for path, module in holders if "forward" in vars(type(module))]
    assert len(holders) > 5
    for path, module in holders:
        if any(part in path for part in ("pooler", "mask", "predictor")):  # what the hooked model leaves out
            continue
        handle = module.register_forward_hook(lambda *args: None)
        with pytest.raises(UnsupportedArchitecture, match="forward hook"):
            prisma.adapt(upstream)
        handle.remove()
        own = type(module)
        module.__class__ = type(own.__name__, (own,), {"__module__": "acme"})
        with pytest.raises(UnsupportedArchitecture):
            prisma.adapt(upstream)
        module.__class__ = own
    prisma.adapt(upstream)


def test_an_attention_function_of_the_users() -> None:
    tr = pytest.importorskip("transformers")
    small = {
        "hidden_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "image_size": 64,
    }
    model = tr.ViTForImageClassification(tr.ViTConfig(**small)).eval()
    tr.AttentionInterface.register("cold", lambda module, q, k, v, mask, **how: (v.transpose(1, 2), None))
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        prisma.adapt(model)
    model.set_attn_implementation("cold")
    with pytest.raises(UnsupportedArchitecture, match=r"'cold'.*set_attn_implementation"):
        prisma.adapt(model)


def test_functions_that_are_of_no_module() -> None:
    """Such as code that was run from a text: its ``__module__`` is None, or that of another module's builtins."""
    tr = pytest.importorskip("transformers")
    space: dict[str, Any] = {}
    exec("def own(module, *args, **how):\n    return args[-1] * 2", space)
    own = space["own"]
    for home in (None, "", "transformers.utils.output_capturing", "torch"):
        own.__module__ = home
        net = drawn()
        handle = net.norm.register_forward_hook(own)
        with pytest.raises(UnsupportedArchitecture, match=r"'norm'.*forward hook"):
            prisma.adapt(net, adapter=Plain())
        handle.remove()
        handle = nn.modules.module.register_module_forward_hook(own)
        with pytest.raises(UnsupportedArchitecture, match="global forward hook"):
            prisma.adapt(net, adapter=Plain())
        handle.remove()
    tr.AttentionInterface.register("homeless", own)
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    model = tr.ViTModel(tr.ViTConfig(**small, image_size=32)).eval()
    model.set_attn_implementation("homeless")
    with pytest.raises(UnsupportedArchitecture, match="'homeless'"):
        prisma.adapt(model)


def test_a_hook_that_asks_for_gradients_changes_no_number() -> None:
    tr = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    model = tr.ViTForImageClassification(tr.ViTConfig(**sizes, image_size=64)).eval()
    model.enable_input_require_grads()
    assert any(module._forward_hooks for module in model.modules())
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(prisma.adapt(model)(image), model(image).logits)
