"""Published toys: files of the project's forms compute what its formula says, from disk and from the hub."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback import Hub
from prisma_conformance.pytest import suite
from prisma_toy.cases import shapes
from torch import Tensor
from torch.nn import functional

import prisma_core as prisma
from prisma_core import HookedViT, InputError, LoadError, UnknownName

test_conformance = suite("toy")


def tensors(**kind: bool) -> dict[str, Tensor]:
    """A file's tensors, drawn."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(max(shape))
        for name, shape in shapes(**kind).items()
    }


def older(*, mlp: bool = True, heads: int = 3, width: int = 12, layers: int = 2) -> dict[str, Tensor]:
    """The tensors of a file from before the models were hooked."""
    made = {
        "cls_token": (1, 1, width),
        "position_embedding": (1, 10, width),
        "patch_embedding.proj.weight": (width, 1, 8, 8),
        "head.weight": (5, width),
        "head.bias": (5,),
    }
    for layer in range(layers):
        block = f"blocks.{layer}"
        made |= {f"{block}.attention.qkv.weight": (3 * width, width), f"{block}.attention.proj.weight": (width, width)}
        made |= {f"{block}.attention.proj.bias": (width,)}
        if mlp:
            made |= {f"{block}.mlp.fc1.weight": (20, width), f"{block}.mlp.fc1.bias": (20,)}
            made |= {f"{block}.mlp.fc2.weight": (width, 20), f"{block}.mlp.fc2.bias": (width,)}
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(max(shape))
        for name, shape in made.items()
    }


def written(path: Path, state: dict[str, Tensor]) -> Path:
    """A checkpoint as the project's trainer writes it."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    torch.save({"model_state_dict": state, "optimizer_state_dict": optimizer.state_dict(), "epoch": 3}, path)
    return path


def patches(image: Tensor, weight: Tensor) -> Tensor:
    cut = functional.unfold(image, weight.shape[-1], stride=weight.shape[-1])
    return torch.einsum("bip,di->bpd", cut, weight.flatten(1))


def by_hand(state: dict[str, Tensor], image: Tensor, *, token: bool = True, act: Any = functional.gelu) -> Tensor:
    """The project's formula without norms, head by head."""
    x = patches(image, state["embed.proj.weight"]) + state["embed.proj.bias"]
    if token:
        x = torch.cat([state["cls_token"].expand(len(x), 1, -1), x], dim=1)
    x = x + state["pos_embed.W_pos"]
    for block in [f"blocks.{layer}" for layer in range(2)]:
        attended = state[f"{block}.attn.b_O"].clone()
        for head in range(3):
            q, k, v = (x @ state[f"{block}.attn.W_{p}"][head] + state[f"{block}.attn.b_{p}"][head] for p in "QKV")
            pattern = functional.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
            attended = attended + pattern @ v @ state[f"{block}.attn.W_O"][head]
        x = x + attended
        if f"{block}.mlp.W_in" in state:
            hidden = act(x @ state[f"{block}.mlp.W_in"] + state[f"{block}.mlp.b_in"])
            x = x + hidden @ state[f"{block}.mlp.W_out"] + state[f"{block}.mlp.b_out"]
    pooled = x[:, 0] if token else x.mean(dim=1)
    return pooled @ state["head.W_H"] + state["head.b_H"]


def older_by_hand(state: dict[str, Tensor], image: Tensor, heads: int) -> Tensor:
    x = patches(image, state["patch_embedding.proj.weight"])
    x = torch.cat([state["cls_token"].expand(len(x), 1, -1), x], dim=1) + state["position_embedding"]
    for block in [f"blocks.{layer}" for layer in range(2)]:
        batch, tokens, width = x.shape
        joined = x @ state[f"{block}.attention.qkv.weight"].T
        q, k, v = joined.reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        mixed = functional.softmax(q * (width // heads) ** -0.5 @ k.mT, dim=-1) @ v
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, width)
        x = x + functional.linear(mixed, state[f"{block}.attention.proj.weight"], state[f"{block}.attention.proj.bias"])
        if f"{block}.mlp.fc1.weight" in state:
            hidden = functional.linear(x, state[f"{block}.mlp.fc1.weight"], state[f"{block}.mlp.fc1.bias"])
            x = x + functional.linear(
                functional.gelu(hidden), state[f"{block}.mlp.fc2.weight"], state[f"{block}.mlp.fc2.bias"]
            )
    return functional.linear(x[:, 0], state["head.weight"], state["head.bias"])


def images(channels: int, side: int) -> Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("mlp", [True, False])
@pytest.mark.parametrize("token", [True, False])
def test_a_file_computes_the_published_formula(mlp: bool, token: bool, tmp_path: Path) -> None:
    state = tensors(mlp=mlp, token=token)
    model = prisma.load(f"toy:{written(tmp_path / 'model_120.pth', state)}")
    assert isinstance(model, HookedViT)
    image = images(2, 12)
    assert torch.allclose(model(image), by_hand(state, image, token=token), rtol=0, atol=1e-12)
    spec = model.spec
    assert (spec.image_size, spec.embed.patch, spec.d_model, spec.n_classes) == ((12, 12), (4, 4), 12, 7)
    assert (spec.blocks[0].attn.n_heads, spec.blocks[0].attn.d_head) == (3, 5)
    assert all(block.ln1 is None and (block.mlp is not None) == mlp for block in spec.blocks)
    assert not model.preprocess
    with pytest.raises(InputError, match=r"Set model.preprocess = .*mean=, std="):
        model.preprocess(torch.rand(20, 20))
    back = prisma.export(model)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    assert back.keys() == state.keys()


def test_options_say_what_the_tensors_do_not(tmp_path: Path) -> None:
    state = tensors()
    path, image = written(tmp_path / "model.pth", state), images(2, 12)
    relu = prisma.load(f"toy:{path}", act="relu", mean=(0.1, 0.2), std=(0.5, 0.6))
    assert isinstance(relu, HookedViT)
    assert torch.allclose(relu(image), by_hand(state, image, act=functional.relu), rtol=0, atol=1e-12)
    assert relu.preprocess is not None
    assert (relu.preprocess.size, relu.preprocess.mean) == ((12, 12), (0.1, 0.2))
    mean = prisma.load(f"toy:{path}", pool="avg", centred=True, eps=1e-3)
    assert isinstance(mean, HookedViT)
    assert (mean.spec.pool.kind, mean.spec.pool.with_prefix) == ("avg", True)
    assert mean.spec.blocks[1].ln2 is not None
    assert mean.spec.blocks[1].ln2.eps == 1e-3
    drawn = prisma.load(f"toy:{path}", pretrained=False, heads=3)  # which says what is so
    assert isinstance(drawn, HookedViT)
    assert drawn(image.float()).shape == (2, 7)
    assert not torch.equal(drawn.blocks[0].attn.W_Q.double(), state["blocks.0.attn.W_Q"])


def test_a_head_that_is_a_linear_layer(tmp_path: Path) -> None:
    state, image = tensors(), images(2, 12)
    earlier = {**state, "head.weight": state["head.W_H"].T.contiguous(), "head.bias": state["head.b_H"]}
    del earlier["head.W_H"], earlier["head.b_H"]
    model = prisma.load(f"toy:{written(tmp_path / 'model.pth', earlier)}")
    assert torch.allclose(model(image), by_hand(state, image), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mlp", [True, False])
def test_a_file_from_before_the_models_were_hooked(mlp: bool, tmp_path: Path) -> None:
    state = older(mlp=mlp)
    path, image = written(tmp_path / "model_1.pth", state), images(1, 24)
    for heads in (3, 2):
        model = prisma.load(f"toy:{path}", heads=heads)
        assert torch.allclose(model(image), older_by_hand(state, image, heads), rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="give heads="):
        prisma.load(f"toy:{path}")
    with pytest.raises(InputError, match="heads=5 does not divide the width, 12"):
        prisma.load(f"toy:{path}", heads=5)


def test_what_a_file_may_not_hold(tmp_path: Path) -> None:
    def refused(state: dict[str, Tensor], match: str, kind: type[Exception] = LoadError, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            prisma.load(f"toy:{written(tmp_path / 'model.pth', state)}", **options)

    state = tensors()
    refused({**state, "blocks.0.mlp.ln.w": torch.ones(20)}, "extra blocks.0.mlp.ln.w")
    refused({**state, "blocks.0.attn.W_K": torch.ones(2, 12, 5)}, "W_K")
    refused({name: t for name, t in state.items() if name != "blocks.1.attn.b_O"}, "blocks.1.attn.b_O")
    refused(
        {"weight": torch.ones(2)}, "no embed.proj.weight, .*: expected a vision transformer that the Prisma project"
    )
    refused({**state, "pos_embed.W_pos": torch.ones(12, 12)}, "12 positions are no square")
    refused({**older(), "blocks.0.post_attn_ln.weight": torch.ones(12)}, "extra blocks.0.post_attn_ln", heads=3)
    refused({**state, "embed.proj.weight": torch.ones(12, 2, 2, 4, 4)}, "of videos")
    refused({**state, "blocks.0.attn.W_Q": torch.ones(12, 15)}, r"shape \[12, 15\], expected 3 axes. Expected the")
    refused({**state, "blocks.x": torch.ones(1)}, "extra blocks.x")
    old = older()
    refused({n: t for n, t in old.items() if n != "patch_embedding.proj.weight"}, "no patch_embedding.proj", heads=3)
    refused({**old, "blocks.1.attention.qkv.weight": torch.ones(35, 12)}, "of the names of 2023. Expected", heads=3)
    refused({**state, "blocks.0.attn.IGNORE": torch.tensor(-1e5)}, "extra blocks.0.attn.IGNORE.*take them out")
    refused({name: t for name, t in state.items() if name != "head.W_H"}, "no head.W_H, but cls_token.*models-toy.md")
    refused(state, "act= to be 'gelu', .*; got 'mish'", InputError, act="mish")
    refused(state, "pool= to be 'token' or 'avg'; got 'mean'", InputError, pool="mean")
    refused(state, "eps= to be a number above 0.*; got -1", InputError, centred=True, eps=-1)
    refused(state, "centred= to be True or False; got 'yes'", InputError, centred="yes")
    refused(state, "takes no 'activation'", InputError, activation="relu")
    refused(state, "heads=8 does not go with .*its tensors have 3 heads. Leave heads= out", InputError, heads=8)
    refused(tensors(mlp=False), "act='gelu' does not go with .*no MLP", InputError, act="gelu")
    refused(state, "eps=0.001 does not go with .*no norm", InputError, eps=1e-3)
    refused(tensors(norms=True), "centred=True does not go with .*have weights", InputError, centred=True)
    refused(state, "Expected mean and std, 2 numbers each", InputError, mean=(0.5,))
    refused(tensors(token=False), "no room for a class token", InputError, pool="token")
    with pytest.raises(LoadError, match="No file at"):
        prisma.load("toy:no-such-file.pth")


class Runs:
    """What a file may not make us run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"model_state_dict": tensors(), "config": Runs(tmp_path / "made")}, tmp_path / "model.pth")
    with pytest.raises(LoadError, match="wants to run"):
        prisma.load(f"toy:{tmp_path / 'model.pth'}")
    assert not (tmp_path / "made").exists()


# -------------------------------------------------------------------- the hub


def test_the_last_checkpoint_of_a_repository_or_the_one_that_is_named(loopback: Hub) -> None:
    folder, image = loopback.repository("Somebody/ImageNet-tiny-AttentionOnly"), images(2, 12)
    state = {name: tensors(mlp=False)[name] for name in shapes(mlp=False)}
    for number in (0, 90, 1000):
        written(folder / f"model_{number}.pth", {**state, "head.b_H": torch.full((7,), float(number)).double()})
    (folder / "README.md").write_text("a card")
    last = prisma.load("toy:published/Somebody/ImageNet-tiny-AttentionOnly")
    first = prisma.load("toy:published/Somebody/ImageNet-tiny-AttentionOnly@model_0.pth")
    assert torch.allclose(last(image) - first(image), torch.full((2, 7), 1000.0).double())
    sent = len(loopback.asked)
    reference = "toy:published/Somebody/ImageNet-tiny-AttentionOnly@model_1000.pth"
    again = prisma.load(reference)
    drawn = prisma.load(reference, pretrained=False)
    assert len(loopback.asked) == sent
    assert torch.equal(again(image), last(image))
    assert drawn(image.float()).shape == (2, 7)


def test_what_the_hub_does_not_have(loopback: Hub) -> None:
    loopback.repository("Somebody/Empty")
    with pytest.raises(UnknownName, match="no such repository"):
        prisma.load("toy:published/Somebody/Nothing")
    with pytest.raises(UnknownName, match=r"no \.pth"):
        prisma.load("toy:published/Somebody/Empty")
    with pytest.raises(UnknownName, match=r"none of model_1\.pth"):
        prisma.load("toy:published/Somebody/Empty@model_1.pth")
    with pytest.raises(UnknownName, match="expected toy:published/OWNER/NAME"):
        prisma.load("toy:published/nobody")
    with pytest.raises(LoadError, match="are in its file alone, and the cache has none"):
        prisma.load("toy:published/Somebody/Empty", pretrained=False)


def test_a_checkpoint_that_comes_corrupted_is_an_error_and_the_next_try_succeeds(loopback: Hub) -> None:
    written(loopback.repository("Somebody/Toy") / "model_5.pth", tensors())
    loopback.fault = "corrupt"
    with pytest.raises(LoadError, match="came corrupted"):
        prisma.load("toy:published/Somebody/Toy")
    assert isinstance(prisma.load("toy:published/Somebody/Toy"), HookedViT)


def test_a_hub_that_cannot_be_reached(loopback: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for reference in ("toy:published/Somebody/Toy", "toy:published/Somebody/Toy@model_5.pth"):
        with pytest.raises(LoadError, match=r"no answer there .*local file needs no network"):
            prisma.load(reference)


def test_without_the_hub_the_last_checkpoint_in_the_cache_is_taken_and_said(
    loopback: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    folder, image = loopback.repository("Somebody/Kept"), images(2, 12)
    for number in (5, 30, 200):
        state = {**tensors(), "head.b_H": torch.full((7,), float(number)).double()}
        written(folder / f"model_{number}.pth", state)
    kept = {n: prisma.load(f"toy:published/Somebody/Kept@model_{n}.pth")(image) for n in (5, 30)}
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.warns(UserWarning, match=r"no answer there.*model_30\.pth is taken; there may be later ones"):
        model = prisma.load("toy:published/Somebody/Kept")
    assert torch.equal(model(image), kept[30])
    drawn = prisma.load("toy:published/Somebody/Kept", pretrained=False)
    assert drawn(image.float()).shape == (2, 7)
