"""Inputs of classes of their own, and modes, that change what torch's functions compute: as upstream, or a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from third_party import Mapped, Plain, drawn, image
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from upstreams import case

import prisma_core as prisma
from prisma_core import InputError, UnsupportedArchitecture


class ByFunction(Tensor):
    """What ``F.linear`` returns for it is twice as much."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result * 2 if func is F.linear else result


class ByMethod(Tensor):
    def __add__(self, other: Any) -> Any:
        return super().__add__(other) * 2


class Named(Tensor):
    """A class of its own that computes as all tensors do."""


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is F.linear else result


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.ops.aten.addmm.default else result


def runs(model: Any) -> list[Any]:
    hooks = {"blocks.1.hook_resid_post": lambda a, at: a}
    return [model, lambda x: model.run_with_cache(x)[0], lambda x: model.run_with_hooks(x, hooks=hooks)]


@pytest.mark.parametrize("kind", [ByFunction, ByMethod])
def test_an_input_that_computes_in_its_own_way(kind: type[Tensor]) -> None:
    net, x = drawn(), image().as_subclass(kind)
    for run in runs(prisma.adapt(net, adapter=Plain())):
        with pytest.raises(InputError, match=rf"Expected the image as .*{kind.__name__}, whose __.*image\.as_subclass"):
            run(x)
    for run in runs(prisma.adapt(net, adapter=Mapped())):
        torch.testing.assert_close(run(x).as_subclass(Tensor), net(x).as_subclass(Tensor))


@pytest.mark.parametrize("name", ["ViT-B-16", "hf/CLIPTextModel"])
def test_tokens_that_compute_in_their_own_way(name: str) -> None:
    model: Any = prisma.adapt(case("clip", name))
    tokens = model.sample_inputs(2)[-1].as_subclass(ByFunction)
    run = model.encode_text if name == "ViT-B-16" else model
    with pytest.raises(InputError, match=r"Expected the tokens as a plain tensor, got .*ByFunction"):
        run(tokens)


def test_an_input_of_a_class_that_computes_as_all_do() -> None:
    net, x = drawn(), image()
    for adapter in (Plain(), Mapped()):
        ours = prisma.adapt(net, adapter=adapter)(x.as_subclass(Named))
        torch.testing.assert_close(ours.as_subclass(Tensor), net(x))


@pytest.mark.parametrize("mode", [FunctionMode, DispatchMode])
def test_a_mode_that_changes_functions(mode: Any) -> None:
    net, x = drawn(), image()
    model, mapped = prisma.adapt(net, adapter=Plain()), prisma.adapt(net, adapter=Mapped())
    with mode():
        with pytest.raises(UnsupportedArchitecture, match=rf"a mode that is on \(.*{mode.__name__}\)"):
            prisma.adapt(net, adapter=Plain())
        for run in runs(model):
            with pytest.raises(InputError, match=rf"a mode that is on \(.*{mode.__name__}\)"):
                run(x)
        theirs = net(x)
        for run in runs(mapped):
            torch.testing.assert_close(run(x), theirs)
    assert not torch.allclose(theirs, net(x))
    torch.testing.assert_close(model(x), net(x))


def test_modes_of_torch_that_change_no_number_pass() -> None:
    net, x = drawn(), image()
    with FlopCounterMode(display=False) as counter, torch.device("cpu"):
        ours = prisma.adapt(net, adapter=Plain())(x)
    assert counter.get_total_flops() > 0
    torch.testing.assert_close(ours, net(x))
