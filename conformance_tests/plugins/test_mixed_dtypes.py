"""Models of several dtypes run with upstream's numbers, or as upstream refuses to."""

from __future__ import annotations

import random
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from prisma_conformance.recording import Recorder

import prisma_core as prisma
from prisma_core.host import installed
from prisma_core.maps.reader import Reader
from prisma_core.zoo import read_adapter

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDINGS = 8  # as in transformer/test_precision.py
CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"width": 64, "layers": 2, "image_size": 32, "patch_size": 16},
    "text_cfg": {"width": 32, "layers": 2, "heads": 2, "context_length": 9, "vocab_size": 50},
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def timm_vit(**options):
    small = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **small, **options)


UPSTREAM = {
    "timm": lambda: timm_vit(qkv_bias=False),
    "timm, RMS": lambda: timm_vit(init_values=0.5, norm_layer=timm.layers.RmsNorm, qk_norm=True),
    "transformers": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=32)),
    "transformers, text": lambda: transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**SMALL, vocab_size=50, max_position_embeddings=9, eos_token_id=49)
    ),
    "open_clip, text": lambda: open_clip.create_model("ViT-B-32", **CLIP, force_custom_text=True).text,
}


def drawn(upstream):
    torch.manual_seed(0)
    for parameter in upstream.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return upstream.eval()


def cast(module, dtype):
    """Give a module's own parameters a dtype."""
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data = parameter.data.to(dtype)


def mixed(upstream, seed):
    """Draw two dtypes, a share of modules that have the second, and norms in float32."""
    choose = random.Random(seed)
    first, second = choose.sample(DTYPES, 2)
    share, norms = choose.choice([0, 0, 0.05, 0.5]), choose.choice([0, 0.5, 1])
    for module in upstream.modules():
        cast(module, second if choose.random() < share else first)
        if "Norm" in type(module).__name__ and choose.random() < norms:
            cast(module, torch.float32)
    return upstream


def close(ours, theirs):
    """Assert equality up to the rounding of the explicit attention, which caches of scores ask for."""
    assert ours.dtype == theirs.dtype
    bound = ROUNDINGS * torch.finfo(theirs.dtype).eps * theirs.abs().max().double()
    assert (ours.double() - theirs.double()).abs().max() <= bound


def inputs_of(model, upstream):
    inputs = model.sample_inputs(2, generator=torch.Generator().manual_seed(1))
    dtype = next(
        each.weight.dtype for each in upstream.modules() if isinstance(each, torch.nn.Conv2d | torch.nn.Linear)
    )
    return [x.to(dtype) if x.is_floating_point() else x for x in inputs]


def compare(upstream):
    """Compare the output and every activation that upstream shows; return how many, or None where it refuses."""
    model, adapter = prisma.adapt(upstream), installed().adapter(upstream)
    table = read_adapter(adapter, Reader(upstream)).hooks
    rows = table.bound(model.hook_points())
    inputs = inputs_of(model, upstream)
    with torch.no_grad():
        try:
            with Recorder(upstream, [row.place for row in rows]) as tensors:
                theirs = adapter.call(upstream, *inputs)
        except RuntimeError:
            return None
        close(model(*inputs), theirs)
        ours, cache = model.run_with_cache(*inputs)
    close(ours, theirs)
    sizes = {"batch": 2, **table.sizes}
    shown = [row for row in rows if row.place in tensors]
    for row in shown:
        close(cache[row.hook], row.read(tensors[row.place], sizes))
    return len(shown)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "pure_fp16", "pure_bf16", "fp32"])
@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
def test_precisions_of_open_clip(precision, custom):
    upstream = drawn(open_clip.create_model("ViT-B-32", precision=precision, force_custom_text=custom, **CLIP))
    assert compare(upstream) >= 50
    model = prisma.adapt(upstream)
    image, tokens = inputs_of(model, upstream)
    with torch.no_grad():
        close(model.encode_image(image), upstream.encode_image(image))
        close(model.encode_text(tokens), upstream.encode_text(tokens))
    state = prisma.export(model)
    theirs = upstream.state_dict()
    assert all(torch.equal(state[name], theirs[name]) and state[name].dtype == theirs[name].dtype for name in theirs)


@pytest.mark.parametrize("kind", UPSTREAM)
def test_parts_of_other_dtypes(kind):
    upstream = drawn(UPSTREAM[kind]())
    outcomes = [compare(mixed(upstream.float(), seed)) for seed in range(10)]
    assert sum(outcome is not None for outcome in outcomes) >= 3
    assert None in outcomes or kind.startswith("open_clip")


def test_what_upstream_lacks_has_the_dtype_of_its_module():
    upstream = drawn(timm_vit(qkv_bias=False))
    upstream.blocks.bfloat16()
    model = prisma.adapt(upstream)
    assert {each.dtype for each in model.blocks.parameters()} == {torch.bfloat16}
    assert model.head.weight.dtype == torch.float32
    stream = torch.randn(2, 5, 32).bfloat16()
    with torch.no_grad():
        close(model(stream, start_at_layer=0, stop_at_layer=2), upstream.blocks(stream))


def test_gradients_and_decompositions_of_mixed_dtypes():
    upstream = drawn(open_clip.create_model("ViT-B-32", precision="fp16", **CLIP)).visual
    model = prisma.adapt(upstream)
    (image,) = inputs_of(model, upstream)
    logits, cache = model.run_with_cache(image, loss=lambda out: out.float()[0, 1])
    assert {x.dtype for x in cache.values()} == {x.dtype for x in cache.grad.values()} == {torch.float16}
    stack = cache.decompose_resid()
    total = cache.project_stack(stack).float().sum(0) + cache.logit_constant()
    assert (total - logits).abs().max() <= 64 * torch.finfo(torch.float16).eps * stack.abs().max()
