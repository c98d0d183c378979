"""The shapes that signatures promise are the shapes that pass."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("beartype")

CHECKED = (
    "prisma_core.transformer",
    "prisma_core.spec.layout",
    "prisma_core.transformer.factored",
    "prisma_core.transformer.rewrites",
    "prisma_core.transformer.stream.attribution",
    "prisma_core.transformer.stream.decompose",
    "prisma_core.hooks.capture",
    "prisma_core.maps.weights",
)

SCRIPT = """
    import importlib, sys
    import jaxtyping, torch
    with jaxtyping.install_import_hook({checked!r}, "beartype.beartype"):
        for name in {checked!r}:
            importlib.import_module(name)
    sys.path.insert(0, {here!r})
    import models
    from prisma_core.spec.layout import Index
    from prisma_core.transformer.factored import FactoredMatrix
    from prisma_core.hooks.model import HookedModel
    from prisma_core.transformer.rewrites import fold_layer_norm, fold_value_biases, rewrite
    from prisma_core.transformer.attention import Attention
    from prisma_core.transformer.block import Block
    from prisma_core.transformer.mlp import MLP
    from prisma_core.transformer.norm import Norm
    from prisma_core.transformer.vit import HookedViT

    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    image = torch.randn(2, 3, 8, 12)
    variants = dict(models.VARIANTS, pooled=dict(pool="attention"), larger=dict(interpolation=True))
    for name, facts in variants.items():
        vit = models.build(**facts)
        logits, cache = vit.run_with_cache(image, loss=lambda logits: logits.sum())
        vit.run_with_cache(image, names=["result", "q_input", "k_input", "v_input"], pos=0)
        vit(cache["resid_pre", 1], start_at_layer=1), vit(image, stop_at_layer=1)
        stack, _ = cache.decompose_resid(return_labels=True)
        cache.accumulated_resid(), cache.patches("resid_post", 0)
        if vit.spec.pool.kind != "attention":
            cache.logit_attrs(stack, 1), cache.logit_attrs(stack, [1, 2], 3, per_token=True)
            cache.logit_constant("cat")
        if vit.spec.blocks[0].kind != "res_post":
            cache.stack_head_results(apply_ln=vit.spec.pool.kind != "attention")
            cache.stack_neuron_results(neuron_slice=[0], incl_remainder=True)
            rewrite(vit, fold_layer_norm)
        vit.OV.svd(), vit.QK.eigenvalues, vit.QK[0, 1].norm(), vit.OV.trace(), vit.W_U, vit.b_K
        vit.run_with_cache(image[:1], remove_batch_dim=True)[1].decompose_resid(1)
        vit.blocks[0].attn if facts.get("n_parallel") else vit.blocks[0].attn.W_Q

    # The checks are live: a wrong shape is refused where nothing else would say a word.
    for call, wrong in ((vit.blocks[0], image), (vit.unembed, image), (cache.apply_ln_to_stack, image[0, 0])):
        try:
            call(wrong)
        except jaxtyping.TypeCheckError:
            continue
        raise SystemExit("a wrong shape went through")
    print("checked", len(variants))
"""


def test_signatures_hold_under_beartype():
    script = textwrap.dedent(SCRIPT).format(checked=list(CHECKED), here=str(Path(__file__).parents[1] / "helpers"))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "checked 20" in run.stdout
