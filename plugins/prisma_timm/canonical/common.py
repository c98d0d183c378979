"""What timm's families share: norms, activations, MLPs, patches and pools, with the rows that go with them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from prisma_core.maps.reader import Reader
from prisma_core.spec import Activation, AttentionSpec, EmbedSpec, Interpolation, MlpSpec, NormSpec, PoolSpec
from prisma_core.toolbox.attention import switched
from prisma_core.toolbox.rows import linear_rows, norm_rows, plain_patches

LAYER_NORMS = ("torch.nn.modules.normalization.LayerNorm", "timm.layers.norm.LayerNorm")
LAYER_NORMS_FLOAT32 = ("timm.layers.norm.LayerNormFp32",)
RMS_NORMS = ("timm.layers.norm.RmsNorm", "torch.nn.modules.normalization.RMSNorm")
RMS_NORMS_FLOAT32 = ("timm.layers.norm.RmsNormFp32",)
IDENTITY = "torch.nn.modules.linear.Identity"

ACTIVATIONS: dict[str, Activation] = {
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "timm.layers.activations.QuickGELU": "quick_gelu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.ReLU": "relu",
}

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
    "*.patch_drop": "drops in training only",
    "PatchDropout*.*": "drops in training only",
    "DropPath.*": "drops in training only",
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


def norm(module: Reader) -> NormSpec | None:
    """Return the facts of a norm; None of an identity."""
    if module.is_a(IDENTITY):
        return None
    if module.is_a(*LAYER_NORMS):
        return NormSpec(kind="ln", eps=module.eps)
    if module.is_a(*LAYER_NORMS_FLOAT32):
        return NormSpec(kind="ln", eps=module.eps, in_float32=True)
    if module.is_a(*RMS_NORMS):
        if module.eps is None:
            raise module.unsupported("a norm whose eps depends on the dtype")
        return NormSpec(kind="rms", eps=module.eps)
    if module.is_a(*RMS_NORMS_FLOAT32):
        return NormSpec(kind="rms", eps=module.eps, in_float32=True)
    raise module.unsupported("a norm that is neither layer norm nor root mean square")


def activation(module: Reader) -> Activation:
    """Return the name of an activation function."""
    if module.is_a("torch.nn.modules.activation.GELU"):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    for name, kind in ACTIVATIONS.items():
        if module.is_a(name):
            return kind
    raise module.unsupported("its activation function")


def mlp(module: Reader) -> MlpSpec:
    """Return the facts of timm's Mlp, GluMlp, SwiGLU or GeGluMlp."""
    if module.is_a("timm.layers.mlp.Mlp"):
        _linear(module, "fc1", "fc2")
        return MlpSpec(d_mlp=module.fc1.out_features, act=activation(module.act), inner_norm=norm(module.norm))
    if module.is_a("timm.layers.mlp.GluMlp"):
        _linear(module, "fc1", "fc2")
        width = module.fc1.out_features // 2
        return MlpSpec(d_mlp=width, act=activation(module.act), gated=True, inner_norm=norm(module.norm))
    if module.is_a("timm.layers.mlp.SwiGLU"):
        _linear(module, "fc1_g", "fc1_x", "fc2")
        width = module.fc1_x.out_features
        return MlpSpec(d_mlp=width, act=activation(module.act), gated=True, inner_norm=norm(module.norm))
    if module.is_a("timm.models.vitamin.GeGluMlp"):
        _linear(module, "w0", "w1", "w2")
        width = module.w1.out_features
        return MlpSpec(d_mlp=width, act=activation(module.act), gated=True, pre_norm=norm(module.norm))
    raise module.unsupported("its kind of MLP")


def _linear(module: Reader, *names: str) -> None:
    for name in names:
        if not getattr(module, name).is_a("torch.nn.modules.linear.Linear"):
            raise module.unsupported(f"{name} that is no linear layer")


def mlp_rows(module: Reader, source: str, target: str) -> str:
    """Return the weight rows of what ``mlp`` reads."""
    if module.is_a("GeGluMlp"):
        parts = (("w0", "fc_gate"), ("w1", "fc_in"), ("w2", "fc_out"))
        rows = norm_rows(f"{source}.norm", f"{target}.pre_norm")
        return rows + "".join(linear_rows(f"{source}.{theirs}", f"{target}.{ours}") for theirs, ours in parts)
    rows = linear_rows(f"{source}.fc2", f"{target}.fc_out") + norm_rows(f"{source}.norm", f"{target}.ln")
    if module.is_a("SwiGLU"):
        rows += linear_rows(f"{source}.fc1_g", f"{target}.fc_gate")
        return rows + linear_rows(f"{source}.fc1_x", f"{target}.fc_in")
    if module.is_a("GluMlp"):
        parts = ("fc_in", "fc_gate") if module.gate_last else ("fc_gate", "fc_in")
        rows += f"""
            {source}.fc1.weight        ->  [{target}.{parts[0]}.weight, {target}.{parts[1]}.weight]
            {source}.fc1.bias | zeros  ->  [{target}.{parts[0]}.bias, {target}.{parts[1]}.bias]
        """
        return rows
    return rows + linear_rows(f"{source}.fc1", f"{target}.fc_in")


def mlp_hooks(module: Reader, source: str, target: str) -> str:
    """Return the hook rows of what ``mlp`` reads."""
    if module.is_a("GeGluMlp"):
        return f"""
            {source}.norm     ->  {target}.pre_norm.hook_normalized
            {source}.w0       ->  {target}.hook_pre
            {source}.w1       ->  {target}.hook_pre_linear
            {source}.w2 : in  ->  {target}.hook_post
        """
    rows = f"""
        {source}.norm : in  ->  {target}.hook_mid
        {source}.norm       ->  {target}.ln.hook_normalized
        {source}.fc2 : in   ->  {target}.hook_post
    """
    if module.is_a("SwiGLU"):
        rows += f"""
            {source}.fc1_g  ->  {target}.hook_pre
            {source}.fc1_x  ->  {target}.hook_pre_linear
        """
        return rows
    if module.is_a("GluMlp"):
        rows += f"""
            {source}.act : in                                     ->  {target}.hook_pre
            {source} @ mul : {"in" if module.gate_last else "in1"}  ->  {target}.hook_pre_linear
        """
        return rows
    rows += f"""
        {source}.fc1  ->  {target}.hook_pre
    """
    return rows


def classes(head: Reader) -> int | None:
    """Return how many classes a head tells apart; None if there is no head."""
    if head.is_a(IDENTITY):
        return None
    if head.is_a("torch.nn.modules.linear.Linear"):
        return head.out_features
    raise head.unsupported("its kind of head")


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
    if module.img_size is None:
        raise module.unsupported("no native image size")
    any_size = not module.strict_img_size
    return EmbedSpec(
        patch=module.patch_size,
        in_channels=module.proj.in_channels,
        norm=norm(module.norm),
        pos=pos,
        interpolation=Interpolation() if dynamic and any_size else None,
    )


def qk_norm(attn: Reader) -> NormSpec | None:
    """Return the facts of an attention's norms of queries and keys."""
    if norm(attn.q_norm) != norm(attn.k_norm):
        raise attn.unsupported("queries and keys normed differently")
    return norm(attn.q_norm)


def heads(attn: Reader, **facts: Any) -> AttentionSpec:
    """Return the facts that timm's attentions share, and those given."""
    n = attn.num_heads
    shared = {"n_heads": n, "n_kv_heads": n, "d_head": attn.head_dim, "scale": attn.scale, "qk_norm": qk_norm(attn)}
    return AttentionSpec.model_validate(shared | facts)


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
