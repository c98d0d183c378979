"""The last layers, the linear classifiers and the projection head, each against Meta's formula written out here."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import prisma_dino
import pytest
import torch
from prisma_conformance.randomise import randomise
from prisma_dino.meta import Architecture, MetaViT
from prisma_dino.meta_cases import SECOND, SMALL, THIRD, build
from torch import Tensor, nn

import prisma_core as prisma
from prisma_core import HookedViT, InputError
from prisma_core.errors import LoadError

WIDTH = SMALL["width"]


@pytest.fixture(params=["v1", "v2_registers", "v3"])
def pair(request: pytest.FixtureRequest) -> tuple[MetaViT, HookedViT]:
    given: dict[str, Any] = {"v1": {}, "v2_registers": {**SECOND, "registers": 2}, "v3": THIRD}[request.param]
    upstream = build(Architecture(**{**SMALL, **given, "depth": 4}))
    randomise(upstream, torch.Generator().manual_seed(0))
    upstream = upstream.double()
    return upstream, prisma.adapt(upstream)


def streams(upstream: MetaViT, image: Tensor) -> list[Tensor]:
    """Return what each of upstream's blocks returns."""
    found: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *given: found.append(given[2])) for block in upstream.blocks]
    upstream(image)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("n", [1, 3, [0, 2], [-1]])
@pytest.mark.parametrize("norm", [True, False])
def test_the_last_layers_are_upstreams(pair: tuple[MetaViT, HookedViT], n: Any, norm: bool) -> None:
    upstream, model = pair
    image = torch.randn(2, 3, 16, 12, dtype=torch.float64)
    every = streams(upstream, image)
    wanted = every[-n:] if isinstance(n, int) else [every[layer] for layer in n]
    found = prisma_dino.last_layers(model, image, n, norm=norm)
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, upstream.norm(theirs) if norm else theirs, rtol=1e-10, atol=1e-10)


def test_gradients_flow_through_the_last_layers(pair: tuple[MetaViT, HookedViT]) -> None:
    _, model = pair
    image = torch.randn(1, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    sum(layer.square().sum() for layer in prisma_dino.last_layers(model, image, 2)).backward()
    assert image.grad is not None
    assert float(image.grad.abs().max()) > 0


@pytest.mark.parametrize(
    ("n", "told"), [(0, "at least 1"), (5, "4 blocks"), (1 << 24, "4 blocks"), ([4], "4 blocks"), ([], "at least 1")]
)
def test_layers_that_are_not_there_are_refused(pair: tuple[MetaViT, HookedViT], n: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        prisma_dino.last_layers(pair[1], torch.randn(1, 3, 12, 12, dtype=torch.float64), n)


def test_layers_by_another_name_or_of_another_model_are_refused(pair: tuple[MetaViT, HookedViT]) -> None:
    image = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    for n in ("x", 1.5, ["a"], None):
        with pytest.raises(InputError, match=r"n(\[0\])?= to be a"):
            prisma_dino.last_layers(pair[1], image, n)
    with pytest.raises(InputError, match=r"model= to be a model, .*got a value of type MetaViT"):
        prisma_dino.last_layers(pair[0], image)


@pytest.mark.parametrize("how", ["lin4", "lin4_without_mean", "lin1", "first_base"])
def test_linear_classifiers_read_what_metas_do(pair: tuple[MetaViT, HookedViT], how: str, tmp_path: Path) -> None:
    upstream, model = pair
    image = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    normed = [upstream.norm(x) for x in streams(upstream, image)]
    prefix = model.spec.layout.n_prefix
    cls, mean = [x[:, 0] for x in normed], normed[-1][:, prefix:].mean(1)
    wanted, given = {
        "lin4": (torch.cat([*cls, mean], 1), {"n": 4}),
        "lin4_without_mean": (torch.cat(cls, 1), {"n": 4, "avg": False}),
        "lin1": (torch.cat([cls[-1], mean], 1), {}),
        "first_base": (torch.cat([cls[-1][..., None], mean[..., None]], -1).reshape(2, -1), {"interleaved": True}),
    }[how]
    weight, bias = torch.randn(7, wanted.shape[1]), torch.randn(7)
    if how in ("lin4_without_mean", "first_base"):  # the first DINO's files
        own = {"module.linear.weight": weight, "module.linear.bias": bias}
        torch.save({"epoch": 1, "state_dict": own}, tmp_path / "l")
    else:
        torch.save({"weight": weight, "bias": bias}, tmp_path / "l")
    head = prisma_dino.load_linear_head(tmp_path / "l").double()
    found = head(prisma_dino.linear_input(model, image, **given))
    torch.testing.assert_close(found, wanted @ weight.double().T + bias.double(), rtol=1e-9, atol=1e-9)


def test_an_order_that_pairs_nothing_is_refused(pair: tuple[MetaViT, HookedViT]) -> None:
    image = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    with pytest.raises(InputError, match="got n=4, avg=True"):
        prisma_dino.linear_input(pair[1], image, 4, interleaved=True)


# -------------------------------------------------------------------- the projection of training


def projection(batch_norm: bool, depth: int = 3) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(depth):
        layers.append(nn.Linear(WIDTH if index == 0 else 20, 20 if index < depth - 1 else 8))
        if index < depth - 1:
            layers += [nn.BatchNorm1d(20)] if batch_norm else []
            layers.append(nn.GELU())
    mlp = nn.Sequential(*layers).eval()
    for name, tensor in [*mlp.named_parameters(), *mlp.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape) + 0.5 if name.endswith("var") else torch.randn(tensor.shape)
    return mlp


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("last", ["weight_norm", "parametrized", "plain"])
@pytest.mark.parametrize("prefix", ["head", "dino_head"])
def test_the_projection_head_is_metas(batch_norm: bool, last: str, prefix: str, tmp_path: Path) -> None:
    mlp, linear = projection(batch_norm), nn.Linear(8, 30, bias=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises against the form that Meta's files have
        how = {"weight_norm": nn.utils.weight_norm, "parametrized": nn.utils.parametrizations.weight_norm}
        linear = how.get(last, lambda layer: layer)(linear)
    for parameter in linear.parameters():
        parameter.data = torch.randn(parameter.shape)
    head = {f"mlp.{name}": x for name, x in mlp.state_dict().items()}
    head |= {f"last_layer.{name}": x for name, x in linear.state_dict().items()}
    torch.save({"teacher": {f"{prefix}.{name}": x for name, x in head.items()}, "epoch": 1}, tmp_path / "ck.pth")
    loaded = prisma_dino.load_head(tmp_path / "ck.pth").double()
    x = torch.randn(3, WIDTH).double()
    hidden = mlp.double()(x)
    wanted = linear.double()(hidden / hidden.norm(dim=-1, keepdim=True))
    # Unit prototypes are computed in the file's float32.
    torch.testing.assert_close(loaded(x), wanted, rtol=1e-5, atol=1e-5)


def test_a_head_of_one_layer_and_one_asked_for_by_name(tmp_path: Path) -> None:
    weight, prototypes = torch.randn(8, WIDTH), torch.randn(30, 8)
    one = {"ibot_head.mlp.weight": weight, "ibot_head.last_layer.weight": prototypes}
    torch.save({**one, "dino_head.mlp.weight": torch.zeros(8, 3)}, tmp_path / "ck.pth")
    loaded, x = prisma_dino.load_head(tmp_path / "ck.pth", name="ibot_head"), torch.randn(2, WIDTH)
    hidden = x @ weight.T
    torch.testing.assert_close(loaded(x), hidden / hidden.norm(dim=-1, keepdim=True) @ prototypes.T)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blocks.0.norm1.weight": torch.zeros(2)}, "no projection head"),
        ({"head.mlp.0.weight": torch.zeros(8, 3)}, "expected a last layer"),
        ({"head.last_layer.weight": torch.zeros(8, 3)}, "no MLP"),
        ({"head.last_layer.weight": torch.zeros(8, 3), "head.mlp.0.weight": torch.zeros(4, 3)}, "do not fit"),
        ({"head.last_layer.weight": torch.zeros(8, 3), "head.norm.weight": torch.zeros(4)}, "neither of its MLP"),
        ({"head.last_layer.weight": torch.zeros(8, 3), "head.mlp.0.weight": torch.zeros(4)}, "neither a linear layer"),
    ],
)
def test_what_is_no_projection_head_is_refused(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "ck.pth")
    with pytest.raises(LoadError, match=message):
        prisma_dino.load_head(tmp_path / "ck.pth")


def test_what_is_no_linear_classifier_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3, 4), "scale": torch.zeros(3)}, tmp_path / "l.pth")
    with pytest.raises(LoadError, match="got weight, scale"):
        prisma_dino.load_linear_head(tmp_path / "l.pth")
