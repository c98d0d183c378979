"""The blocks of Meta's own layout: facts, weight rows and hook rows."""

from __future__ import annotations

from prisma_core.plugin import AttentionSpec, BlockSpec, MlpNames, PartReader, Reader, linear_rows

OURS, FIRST = "prisma_dino.meta", "vision_transformer"
BLOCKS = (
    f"{OURS}.Block",
    f"{FIRST}.Block",
    "dinov2.layers.block.Block",
    "dinov2.layers.block.NestedTensorBlock",
    "dinov3.layers.block.SelfAttentionBlock",
)
ATTENTIONS = (
    f"{OURS}.Attention",
    f"{FIRST}.Attention",
    "dinov2.layers.attention.Attention",
    "dinov2.layers.attention.MemEffAttention",
    "dinov3.layers.attention.SelfAttention",
)
MASKED = (f"{OURS}.MaskedLinear", "dinov3.layers.attention.LinearKMaskedBias")
PACKED = MlpNames("w12", "w3", "", fused=True)
SPLIT = MlpNames("w2", "w3", "", fc_gate="w1")

READ = PartReader(
    mlps={
        f"{OURS}.Mlp": MlpNames(),
        f"{FIRST}.Mlp": MlpNames(),
        "dinov2.layers.mlp.Mlp": MlpNames(),
        "dinov3.layers.ffn_layers.Mlp": MlpNames(),
        f"{OURS}.PackedSwiGLU": PACKED,
        "dinov2.layers.swiglu_ffn.SwiGLUFFN": PACKED,
        "dinov2.layers.swiglu_ffn.SwiGLUFFNFused": PACKED,
        f"{OURS}.SplitSwiGLU": SPLIT,
        "dinov3.layers.ffn_layers.SwiGLUFFN": SPLIT,
    },
    scales=(f"{OURS}.LayerScale", "dinov2.layers.layer_scale.LayerScale", "dinov3.layers.layer_scale.LayerScale"),
)


def block(module: Reader) -> BlockSpec:
    """Return the facts of a block."""
    if not module.is_a(*BLOCKS):
        raise module.unsupported("its kind of block")
    attn = module.attn
    if not attn.is_a(*ATTENTIONS):
        raise attn.unsupported("its kind of attention")
    if not attn.qkv.is_a(*MASKED):
        READ.linear(attn.qkv)
    READ.linear(attn.proj)
    d_head = attn.qkv.out_features // 3 // attn.num_heads
    if attn.scale != d_head**-0.5 and not attn.is_a(f"{OURS}.Attention", f"{FIRST}.Attention"):
        raise attn.unsupported(f"scale={attn.scale!r}, which it gives to some of its kernels and not to others")
    return BlockSpec(
        attn=AttentionSpec(n_heads=attn.num_heads, n_kv_heads=attn.num_heads, d_head=d_head, scale=attn.scale),
        mlp=READ.mlp(module.mlp),
        ln1=READ.norm(module.norm1),
        ln2=READ.norm(module.norm2),
        attn_scale=_scaled(module, "ls1"),
        mlp_scale=_scaled(module, "ls2"),
    )


def _scaled(module: Reader, name: str) -> bool:
    return module.has(name) and READ.scaled(getattr(module, name))


def block_rows(module: Reader) -> str:
    """Return the weight rows of one block; its function ``masked`` multiplies a bias with its mask."""
    at = "blocks.{l}"
    masked = module.attn.qkv.has("bias_mask")
    bias = f"[{at}.attn.qkv.bias, {at}.attn.qkv.bias_mask]" if masked else f"{at}.attn.qkv.bias | zeros"
    rows = f"""
        {at}.norm1.{{*}}        ->  {at}.ln1.{{*}}
        {at}.attn.qkv.weight    ->  {at}.attn.qkv.weight
        {bias}                  ->  {at}.attn.qkv.bias  {": {masked}" if masked else ""}
        {at}.ls1.gamma          ->  {at}.ls1.gamma
        {at}.norm2.{{*}}        ->  {at}.ln2.{{*}}
        {at}.ls2.gamma          ->  {at}.ls2.gamma
    """ + linear_rows(f"{at}.attn.proj", f"{at}.attn.out")
    return rows + READ.mlp_rows(module.mlp, f"{at}.mlp", f"{at}.mlp")


def block_hooks(module: Reader, *, rope: bool, stepwise: bool) -> str:
    """Return the hook rows of one block; ``h`` is its number of heads.

    Args:
        rope: queries and keys are turned.
        stepwise: upstream can be made to compute attention step by step.
    """
    at, turned = "blocks.{l}", "rot_" if rope else ""  # queries and keys are seen where they are multiplied
    if stepwise:
        attention = f"""
            {at}.attn @ matmul : in    ->  {at}.attn.hook_{turned}q      : b h p d -> b p h d
            {at}.attn @ matmul : in1   ->  {at}.attn.hook_{turned}k      : b h d p -> b p h d
            {at}.attn @ matmul#1 : in1 ->  {at}.attn.hook_v              : b h p d -> b p h d
            {at}.attn @ softmax : in   ->  {at}.attn.hook_attn_scores
            {at}.attn @ softmax        ->  {at}.attn.hook_pattern
        """
    else:
        kernel = f"{at}.attn @ scaled_dot_product_attention"
        attention = f"""
            {kernel} : in   ->  {at}.attn.hook_{turned}q  : b h p d -> b p h d
            {kernel} : in1  ->  {at}.attn.hook_{turned}k  : b h p d -> b p h d
            {kernel} : in2  ->  {at}.attn.hook_v          : b h p d -> b p h d
        """
    scaled = _scaled(module, "ls1")
    return f"""
        {attention}
        {at} : in                  ->  {at}.hook_resid_pre
        {at}.norm1                 ->  {at}.ln1.hook_normalized
        {at}.attn.proj : in        ->  {at}.attn.hook_z              : b p (h d) -> b p h d
        {at}.{"ls1" if scaled else "attn"}  ->  {at}.hook_attn_out
        {at}.norm2 : in            ->  {at}.hook_resid_mid
        {at}.norm2                 ->  {at}.ln2.hook_normalized
        {at}.{"ls2" if scaled else "mlp"}   ->  {at}.hook_mlp_out
        {at}                       ->  {at}.hook_resid_post
        {READ.mlp_hooks(module.mlp, f"{at}.mlp", f"{at}.mlp")}
    """
