"""Neurons moved into a token at test time."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from prisma_registers import (
    Neuron,
    extra_registers,
    registers_at_test_time,
    without_registers,
)
from registered import images, two_towers, vit
from torch import Tensor

import prisma_core as prisma
from prisma_core import NotApplicable

MOVED = [Neuron(0, 3), Neuron(2, 4), Neuron(2, 11)]


def by_hand(first: int, n: int, n_prefix: int, neurons: list[Neuron]) -> dict[str, Callable[..., Tensor]]:
    """Return hooks that move neurons' activations, one at a time."""

    def moved(index: int) -> Callable[..., Tensor]:
        def hook(x: Tensor, at: object) -> Tensor:
            low, high = (f(x[:, n_prefix:, index], dim=1, keepdim=True).values for f in (torch.min, torch.max))
            most = torch.where(-low > high, low, high)
            kept = torch.cat([x[:, :first, index], most.expand(-1, n), x[:, first + n : n_prefix, index]], 1)
            column = torch.cat([kept, torch.zeros_like(x[:, n_prefix:, index])], 1)
            return torch.cat([x[..., :index], column[..., None], x[..., index + 1 :]], -1)

        return hook

    def chained(hooks: list[Callable[..., Tensor]]) -> Callable[..., Tensor]:
        def hook(x: Tensor, at: object) -> Tensor:
            for each in hooks:
                x = each(x, at)
            return x

        return hook

    layers = sorted({neuron.layer for neuron in neurons})
    return {
        f"blocks.{layer}.mlp.hook_post": chained([moved(one.index) for one in neurons if one.layer == layer])
        for layer in layers
    }


@pytest.mark.parametrize(("registers", "n"), [(0, 1), (2, 2)])
@torch.no_grad()
def test_moved_neurons_are_what_hooks_by_hand_make(registers: int, n: int) -> None:
    model, x = vit(registers=registers), images(2)
    first = model.layout.n_prefix
    with extra_registers(model, n) as wider:
        wanted, theirs = wider.run_with_cache(x, hooks=by_hand(first, n, first + n, MOVED))
    with registers_at_test_time(model, MOVED, n) as cleaned:
        found, cache = cleaned.run_with_cache(x)
    assert torch.equal(found, wanted)
    assert list(cache) == list(theirs)
    assert all(torch.equal(cache[name], theirs[name]) for name in theirs)
    assert not torch.isclose(found, wider(x)).all()


@torch.no_grad()
def test_what_is_moved_belongs_to_the_model() -> None:
    model, x = vit(), images(2)
    with registers_at_test_time(model, MOVED) as cleaned:
        inside = cleaned(x)
    assert not torch.isclose(model(x), inside).all()
    assert torch.equal(cleaned(x), inside)  # after its scope
    assert torch.equal(copy.deepcopy(cleaned)(x), inside)
    buffer = io.BytesIO()
    torch.save(cleaned, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), inside)
    elsewhere: list[Tensor] = []
    thread = threading.Thread(target=lambda: elsewhere.append(cleaned(x)))
    thread.start()
    thread.join()
    assert torch.equal(elsewhere[0], inside)
    assert "neurons 4, 11 moved" in cleaned.hook_points()["blocks.2.mlp.hook_post"].equation
    assert list(cleaned.hook_points()) == list(model.hook_points())


@torch.no_grad()
def test_scopes_in_scopes_keep_what_the_outer_ones_moved() -> None:
    model, x = vit(registers=1), images(2)
    others = [Neuron(0, 5), Neuron(2, 4)]
    with extra_registers(model, 2) as wider:  # cls, reg0, two added: 4 tokens before the patches
        outer, inner = by_hand(2, 1, 4, MOVED), by_hand(3, 1, 4, others)
        with wider.hooks(outer):
            alone = wider(x)
            with wider.hooks(inner):
                both = wider(x)
    with registers_at_test_time(model, MOVED) as one:
        with extra_registers(one, 1) as more:
            assert torch.equal(more(x), alone)
        with registers_at_test_time(one, others) as two:
            assert torch.equal(two(x), both)
        with pytest.raises(NotApplicable, match="remove those of the original"), without_registers(one):
            pass
    assert not torch.isclose(alone, both).all()


def test_gradients_and_the_compiler_follow_what_is_moved() -> None:
    model, x = vit(), images(2)
    first = model.layout.n_prefix
    with extra_registers(model, 1) as wider, registers_at_test_time(model, MOVED) as cleaned:
        theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
        wider.run_with_hooks(theirs, hooks=by_hand(first, 1, first + 1, MOVED)).square().sum().backward()
        cleaned(ours).square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
        compiled = torch.compile(cleaned, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), cleaned(x))
        with cleaned.caching("mlp.hook_post") as cache:
            compiled(x)
        assert not cache["blocks.2.mlp.hook_post"][:, first + 1 :, [4, 11]].any()


def test_what_is_moved_is_in_no_file(tmp_path: Path) -> None:
    with registers_at_test_time(vit(), MOVED) as cleaned:
        whole = two_towers()
        whole.vision = cleaned
        for model in (cleaned, whole):
            with pytest.raises(NotApplicable, match=r"moves neurons' activations .* a saved file cannot hold"):
                prisma.save(model, tmp_path)
            with pytest.raises(NotApplicable, match=r"moves neurons' activations .* export the original"):
                prisma.export(model)
    assert not list(tmp_path.iterdir())
