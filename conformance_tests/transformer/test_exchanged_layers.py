"""What is computed beside a module, from its weights or for some tokens, is right whatever stands in its place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import build
from prisma_lens import attribute
from prisma_patch import activation_patch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from prisma_core import HookedViT, NotApplicable


class Lora(nn.Module):
    """A layer with more than its weight, which it shows all the same."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias
        self.more = nn.Parameter(torch.randn_like(layer.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.more.T


def lora(attn: Any, name: str) -> None:
    setattr(attn, name, Lora(getattr(attn, name)))


def rounded(attn: Any, name: str) -> None:
    layer = getattr(attn, name)
    layer.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    setattr(attn, name, torch.ao.nn.qat.Linear.from_float(layer.train()).eval())


def hooked(attn: Any, name: str) -> None:
    getattr(attn, name).register_forward_hook(lambda layer, inputs, output: 2 * output)


def own_forward(attn: Any, name: str) -> None:
    layer = getattr(attn, name)
    own = layer.forward
    layer.forward = lambda x: 2 * own(x)


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


MORE = [lora, rounded, hooked, own_forward]
NO_MORE: list[Callable[[Any, str], Any]] = [
    lambda attn, name: parametrize.register_parametrization(getattr(attn, name), "weight", Half()),
    lambda attn, name: prune.l1_unstructured(getattr(attn, name), "weight", 0.5),
    lambda attn, name: None,
]


@pytest.fixture
def model() -> HookedViT:
    return build(registers=1)


@pytest.fixture
def image(model: HookedViT) -> Tensor:
    return model.sample_inputs(2, generator=torch.Generator().manual_seed(3))[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("change", MORE)
@pytest.mark.parametrize(("layer", "names"), [("out", ["result"]), ("qkv", ["q_input", "k_input", "v_input"])])
def test_what_more_than_weights_computes_is_not_computed_from_weights(
    model: HookedViT, image: Tensor, change: Callable[[Any, str], None], layer: str, names: list[str]
) -> None:
    change(model.blocks[1].attn, layer)
    plain = model(image)
    for name in names:
        with pytest.raises(NotApplicable, match=rf"from the weights of {layer} alone.*computes more"):
            model.run_with_cache(image, names=(name, 1))
        torch.testing.assert_close(model.run_with_cache(image, names=(name, 0))[0], plain)
    torch.testing.assert_close(model(image), plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("change", MORE)
def test_a_compiled_model_sees_it_too(model: HookedViT, image: Tensor, change: Callable[[Any, str], None]) -> None:
    change(model.blocks[1].attn, "out")
    compiled = torch.compile(model, backend="eager")
    edited = model.hooks({"blocks.1.attn.hook_result": lambda result, context: result})
    with edited, pytest.raises(NotApplicable, match="from the weights of out alone"):
        compiled(image)
    torch.testing.assert_close(compiled(image), model(image))


@pytest.mark.parametrize("change", NO_MORE)
def test_a_layer_that_is_its_weights_alone(model: HookedViT, image: Tensor, change: Callable[[Any, str], None]) -> None:
    for layer in ("out", "qkv"):
        change(model.blocks[0].attn, layer)
    plain = model(image)
    for name in ("result", "q_input", "k_input", "v_input"):
        torch.testing.assert_close(model.run_with_cache(image, names=name)[0], plain)


class Tanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


@pytest.mark.parametrize("norm", [Tanh(), nn.LayerNorm(18), nn.Identity()])
def test_heads_read_what_stands_in_the_place_of_the_norm(model: HookedViT, image: Tensor, norm: nn.Module) -> None:
    model.blocks[0].ln1 = norm
    plain = model(image)
    for name in ("q_input", "k_input", "v_input"):
        torch.testing.assert_close(model.run_with_cache(image, names=name)[0], plain)


class Mixing(nn.Module):
    """A part that brings tokens together, as no MLP does."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + x.mean(1, keepdim=True)


def exchanged(model: Any, layer: int) -> None:
    model.blocks[layer].mlp = Mixing(model.blocks[layer].mlp)


def torch_hook(model: Any, layer: int) -> None:
    model.blocks[layer].mlp.register_forward_hook(lambda part, inputs, output: output + output.mean(1, keepdim=True))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("change", [exchanged, torch_hook])
def test_sweeps_of_a_model_whose_parts_bring_tokens_together(
    model: HookedViT, image: Tensor, change: Callable[[Any, int], None], layer: int
) -> None:
    model, image = model.double(), image.double()
    before, other = copy.deepcopy(model), image.flip(0) * 2
    change(model, layer)
    stream = model.run_with_cache(other)[1]["resid_pre", 1]
    made = activation_patch(model, image, other, 0, at=("resid_pre", 1), over="layer pos")
    for pos in range(stream.shape[1]):

        def put(x: Tensor, at: object, pos: int = pos) -> None:
            x[:, pos] = stream[:, pos]

        effect = (model.run_with_hooks(image, hooks={("resid_pre", 1): put}) - model(image))[:, 0]
        torch.testing.assert_close(made.values[0, pos], effect, rtol=1e-9, atol=1e-9)
    assert (model(image) - before(image)).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_layers_have_no_weights_to_show(model: HookedViT, image: Tensor) -> None:
    quantised: Any = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    plain = quantised(image)
    _, cache = quantised.run_with_cache(image)
    attn, mlp = quantised.blocks[0].attn, quantised.blocks[0].mlp
    for part, names in ((attn, "W_Q W_K W_V W_O b_Q b_K b_V b_O"), (mlp, "W_in W_out b_in b_out")):
        for name in names.split():
            with pytest.raises(NotApplicable, match=r"quantized\.dynamic.*packs its (weight|bias).*made of"):
                getattr(part, name)
    for by in ("head", "neuron", "source"):
        with pytest.raises(NotApplicable, match="packs its weight"):
            attribute(quantised, cache, 0, by=by)
    torch.testing.assert_close(quantised(image), plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_sweep_of_a_quantised_model_computes_all_tokens(model: HookedViT, image: Tensor) -> None:
    """Ranges follow what a layer is given: of some tokens they would be others."""
    quantised: Any = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    image, other = image[:1], image[1:]
    stream = quantised.run_with_cache(other)[1]["resid_pre", 1]
    made = activation_patch(quantised, image, other, 0, at=("resid_pre", 1), over="layer pos", batch_size=1)
    for pos in range(stream.shape[1]):

        def put(x: Tensor, at: object, pos: int = pos) -> None:
            x[:, pos] = stream[:, pos]

        effect = (quantised.run_with_hooks(image, hooks={("resid_pre", 1): put}) - quantised(image))[:, 0]
        torch.testing.assert_close(made.values[0, pos], effect)
