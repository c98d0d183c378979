"""What upstream computes by functions, wrappers, tables and tensors that stand where a library has its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch
from third_party import Attention, Mapped, Plain, drawn, image
from torch import Tensor, nn
from upstreams import case

import prisma_core as prisma
from prisma_core import UnsupportedArchitecture
from prisma_core.plugin import HookMap, Reader

PLACE = "layers.1"


class Everywhere(Mapped):
    def hooks(self, upstream: Reader, spec: Any) -> HookMap:
        return HookMap.parse("layers.1 -> blocks.1.hook_resid_post : batch pos d_model")


# -------------------------------------------------------------------- functions


@pytest.mark.parametrize("function", [lambda x: x * 0.5, torch.tanh, functools.partial(torch.mul, torch.tensor(2.0))])
def test_a_function_in_the_place_of_a_part_that_no_adapter_reads(function: Callable[[Tensor], Tensor]) -> None:
    """It is in no list of modules; the canonical form would leave out what it computes."""
    net, x = drawn(), image()
    plain = net(x)
    layer: Any = net.layers[1]
    del layer.drop
    layer.drop = function
    assert (net(x) - plain).abs().max() > 1e-3
    with pytest.raises(UnsupportedArchitecture, match=rf"'{PLACE}'.*a function drop \(.*Put a module in its place"):
        prisma.adapt(net, adapter=Plain())
    torch.testing.assert_close(prisma.adapt(net, adapter=Everywhere())(x), net(x))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"])
@pytest.mark.parametrize("part", ["drop_path1", "mlp.drop1", "attn.proj_drop", "norm1", "attn", "mlp"])
def test_functions_in_the_place_of_timm_s_parts(name: str, part: str) -> None:
    model = case("timm", name)
    prisma.adapt(model)
    path, _, last = f"blocks.1.{part}".rpartition(".")
    above = model.get_submodule(path)
    own = above.get_submodule(last)
    delattr(above, last)
    setattr(above, last, lambda *args, **options: own(*args, **options) * 2)
    with pytest.raises(UnsupportedArchitecture, match=rf"'{path}'.*a function {last} \(.*Put a module in its place"):
        prisma.adapt(model)


def test_a_function_that_the_constructor_alone_calls_passes() -> None:
    """torchvision's models hold ``norm_layer``, with which their parts were made."""
    net, x = drawn(), image()
    layer: Any = net.layers[1]
    layer.norm_layer = functools.partial(nn.LayerNorm, eps=1e-6)
    torch.testing.assert_close(prisma.adapt(net, adapter=Plain())(x), net(x))


def test_a_method_that_torch_compiles_on_an_instance_passes() -> None:
    net, x = drawn(), image()
    layer: Any = net.layers[1]
    layer.mixed = torch.compile(layer.mixed, backend="eager")
    torch.testing.assert_close(prisma.adapt(net, adapter=Plain())(x), net(x))


@pytest.mark.parametrize("wrap", [torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.inference_mode()])
@pytest.mark.parametrize("kind", [Attention, nn.LayerNorm])
def test_torch_s_own_wrappers_around_a_library_s_method(
    wrap: Callable[[Any], Any], kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They change gradients, or dtypes."""
    monkeypatch.setattr(kind, "forward", wrap(vars(kind)["forward"]))
    with pytest.raises(UnsupportedArchitecture, match=r"a forward with a wrapper \(torch\..*Put back the library's"):
        prisma.adapt(drawn(), adapter=Plain())


def test_a_wrapper_of_compilation_around_a_library_s_method_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attention, "forward", torch.compiler.disable(Attention.forward))
    net, x = drawn(), image()
    torch.testing.assert_close(prisma.adapt(net, adapter=Plain())(x), net(x))


def test_a_class_that_says_it_is_of_the_library_s_file() -> None:
    model = case("timm", "vit_tiny_patch16_224")
    attn = model.blocks[1].attn
    text = "class Attention(Library):\n    def forward(self, *args):\n        return Library.forward(self, *args) * 2\n"
    names: dict[str, Any] = {"Library": type(attn), "__name__": type(attn).__module__}
    exec(text, names)
    attn.__class__ = names["Attention"]
    with pytest.raises(UnsupportedArchitecture, match=r"'blocks\.1\.attn'.*other code than its file has"):
        prisma.adapt(model)


@pytest.mark.parametrize("name", ["softmax", "matmul", "__matmul__", "__add__", "transpose"])
@pytest.mark.parametrize("adapter", [Plain(), Everywhere()], ids=["canonical", "hooked upstream"])
def test_methods_of_tensors_that_are_not_torch_s(name: str, adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = getattr(Tensor, name)

    def changed(self: Tensor, *args: Any) -> Tensor:
        return own(self, *args)

    there = {**globals(), "__name__": "acme.patches"}
    net = drawn()
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, name, FunctionType(changed.__code__, there, "changed", None, changed.__closure__))
        with pytest.raises(UnsupportedArchitecture, match=rf"acme.patches.*in the place of torch.Tensor.{name}"):
            prisma.adapt(net, adapter=adapter)
    prisma.adapt(net, adapter=adapter)


def test_another_way_to_print_tensors_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def text(self: Tensor) -> str:
        return "a tensor"

    there = {**globals(), "__name__": "acme.patches"}
    monkeypatch.setattr(Tensor, "__repr__", FunctionType(text.__code__, there, "text"))
    prisma.adapt(drawn(), adapter=Plain())


# -------------------------------------------------------------------- tensors


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("copy", [True, False])
def test_hooks_of_a_weight_s_gradient(register: str, copy: bool) -> None:
    """A canonical form refuses them, a hooked upstream keeps them."""
    net, x = drawn(), image()
    layer: Any = net.layers[1]

    def masked(value: Tensor) -> Tensor | None:
        if register == "register_hook":
            return value * 0
        assert value.grad is not None
        value.grad.zero_()
        return None

    getattr(layer.fc1.weight, register)(masked)
    with pytest.raises(UnsupportedArchitecture, match=rf"'{PLACE}.fc1'.*hook of the gradient of weight.*handle.remove"):
        prisma.adapt(net, adapter=Plain(), copy=copy)
    model: Any = prisma.adapt(net, adapter=Everywhere(), copy=copy)
    model(x).square().sum().backward()
    assert not model.upstream.layers[1].fc1.weight.grad.any()
    assert model.upstream.layers[0].fc1.weight.grad.any()


# -------------------------------------------------------------------- facts beside tensors


def test_a_grid_of_positions_is_that_of_the_tensor() -> None:
    model = case("timm", "naflexvit_base_patch16_gap")
    x = prisma.adapt(model).sample_inputs(2)
    rows, columns = model.embeds.pos_embed_grid_size
    model.embeds.pos_embed_grid_size = (columns, rows)  # which upstream's forward does not read
    torch.testing.assert_close(prisma.adapt(model)(*x), model(*x), rtol=1e-4, atol=1e-5)


def test_frequencies_that_another_grid_would_not_have() -> None:
    model = case("timm", "qwen3_vit_88m")
    model.encoder.rope.rotate_half ^= True
    with pytest.raises(UnsupportedArchitecture, match=r"'encoder\.rope'.*frequencies of its own"):
        prisma.adapt(model)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("vit_relpos_medium_patch16_224", lambda model: setattr(model.blocks[1].attn.rel_pos, "bias_gain", 0.5)),
        ("eva02_tiny_patch14_224", lambda model: setattr(model.blocks[1].attn, "rotate_half", True)),
    ],
)
def test_a_layer_that_differs_is_named(name: str, change: Callable[[Any], None]) -> None:
    model = case("timm", name)
    change(model)
    with pytest.raises(UnsupportedArchitecture, match=r"at 'blocks\.1\.attn"):
        prisma.adapt(model)
