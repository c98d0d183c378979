"""Techniques where the model is: patching, lenses, rewrites and registers on another device and in half precision."""

from __future__ import annotations

import prisma_dino
import prisma_lens
import prisma_patch
import prisma_registers
import pytest
import torch
from kinds import KINDS, drawn, inputs_on

from prisma_core import HookedViT
from prisma_core.transformer import rewrites

HALF = [torch.bfloat16, torch.float16]
WIDE = ("norms",)  # which half precision may not hold


def techniques(model: HookedViT, device: torch.device, dtype: torch.dtype) -> None:
    """Run each technique, and check the device and the dtype of its results."""
    (images,) = inputs_on(model, device, dtype)
    metric = prisma_lens.logit_difference(0, 1)
    effects = {
        at: prisma_patch.activation_patch(model, images, images.flip(0), metric, at=at, pos=[0, 2], over="layer").values
        for at in ("resid_pre", "z")
    }
    effects["heads"] = prisma_patch.patch_heads(model, images, images[:1], metric).values
    folded = rewrites.rewrite(model, rewrites.fold_layer_norm, rewrites.center_writing_weights)
    effects["folded"] = folded(images)
    effects["norms"] = prisma_registers.token_norms(model, images).norms
    effects["to registers"] = prisma_registers.attention_to(model, images, "registers")
    neurons = prisma_registers.register_neurons(model, images, top=2, factor=0.5)
    scopes = {
        "without": prisma_registers.without_registers(model),
        "extra": prisma_registers.extra_registers(model, 2),
        "moved": prisma_registers.registers_at_test_time(model, neurons or [prisma_registers.Neuron(0, 1)]),
    }
    for name, scope in scopes.items():
        with scope as changed:
            effects[name] = changed(images)
    effects |= {f"layer {n}": x for n, x in enumerate(prisma_dino.last_layers(model, images, 2))}
    effects["linear"] = prisma_dino.linear_input(model, images, 2)
    _, cache = model.run_with_cache(images)
    effects["lens"] = prisma_lens.logit_lens(model, cache).logits
    for by in ("layer", "head", "neuron", "head source"):
        effects[f"attribution by {by}"] = prisma_lens.attribute(model, cache, [0, 1], by=by).values
    effects["second order"] = prisma_lens.second_order(model, cache, 0).values
    effects["segment"] = prisma_lens.segment(model, images, 0).values
    effects["relevance"] = prisma_lens.relevance(model, images, 0).values
    effects["induction"] = prisma_lens.induction(model, images, pairs=1).values
    for name, x in effects.items():
        assert x.device == device, name
        assert x.dtype == (torch.float32 if name in WIDE else dtype), name


@torch.no_grad()
def test_techniques_stay_where_the_model_is(device: torch.device) -> None:
    techniques(drawn(KINDS["positions resized"]).to(device), device, torch.float32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@torch.no_grad()
def test_techniques_in_half_precision(dtype: torch.dtype) -> None:
    techniques(drawn(KINDS["positions resized"]).to(dtype), torch.device("cpu"), dtype)
