"""What loading costs and leaves behind: no second copy, an untouched upstream, a light import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import prisma_core as prisma
from prisma_core import HookedViT
from prisma_core.zoo import tensors_of

timm = pytest.importorskip("timm")


@pytest.fixture
def upstream() -> nn.Module:
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2, num_classes=5, img_size=32, class_token=True
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.train()


def _where(tensors: dict[str, torch.Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}


def test_sharing_keeps_no_second_copy(upstream: nn.Module) -> None:
    """Every tensor that needs no rearranging lies where upstream's lies; reshapes are views."""
    model = prisma.adapt(upstream, copy=False)
    theirs = _where(tensors_of(upstream))
    apart = [name for name, t in tensors_of(model).items() if t.untyped_storage().data_ptr() not in theirs]
    assert apart == []
    assert model.blocks[1].attn.qkv.weight.data_ptr() == upstream.blocks[1].attn.qkv.weight.data_ptr()
    assert model.origin is not None
    assert all(tensor.is_meta for tensor in model.origin.upstream.values())


def test_copying_shares_nothing(upstream: nn.Module) -> None:
    model = prisma.adapt(upstream)
    assert not _where(tensors_of(model)) & _where(tensors_of(upstream))


def test_load_keeps_no_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``load`` returns holds as many bytes as the model has, and none besides."""
    made: list[nn.Module] = []
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: made.append(create(*args, **kwargs)) or made[-1])
    options: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5, "img_size": 32}
    model = prisma.load("timm:vit_tiny_patch16_224", pretrained=False, **options)
    assert len(made) == 1
    assert _where(tensors_of(model)) <= _where(tensors_of(made[0]))


def test_adapt_leaves_the_upstream_as_it_was(upstream: nn.Module) -> None:
    before = {name: tensor.detach().clone() for name, tensor in tensors_of(upstream).items()}
    attributes = {name: _plain(module) for name, module in upstream.named_modules()}
    places = {name: tensor.data_ptr() for name, tensor in tensors_of(upstream).items()}
    grads = {name: tensor.requires_grad for name, tensor in tensors_of(upstream).items()}
    model = prisma.adapt(upstream)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.run_with_cache(image)
    assert {name: _plain(module) for name, module in upstream.named_modules()} == attributes
    assert {name: tensor.data_ptr() for name, tensor in tensors_of(upstream).items()} == places
    assert {name: tensor.requires_grad for name, tensor in tensors_of(upstream).items()} == grads
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(upstream).items())
    assert upstream.training


def _plain(module: nn.Module) -> dict[str, Any]:
    """Return a module's own plain attributes, ``fused_attn`` and ``training`` among them, and how many hooks it has."""
    plain = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str | tuple)}
    return {**plain, "hooks": {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks")}}


def test_sharing_lets_training_of_one_reach_the_other(upstream: nn.Module) -> None:
    model = prisma.adapt(upstream, copy=False)
    with torch.no_grad():
        upstream.head.bias.add_(1)
    assert torch.equal(model.head.bias, upstream.head.bias)


def test_importing_is_light() -> None:
    """The core's import pulls in no model library, no command line, no drawing, no plugin, no conformance kit."""
    code = "import sys, prisma_core; print(*sorted(sys.modules), sep='\\n')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    heavy = {"timm", "torchvision", "transformers", "huggingface_hub", "PIL", "typer", "rich", "plotly", "jinja2"}
    heavy |= {"prisma_timm", "prisma_toy", "prisma_lens", "prisma_view", "pytest", "pandas", "matplotlib", "scipy"}
    assert not heavy & loaded
    assert "prisma_conformance" not in run.stdout.split()


def test_saving_and_loading_is_exact(vit: HookedViT, image: torch.Tensor, tmp_path: Path) -> None:
    vit.reference = "somewhere:else"
    loaded = prisma.load(f"file:{prisma.save(vit, tmp_path)}")
    assert isinstance(loaded, HookedViT)
    assert torch.equal(loaded(image), vit(image))
    assert (loaded.spec, loaded.labels, loaded.reference) == (vit.spec, vit.labels, "somewhere:else")


def test_saving_keeps_what_is_frozen(vit: HookedViT, tmp_path: Path) -> None:
    vit.embed.requires_grad_(False)
    back = prisma.load(f"file:{prisma.save(vit, tmp_path)}")
    frozen = {name for name, tensor in back.named_parameters() if not tensor.requires_grad}
    assert frozen == {name for name, tensor in vit.named_parameters() if not tensor.requires_grad} != set()


def test_one_upstream_tensor_that_makes_two_of_ours_makes_two(tmp_path: Path) -> None:
    model = prisma.load("timm:vit_pwee_patch16_reg1_gap_256", pretrained=False, depth=1)
    with torch.no_grad():
        model.blocks[0].ls1.gamma.mul_(3)
    assert not torch.equal(model.blocks[0].ls1.gamma, model.blocks[0].ls2.gamma)
    back = prisma.load(f"file:{prisma.save(model, tmp_path)}")
    assert torch.equal(back.blocks[0].ls1.gamma, model.blocks[0].ls1.gamma)


def test_what_adapt_does_not_take_is_said() -> None:
    with pytest.raises(prisma.InputError, match=r"prisma\.load takes a reference"):
        prisma.adapt("timm:vit_tiny_patch16_224")
    for dtype in ("flt", torch.int64, "int8"):
        with pytest.raises(prisma.InputError, match=r"floating point dtype.*torch\.float16"):
            prisma.load("toy:scenes-3l", dtype=dtype)
    assert prisma.load("toy:scenes-3l", dtype="float16").blocks[0].attn.W_Q.dtype == torch.float16
