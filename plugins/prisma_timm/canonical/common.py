"""Parts of timm's families: norms, activations, MLPs, patches and pools, with their rows."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from prisma_core.plugin import (
    AttentionSpec,
    EmbedSpec,
    Interpolation,
    MlpNames,
    NormClass,
    PartReader,
    PoolSpec,
    Reader,
    linear_rows,
    norm_rows,
    plain_patches,
    switched,
)

READ = PartReader(
    norms={
        "timm.layers.norm.LayerNorm": NormClass(),
        "timm.layers.norm.LayerNormFp32": NormClass(in_float32=True),
        "timm.layers.norm.RmsNorm": NormClass("rms"),
        "timm.layers.norm.RmsNormFp32": NormClass("rms", in_float32=True),
    },
    activations={
        "timm.layers.activations.GELU": "gelu",
        "timm.layers.activations.GELUTanh": "gelu_tanh",
        "timm.layers.activations.QuickGELU": "quick_gelu",
    },
    mlps={
        "timm.layers.mlp.Mlp": MlpNames(ln="norm"),
        "timm.layers.mlp.GluMlp": MlpNames(fused=True, gate_last="gate_last", ln="norm"),
        "timm.layers.mlp.SwiGLU": MlpNames("fc1_x", "fc2", fc_gate="fc1_g", ln="norm"),
        "timm.models.vitamin.GeGluMlp": MlpNames("w1", "w2", fc_gate="w0", pre_norm="norm"),
    },
    scales=("timm.layers.layer_scale.LayerScale",),
)
PROJECTIONS = ("qkv", "q", "kv", "q_proj", "k_proj", "v_proj", "in_proj", "proj", "attn_out_proj")
norm, activation, linear, classes, is_scaled = READ.norm, READ.activation, READ.linear, READ.classes, READ.scaled
mlp, mlp_rows, mlp_hooks = READ.mlp, READ.mlp_rows, READ.mlp_hooks

IGNORED = {
    "*.pretrained_cfg": "where weights and preprocessing come from",
    "*.default_cfg": "where weights and preprocessing come from",
    "*.pretrained_model_args": "how it was built",
    "*.feature_info": "where features are taken from",
    "*.grad_checkpointing": "memory in training",
    "*.in_chans": "the channels of the patch projection",
    "*.num_features": "the width of the head",
    "*.head_hidden_size": "the width of the head",
    "*.fused_attn": "which kernel computes attention",
    "*.num_classes": "read from the head",
    "*.init_values": "only for initialisation",
    "*.head_init_scale": "only for initialisation",
    "*.weight_init_mode": "only for initialisation",
    "*.fix_init": "only for initialisation",
    "*.num_prefix_tokens": "Prisma compares it with the spec's layout, wherever it stands",
    "*.patch_drop": "drops in training only",
    "PatchDropout*.*": "drops in training only",
    "DropPath.*": "drops in training only",
    "timm.layers.patch_dropout.PatchDropout": "drops in training only",
    "timm.layers.patch_dropout.PatchDropoutWithIndices": "drops in training only",
    "timm.layers.drop.DropPath": "drops in training only",
    "*.drop_path1": "drops in training only",
    "*.drop_path2": "drops in training only",
    "PatchEmbed.num_patches": "the product of grid_size",
    "PatchEmbed.flatten": "how patches are laid out in memory between modules",
    "PatchEmbed.output_fmt": "how patches are laid out in memory between modules",
    "LayerNorm.elementwise_affine": "missing weights are ones, missing biases zeros",
    "RmsNorm.elementwise_affine": "missing weights are ones",
    "RmsNormFp32.elementwise_affine": "missing weights are ones",
    "RmsNorm.normalized_shape": "the shape of the weights",
    "RmsNormFp32.normalized_shape": "the shape of the weights",
    "LayerNorm.normalized_shape": "the shape of the weights",
    "LayerScale.inplace": "the numbers are the same",
    "AttentionPoolLatent.feat_size": "the number of positions added before pooling; those are refused",
    "AttentionPoolLatent.latent_dim": "the shape of the latents",
    "AttentionPoolLatent.out_features": "the shape of the output projection",
    "GluMlp.chunk_dim": "the channel axis; convolutions are refused",
}


def pool(upstream: Reader, *, with_prefix: bool = False) -> PoolSpec:
    """Return the facts of ``global_pool``."""
    kind = upstream.global_pool or "none"
    if kind not in ("none", "token", "avg"):
        raise upstream.unsupported(f"{kind!r} pooling")
    return PoolSpec(kind=kind, with_prefix=with_prefix)


def explicit_attention(upstream: nn.Module) -> AbstractContextManager[None]:
    """Return a scope in which timm's attention modules compute step by step."""
    fused = [module for module in upstream.modules() if getattr(module, "fused_attn", False)]
    return switched(fused, "fused_attn", False)


def grid(patches: Reader) -> tuple[int, int]:
    """Return the rows and columns of patches of an image of the native size."""
    if patches.grid_size is None:
        raise patches.unsupported("no native image size")
    rows, columns = patches.grid_size
    return rows, columns


def patch_embed(module: Reader, *, pos: bool, dynamic: bool) -> EmbedSpec:
    """Return the facts of timm's PatchEmbed.

    Args:
        pos: a position embedding is added to the tokens.
        dynamic: the model goes on with grids of other sizes.
    """
    if not module.is_a("timm.layers.patch_embed.PatchEmbed"):
        raise module.unsupported("its patch embedding")
    if module.dynamic_img_pad:
        raise module.unsupported("padding of images")
    plain_patches(module.proj)
    any_size = not module.strict_img_size
    return EmbedSpec(
        patch=module.patch_size,
        in_channels=module.proj.in_channels,
        norm=norm(module.norm),
        pos=pos,
        interpolation=Interpolation() if dynamic and any_size else None,
    )


def heads(attn: Reader, **more: Any) -> AttentionSpec:
    """Return the spec that timm's attentions share, with further fields."""
    n, qk_norm = attn.num_heads, READ.qk_norm(attn.q_norm, attn.k_norm)
    for name in filter(attn.has, PROJECTIONS):
        linear(getattr(attn, name))
    shared = {
        "n_heads": n,
        "n_kv_heads": n,
        "d_head": attn.head_dim,
        "scale": scale(attn, attn.head_dim),
        "qk_norm": qk_norm,
    }
    return AttentionSpec.model_validate(shared | more)


def scale(attn: Reader, width: int) -> float:
    """Return what scores are multiplied by: timm hands ``scale`` to no fused kernel, which goes by the heads' width."""
    own = attn.scale
    return width**-0.5 if attn.fused_attn else own


def end_rows() -> str:
    """Return the weight rows of what stands before and behind the blocks, wherever a model has it."""
    return (
        norm_rows("norm_pre", "ln_pre")
        + norm_rows("norm", "ln_final")
        + norm_rows("fc_norm", "ln_pool")
        + linear_rows("head", "head")
    )


STREAM_HOOKS = """
    norm_pre  ->  hook_ln_pre
    norm_pre  ->  ln_pre.hook_normalized
    norm      ->  hook_ln_final
    norm      ->  ln_final.hook_normalized
"""
HEAD_HOOKS = """
    fc_norm : in  ->  hook_pooled
    fc_norm       ->  ln_pool.hook_normalized
    head          ->  hook_logits
"""
END_HOOKS = STREAM_HOOKS + HEAD_HOOKS  # of what ``end_rows`` fills
