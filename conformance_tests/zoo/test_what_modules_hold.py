"""What a module holds that is no part and no tensor, or that it does not tell; both for every form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from third_party import Mapped, Plain, drawn, image
from torch import Tensor, nn
from upstreams import case

import prisma_core as prisma
from prisma_core import UnsupportedArchitecture

FORMS = pytest.mark.parametrize("adapter", [Plain(), Mapped()], ids=["canonical", "hooked upstream"])


def a_function(net: Any) -> None:
    net.layers[1]._modules["drop"] = torch.tanh


def a_number(net: Any) -> None:
    net.layers[1].norm1._parameters["bias"] = 0.5


def an_array(net: Any) -> None:
    net.layers[1].norm1._buffers["mean"] = net.layers[1].norm1.bias.tolist()


def itself(net: Any) -> None:
    net.layers[1].owner = net


HELD: dict[str, tuple[Callable[[Any], None], str]] = {
    "a function": (a_function, r"'layers\.1'.*a builtin_function.* as drop among its modules"),
    "a number": (a_number, r"'layers\.1\.norm1'.*a float as bias among its parameters"),
    "an array": (an_array, r"'layers\.1\.norm1'.*a list as mean among its buffers"),
    "itself": (itself, r"'layers\.1'.*a part owner that holds this module itself"),
}


@FORMS
@pytest.mark.parametrize("kind", HELD)
def test_what_is_no_part_and_no_tensor(kind: str, adapter: Any) -> None:
    net, (change, words) = drawn(), HELD[kind]
    change(net)
    with pytest.raises(UnsupportedArchitecture, match=words):
        prisma.adapt(net, adapter=adapter)


class Doubling(dict[str, Any]):
    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(name) * 2 if name == "weight" else super().__getitem__(name)

    def values(self) -> Any:
        return [nn.Sequential(value) for value in super().values()]


@FORMS
@pytest.mark.parametrize(("path", "place"), [("layers.1.fc1", "_parameters"), ("layers", "_modules")])
def test_parts_and_parameters_in_a_dictionary_of_another_class(path: str, place: str, adapter: Any) -> None:
    net: Any = drawn()
    module = net.get_submodule(path)
    setattr(module, place, Doubling(vars(module)[place]))
    with pytest.raises(UnsupportedArchitecture, match=rf"'{path}'.*its {place} in a .*Doubling"):
        prisma.adapt(net, adapter=adapter)


@FORMS
def test_an_attribute_of_a_class_in_the_place_of_a_part(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net: Any = drawn()
    monkeypatch.setattr(type(net.layers[1]), "drop", property(lambda block: lambda x: x * 2), raising=False)
    with pytest.raises(UnsupportedArchitecture, match=r"'layers\.0'.*an attribute drop of its class"):
        prisma.adapt(net, adapter=adapter)


@FORMS
@pytest.mark.parametrize("path", ["", "layers.1"])
@pytest.mark.parametrize("walk", ["named_modules", "named_parameters", "children"])
def test_a_module_that_does_not_say_what_it_holds(walk: str, path: str, adapter: Any) -> None:
    """Hooks inside would go unseen, and biases would be taken for none."""
    net: Any = drawn()
    net.layers[1].fc1.register_forward_hook(lambda module, args, result: result * 2)
    setattr(net.get_submodule(path), walk, lambda *args, **options: iter(()))
    with pytest.raises(UnsupportedArchitecture, match=rf"a {walk} of this instance's own.*del module\.{walk}"):
        prisma.adapt(net, adapter=adapter)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("plugin", "name"), [("hf", "ViTModel"), ("clip", "hf/CLIPVisionModel")])
def test_a_model_that_computes_activations_again_passes(plugin: str, name: str, reentrant: bool) -> None:
    upstream = case(plugin, name)
    expected = prisma.adapt(upstream)
    upstream.gradient_checkpointing_enable({"use_reentrant": reentrant})
    (x,) = expected.sample_inputs(2)
    assert torch.equal(prisma.adapt(upstream)(x), expected(x))


def test_a_function_that_only_holds_torch_s_checkpointing_is_a_user_s() -> None:
    net, x = drawn(), image()
    layer: Any = net.layers[1]
    checkpoint = torch.utils.checkpoint.checkpoint

    def drop(values: Tensor) -> Tensor:
        return checkpoint(nn.functional.tanh, values, use_reentrant=False)

    del layer.drop
    layer.drop = drop
    assert net(x).isfinite().all()
    with pytest.raises(UnsupportedArchitecture, match=r"a function drop \("):
        prisma.adapt(net, adapter=Plain())
