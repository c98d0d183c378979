"""The blocks of transformers' DINOv2 and DINOv3, and what they are made of: facts, weight rows and hook rows."""

from __future__ import annotations

from prisma_core.plugin import (
    TRANSFORMERS,
    AttentionSpec,
    BlockSpec,
    MlpNames,
    PartReader,
    Reader,
    linear_rows,
    masks_as_built,
)

AT = "transformers.models"
V2 = f"{AT}.dinov2.modeling_dinov2.Dinov2"
V2_REGISTERS = f"{AT}.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegisters"
V3 = f"{AT}.dinov3_vit.modeling_dinov3_vit.DINOv3ViT"
FAMILIES = (V2, V2_REGISTERS, V3)
PLAIN = MlpNames("fc1", "fc2", "activation_fn")
GATED = MlpNames("up_proj", "down_proj", "act_fn", fc_gate="gate_proj")

READ = PartReader(
    activations=TRANSFORMERS,
    mlps={
        f"{V2}MLP": PLAIN,
        f"{V2_REGISTERS}MLP": PLAIN,
        f"{V2}SwiGLUFFN": GATED,
        f"{V2_REGISTERS}SwiGLUFFN": GATED,
        f"{V3}MLP": GATED._replace(fc_gate=""),
        f"{V3}GatedMLP": GATED,
    },
    scales=tuple(f"{family}LayerScale" for family in FAMILIES),
)

IGNORED = {
    "*.config": "what it was built from; the facts are read off the modules",
    "*.gradient_checkpointing": "memory in training",
    "*.name_or_path": "where it came from",
    "*.warnings_issued": "what was said before",
    "*.generation_config": "of text",
    "*.num_labels": "the width of the head",
    "*.num_features": "the width of each feature map",
    "*.backbone_type": "whose backbone it is",
    "*.num_register_tokens": "the shape of the registers",
    "*.all_tied_weights_keys": "how weights are saved",
    "*.tp_plan": "how weights are spread over devices",
    "*.pp_plan": "how weights are spread over devices",
    "*.ep_plan": "how weights are spread over devices",
    "*.loss_type": "of training",
    "*.kernel_config": "which kernels run",
    "*.mask_token": "stands for patches that the caller hides in training",
    "*.patch_size": "the kernel of the patch projection",
    "*.num_channels": "the channels of the patch projection",
    "*.num_patches": "the number of positions",
    "*.attention_dropout": "off in evaluation",
    "*.dropout": "off in evaluation",
    "*.embed_dim": "the width of the projections",
    "*.hidden_size": "the width of the projections",
    "*.intermediate_size": "the width of the projections",
    "*DropPath.*": "off in evaluation",
    "*.drop_path": "off in evaluation",
    "GELUActivation.act": "the function that the class is named after",
    "GELUTanh.act": "the function that the class is named after",
    "AccurateGELUActivation.precomputed_constant": "of the tanh formula",
}


def block(module: Reader) -> BlockSpec:
    """Return the spec of a block."""
    if not module.is_a(*(f"{family}Layer" for family in FAMILIES)):
        raise module.unsupported("its kind of block")
    return BlockSpec(
        attn=_attention(module.attention),
        mlp=READ.mlp(module.mlp),
        ln1=READ.norm(module.norm1),
        ln2=READ.norm(module.norm2),
        attn_scale=READ.scaled(module.layer_scale1),
        mlp_scale=READ.scaled(module.layer_scale2),
    )


def _attention(attn: Reader) -> AttentionSpec:
    if not attn.is_a(*(f"{family}Attention" for family in FAMILIES)):
        raise attn.unsupported("its kind of attention")
    masks_as_built(attn)
    READ.linear(attn.o_proj)
    heads = attn.get("num_heads") or attn.num_attention_heads
    return AttentionSpec(n_heads=heads, n_kv_heads=heads, d_head=attn.head_dim, scale=attn.scaling)


def block_rows(module: Reader, source: str) -> str:
    """Return the weight rows of one block; ``source`` is its path."""
    to, attn = "blocks.{l}", f"{source}.attention"
    rows = f"""
        {source}.norm1.{{*}}           ->  {to}.ln1.{{*}}
        {source}.layer_scale1.lambda1  ->  {to}.ls1.gamma
        {source}.norm2.{{*}}           ->  {to}.ln2.{{*}}
        {source}.layer_scale2.lambda1  ->  {to}.ls2.gamma
    """
    rows += READ.qkv_rows(module.attention, attn, f"{to}.attn.qkv") + linear_rows(f"{attn}.o_proj", f"{to}.attn.out")
    return rows + READ.mlp_rows(module.mlp, f"{source}.mlp", f"{to}.mlp")


def block_hooks(module: Reader, source: str, *, rope: bool) -> str:
    """Return the hook rows of one block; ``source`` is its path, ``h`` the number of its heads."""
    to, attn = "blocks.{l}", f"{source}.attention"
    rows = f"""
        {source} : in                ->  {to}.hook_resid_pre
        {source}.norm1               ->  {to}.ln1.hook_normalized
        {attn}.q_proj                ->  {to}.attn.hook_q            : b p (h d) -> b p h d
        {attn}.k_proj                ->  {to}.attn.hook_k            : b p (h d) -> b p h d
        {attn}.v_proj                ->  {to}.attn.hook_v            : b p (h d) -> b p h d
        {attn} @ softmax : in        ->  {to}.attn.hook_attn_scores
        {attn} @ softmax             ->  {to}.attn.hook_pattern
        {attn}.o_proj : in           ->  {to}.attn.hook_z            : b p (h d) -> b p h d
        {source}.layer_scale1        ->  {to}.hook_attn_out
        {source}.norm2 : in          ->  {to}.hook_resid_mid
        {source}.norm2               ->  {to}.ln2.hook_normalized
        {source}.layer_scale2        ->  {to}.hook_mlp_out
        {source}                     ->  {to}.hook_resid_post
    """
    if rope:  # two halves are exchanged with a cat each, then prefix and patches are joined again
        rows += f"""
            {attn} @ cat#2  ->  {to}.attn.hook_rot_q  : b h p d -> b p h d
            {attn} @ cat#3  ->  {to}.attn.hook_rot_k  : b h p d -> b p h d
        """
    return rows + READ.mlp_hooks(module.mlp, f"{source}.mlp", f"{to}.mlp")
