"""Parts of a hooked model that were exchanged, and weights that are computed since: no file, no export without them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from third_party import Plain, drawn, image
from torch import nn
from torch.nn.utils import parametrize, prune

import prisma_core as prisma
from prisma_core.plugin import NormSpec


class Half(nn.Module):
    def forward(self, weight: Any) -> Any:
        return weight / 2


def without_a_bias(model: Any) -> None:
    model.blocks[0].mlp.fc_out.bias = None


def another_head(model: Any) -> None:
    model.head = nn.Linear(model.head.in_features, 7)


def another_activation(model: Any) -> None:
    model.blocks[0].mlp.act = nn.functional.relu


def another_norm(model: Any) -> None:
    model.blocks[0].ln2.spec = NormSpec(eps=0.1)


def another_class(model: Any) -> None:
    model.blocks[0].mlp.fc_out.__class__ = type("Acme", (nn.Linear,), {})


def another_method(model: Any) -> None:
    model.blocks[0].ln2.centred = lambda x: x * 0


def one_block_less(model: Any) -> None:
    del model.blocks[1]


def another_mlp(model: Any) -> None:
    model.blocks[0].mlp = nn.Sequential(model.blocks[0].mlp, nn.Tanh())


def pruned(model: Any) -> None:
    prune.l1_unstructured(model.blocks[0].mlp.fc_out, "weight", 0.5)


def parametrised(model: Any) -> None:
    parametrize.register_parametrization(model.blocks[0].mlp.fc_out, "weight", Half())


UNSAID = [another_activation, another_norm, another_class, another_method, another_mlp, pruned, parametrised]
CHANGES = [without_a_bias, another_head, one_block_less, *UNSAID]


@pytest.mark.parametrize("change", CHANGES)
def test_what_no_file_would_hold_is_not_saved(change: Callable[[Any], None], tmp_path: Path) -> None:
    model = prisma.adapt(drawn(), adapter=Plain())
    change(model)
    with pytest.raises(prisma.PrismaError, match=r"fc_out|head|blocks\.1|blocks\.0\.(mlp|ln2)"):
        prisma.save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [one_block_less, another_head, *UNSAID])
def test_what_no_state_dict_would_hold_is_not_exported(change: Callable[[Any], None]) -> None:
    model = prisma.adapt(drawn(), adapter=Plain())
    change(model)
    with pytest.raises(prisma.PrismaError, match=r"layers\.1|blocks\.0\.(mlp|ln2)|head\.weight is \[7, 6\]"):
        prisma.export(model)


@torch.no_grad()
@pytest.mark.parametrize("change", [pruned, parametrised])
def test_models_whose_weights_are_computed_are_copied(change: Callable[[Any], None]) -> None:
    model: Any = prisma.adapt(drawn(), adapter=Plain())
    change(model)
    again, output = copy.deepcopy(model), model(image())
    assert torch.equal(again(image()), output)
    for parameter in again.parameters():
        parameter.mul_(2)
    assert torch.equal(model(image()), output)
    assert not torch.equal(again(image()), output)


def test_weights_made_plain_again_are_saved(tmp_path: Path) -> None:
    model: Any = prisma.adapt(drawn(), adapter=Plain())
    pruned(model)
    prune.remove(model.blocks[0].mlp.fc_out, "weight")
    again: Any = prisma.load(prisma.save(model, tmp_path / "model"))
    assert (again.blocks[0].mlp.W_out == model.blocks[0].mlp.W_out).all()
    assert (again.blocks[0].mlp.W_out == 0).any()


def test_hooks_and_forwards_that_no_file_holds_are_said(tmp_path: Path) -> None:
    model: Any = prisma.adapt(drawn(), adapter=Plain())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prisma.save(model, tmp_path / "plain")
        prisma.export(model)
    hook = model.blocks[0].mlp.register_forward_hook(lambda module, given, result: result * 0)
    with pytest.warns(UserWarning, match=r"hook of torch's at 'blocks\.0\.mlp' is not part"):
        prisma.save(model, tmp_path / "hooked")
    with pytest.warns(UserWarning, match=r"hook of torch's at 'blocks\.0\.mlp' is not part"):
        prisma.export(model)
    hook.remove()
    forward = model.head.forward
    model.head.forward = lambda x: forward(x) * 2
    with pytest.warns(UserWarning, match="forward of its own at 'head' is not part"):
        prisma.save(model, tmp_path / "patched")
