"""What computes in the place of torch's or a library's own functions and is no function: objects, modules, tensors."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any
from unittest import mock

import pytest
import third_party
import torch
import torch.nn.functional as F
from third_party import Mapped, Plain, drawn, image
from torch import Tensor, nn
from upstreams import case

import prisma_core as prisma
from prisma_core import UnsupportedArchitecture


def refused(words: str, net: nn.Module | None = None) -> None:
    with pytest.raises(UnsupportedArchitecture, match=words):
        prisma.adapt(drawn() if net is None else net, adapter=Plain())


# -------------------------------------------------------------------- objects


class Doubled:
    """What a user may set where there was a function."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.function(*args, **options) * 2


KINDS: dict[str, Callable[[Any], Any]] = {
    "an object": Doubled,
    "a partial": lambda function: functools.partial(Doubled(function)),
    "a mock": lambda function: mock.MagicMock(side_effect=Doubled(function)),
    "a function of torch's of another name": lambda function: torch.relu,
}
PLACES = {
    "the library's own": (third_party, "residual"),
    "of torch, that a part of torch's calls": (F, "linear"),
    "of torch, that Prisma calls": (torch, "cat"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", PLACES)
def test_objects_in_the_place_of_functions(where: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home, name = PLACES[where]
    x = image()
    with monkeypatch.context() as patch:
        patch.setattr(home, name, KINDS[kind](getattr(home, name)))
        refused(rf"in the place of {home.__name__}\.{name}")
    assert torch.allclose(prisma.adapt(drawn(), adapter=Plain())(x), drawn()(x))


class Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return Doubled(F.linear) if name == "linear" else getattr(F, name)


def test_a_module_of_the_user_s_in_the_place_of_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.modules.linear, "F", Module(F.__name__))
    refused(r"'layers\.0\.attn\.qkv'.*in the place of torch\.nn\.modules\.linear\.F")


def test_another_function_of_the_library_s_under_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(third_party, "residual", third_party.image)
    refused(r"third_party\.image in the place of third_party\.residual")


@pytest.mark.parametrize("name", ["__iter__", "__getitem__", "__len__"])
def test_items_of_containers_in_another_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = getattr(nn.ModuleList, name)

    def changed(self: Any, *args: Any) -> Any:
        return own(self, *args)

    there = {**globals(), "__name__": "acme.patches"}
    patched = FunctionType(changed.__code__, there, name, None, changed.__closure__)
    monkeypatch.setattr(nn.ModuleList, name, patched)
    refused(rf"'layers'.*a {name} that is not its class's own \(acme\.patches")


class Descriptor:
    def __get__(self, instance: Tensor, owner: type) -> Any:
        return lambda *args: torch.matmul(instance, *args) * 2


METHODS = {
    "a partial method": ("matmul", functools.partialmethod(Doubled(torch.matmul))),
    "a descriptor": ("matmul", Descriptor()),
    "how functions see tensors": ("__torch_function__", classmethod(Doubled(operator.call))),
}


@pytest.mark.parametrize("kind", METHODS)
def test_methods_of_tensors_that_are_no_functions(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, (name, value) = drawn(), METHODS[kind]
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, name, value)
        with pytest.raises(UnsupportedArchitecture, match=rf"in the place of torch\.Tensor\.{name}"):
            prisma.adapt(net, adapter=Mapped())


# -------------------------------------------------------------------- wrappers and parts


@pytest.mark.parametrize("wrap", [torch.no_grad(), torch.inference_mode()])
@pytest.mark.parametrize("part", ["", "layers.1"])
def test_torch_s_wrappers_around_methods_that_a_library_wraps_itself(
    part: str, wrap: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = case("hf", "ViTModel")
    kind = type(model.get_submodule(part))
    prisma.adapt(model)
    monkeypatch.setattr(kind, "forward", wrap(vars(kind)["forward"]))
    with pytest.raises(UnsupportedArchitecture, match=r"a forward with a wrapper \(torch\..*Put back the library's"):
        prisma.adapt(model)


@pytest.mark.parametrize(("name", "part"), [("Tipsv2VisionModel", "drop_path"), ("InternVLVisionModel", "dropout")])
def test_a_function_for_a_part_of_a_class_whose_forward_is_wrapped(name: str, part: str) -> None:
    model = case("hf", name)
    layer = model.encoder.layer[1]
    delattr(layer, part)
    setattr(layer, part, Doubled(lambda x: x))
    with pytest.raises(UnsupportedArchitecture, match=rf"'encoder\.layer\.1'.*a function {part} \("):
        prisma.adapt(model)


# -------------------------------------------------------------------- tensors


@pytest.mark.parametrize(("path", "name"), [("ln_1", "weight"), ("ln_2", "bias"), ("attn", "in_proj_bias")])
def test_a_tensor_that_is_no_parameter_in_the_place_of_one(path: str, name: str) -> None:
    """A norm without weights is one whose weights are ones: these would be left out."""
    model = case("clip", "ViT-B-16")
    part = model.visual.transformer.resblocks[1].get_submodule(path)
    value = getattr(part, name).detach() * 1.5 + 0.1
    delattr(part, name)
    setattr(part, name, value)
    with pytest.raises(UnsupportedArchitecture, match=rf"resblocks\.1\.{path}'.*a tensor {name} in no state dict"):
        prisma.adapt(model)


def test_a_tensor_that_no_code_of_the_class_reads_passes() -> None:
    net, x = drawn(), image()
    layer: Any = net.layers[1]
    layer.seen = torch.ones(3)
    torch.testing.assert_close(prisma.adapt(net, adapter=Plain())(x), net(x))


@pytest.mark.parametrize("name", ["Idefics3VisionTransformer", "Idefics2VisionTransformer"])
def test_a_bias_that_is_a_buffer_where_an_adapter_runs_a_part(name: str) -> None:
    """Its copy has tensors without values, of which none may be left as memory was."""
    model = case("hf", name).double()
    patch = model.embeddings.patch_embedding
    value = torch.full_like(patch.bias, 5.0)
    del patch.bias
    patch.register_buffer("bias", value)
    torch.use_deterministic_algorithms(True)  # memory that was not written to holds NaN
    try:
        hooked: Any = prisma.adapt(model)
    finally:
        torch.use_deterministic_algorithms(False)
    (x,) = hooked.sample_inputs(2)
    x = x.double()
    torch.testing.assert_close(hooked(x), model(x).last_hidden_state, rtol=1e-9, atol=1e-10)
