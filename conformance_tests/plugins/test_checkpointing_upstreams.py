"""Activation checkpointing as libraries switch it on: hooked upstreams have the gradients they have without it."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers
from derivatives import assert_same, gradients

import prisma_core as prisma

pytestmark = pytest.mark.usefixtures("in_float64")


TIMM = {
    "samvit_base_patch16": {
        "img_size": 64,
        "patch_size": 16,
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "global_attn_indexes": (1,),
    },
    "swin_tiny_patch4_window7_224": {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16, "img_size": 56},
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    upstream = timm.create_model(name, pretrained=False, num_classes=3, **TIMM[name]).eval()
    for parameter in upstream.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    plain = prisma.adapt(upstream)
    upstream.set_grad_checkpointing(True)
    saving = prisma.adapt(upstream)
    x = plain.sample_inputs(generator=torch.Generator().manual_seed(1))[0]
    names = ["*.hook_resid_mid", "*.hook_pattern"]
    assert_same(gradients(plain, x, names), gradients(saving, x, names))


@pytest.mark.parametrize("reentrant", [False, True], ids=["no reentry", "reentry"])
def test_transformers(reentrant):
    config = transformers.TimesformerConfig(
        image_size=16,
        patch_size=8,
        num_frames=2,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    plain = prisma.adapt(transformers.TimesformerModel(config).eval())
    saving = prisma.adapt(plain.upstream)
    saving.upstream.gradient_checkpointing_enable({"use_reentrant": reentrant})
    saving.train()  # else transformers does not checkpoint
    x = plain.sample_inputs(generator=torch.Generator().manual_seed(1))[0]
    names = ["*.hook_resid_post", "*.hook_pattern"]
    assert_same(gradients(plain, x, names), gradients(saving, x, names))
