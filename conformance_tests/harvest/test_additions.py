"""What a user has set on a model's parts is in a harvest's manifest, or no harvest is made: weights do not say it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from prisma_harvest import Pass, harvest, open_harvest, top_examples
from prisma_registers import Neuron, registers_at_test_time
from third_party import Mapped, drawn, image
from torch import Tensor, nn

import prisma_core as prisma
from prisma_core import HookedViT, InputError

NAMES = [("resid_post", 1)]


@contextmanager
def hook(model: Any) -> Iterator[None]:
    handle = model.blocks[0].mlp.register_forward_hook(lambda module, args, output: output * 2)
    yield
    handle.remove()


@contextmanager
def hook_before(model: Any) -> Iterator[None]:
    handle = model.blocks[0].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    yield
    handle.remove()


@contextmanager
def hook_of_all(model: Any) -> Iterator[None]:
    mlp = model.blocks[0].mlp
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 2 if module is mlp else None
    )
    yield
    handle.remove()


@contextmanager
def forward(model: Any) -> Iterator[None]:
    mlp = model.blocks[0].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x) * 2
    yield
    del mlp.forward


ADDITIONS = {"blocks.0.mlp": hook, "'blocks.0.mlp'": hook_before, "all modules": hook_of_all, "A forward": forward}


def test_autocast_is_in_no_manifest(model: Any, photos: Any, tmp_path: Path) -> None:
    exact = harvest(model, photos, NAMES, out=tmp_path, batch=4)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(InputError, match=r"autocast is on.*torch\.float64.*note="):
            harvest(model, photos, NAMES, out=tmp_path, batch=4)
        noted = harvest(model, photos, NAMES, out=tmp_path, batch=4, note="under autocast")
    assert noted.path != exact.path


@pytest.mark.parametrize("where", ADDITIONS)
def test_what_was_set_on_parts_is_said_in_a_note(model: HookedViT, photos: Path, tmp_path: Path, where: str) -> None:
    plain = harvest(model, photos, NAMES, out=tmp_path, batch=4)
    with ADDITIONS[where](model):
        with pytest.raises(InputError, match=f"{where}.*note="):
            harvest(model, photos, NAMES, out=tmp_path, batch=4)
        with pytest.raises(InputError, match=f"{where}.*note="):
            top_examples(Pass(model, photos, NAMES), ("resid_post", 1))
        noted = harvest(model, photos, NAMES, out=tmp_path, batch=4, note="twice the first MLP")
        noted.check_model(model)
        with pytest.raises(InputError, match=where):
            plain.check_model(model)
    assert not torch.equal(noted.example(0, NAMES[0]), plain.example(0, NAMES[0]))
    assert where in (noted.manifest.model.behaviour or "")
    with pytest.raises(InputError, match=where):
        noted.check_model(model)
    unhooked = harvest(model, photos, NAMES, out=tmp_path, batch=4, note="twice the first MLP")
    assert unhooked.path != noted.path  # the same note of a model without what was set
    assert torch.equal(unhooked.example(0, NAMES[0]), plain.example(0, NAMES[0]))


def test_a_harvest_goes_on_with_what_it_was_begun_with(
    model: HookedViT, photos: Path, tmp_path: Path, content: Callable[[Path], dict[str, bytes]]
) -> None:
    def run(out: str) -> Path:
        return harvest(model, photos, NAMES, out=tmp_path / out, batch=4, shard=8, note="twice", workers=0).path

    def stopping(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if next(passes) == 4:
            raise RuntimeError("stopped")
        return output * 2

    with hook(model):
        whole = run("once")
    passes, handle = itertools.count(), model.blocks[0].mlp.register_forward_hook(stopping)
    with pytest.raises(RuntimeError, match="stopped"):
        run("more")
    handle.remove()
    begun = tmp_path / "more" / whole.name
    before = content(begun)
    assert len(before) > 2
    assert run("more") != begun  # without the hook
    assert content(begun) == before
    with hook(model):
        assert run("more") == begun
    assert content(begun) == content(whole)


def exchanged(model: Any) -> None:
    model.blocks[0].mlp.act = torch.relu


def test_a_changed_part_is_in_the_manifest(model: HookedViT, photos: Path, tmp_path: Path) -> None:
    plain = harvest(model, photos, NAMES, out=tmp_path, batch=4)
    exchanged(model)
    with pytest.raises(InputError, match=r"act=.*blocks\.0\.mlp"):
        plain.check_model(model)
    other = harvest(model, photos, NAMES, out=tmp_path, batch=4)
    assert "blocks.0.mlp" in (other.manifest.model.behaviour or "")
    assert other.path != plain.path
    open_harvest(other.path).check_model(model)


def test_what_upstream_s_own_modules_hold_beside_tensors_is_in_the_name() -> None:
    net: Any = drawn()
    data = [image()[0].float() for _ in range(2)]

    def name(net: Any) -> str:
        return (
            Pass(prisma.adapt(net, adapter=Mapped()).float(), data, None, preprocess=None).manifest("float32", 2).name
        )

    before = name(net)
    assert name(net) == before
    net.layers[0].norm1.eps = 0.1
    assert name(net) != before


def test_other_moves_of_neurons_are_other_models(model: HookedViT, photos: Path, tmp_path: Path) -> None:
    names: set[str] = set()
    for index in (1, 2):
        with registers_at_test_time(model, [Neuron(0, index, 1.0)]) as changed:
            names.add(harvest(changed, photos, NAMES, out=tmp_path, batch=4).path.name)
    assert len(names) == 2
