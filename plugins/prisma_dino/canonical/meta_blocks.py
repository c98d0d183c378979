"""The blocks of Meta's own layout: facts, weight rows and hook rows."""

from __future__ import annotations

from prisma_core.maps.reader import Reader
from prisma_core.spec import AttentionSpec, BlockSpec, MlpSpec
from prisma_core.toolbox.rows import linear_rows
from prisma_dino.canonical import blocks

BLOCKS = ("Block", "NestedTensorBlock", "SelfAttentionBlock")
ATTENTIONS = ("Attention", "MemEffAttention", "SelfAttention")
QKV = ("torch.nn.modules.linear.Linear", "MaskedLinear", "LinearKMaskedBias")


def block(module: Reader) -> BlockSpec:
    """Return the facts of a block."""
    if not module.is_a(*BLOCKS):
        raise module.unsupported("its kind of block")
    attn = module.attn
    if not attn.is_a(*ATTENTIONS) or not attn.qkv.is_a(*QKV):
        raise attn.unsupported("its kind of attention")
    width = attn.qkv.out_features // 3
    return BlockSpec(
        attn=AttentionSpec(
            n_heads=attn.num_heads, n_kv_heads=attn.num_heads, d_head=width // attn.num_heads, scale=attn.scale
        ),
        mlp=_mlp(module.mlp),
        ln1=blocks.norm(module.norm1),
        ln2=blocks.norm(module.norm2),
        attn_scale=_scaled(module, "ls1"),
        mlp_scale=_scaled(module, "ls2"),
    )


def _scaled(module: Reader, name: str) -> bool:
    if not module.has(name) or getattr(module, name).is_a(blocks.IDENTITY):
        return False
    if not getattr(module, name).is_a("LayerScale"):
        raise module.unsupported("its kind of layer scale")
    return True


def _mlp(module: Reader) -> MlpSpec:
    if module.is_a("Mlp"):
        return MlpSpec(d_mlp=module.fc1.out_features, act=blocks.activation(module.act))
    if module.has("w3") and (module.has("w12") or module.has("w1")):  # these call silu without keeping it
        return MlpSpec(d_mlp=module.w3.in_features, act="silu", gated=True)
    raise module.unsupported("its kind of MLP")


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
    if module.mlp.has("w12"):
        rows += f"""
            {at}.mlp.w12.weight        ->  [{at}.mlp.fc_gate.weight, {at}.mlp.fc_in.weight]
            {at}.mlp.w12.bias | zeros  ->  [{at}.mlp.fc_gate.bias, {at}.mlp.fc_in.bias]
        """
        parts = {"w3": "fc_out"}
    elif module.mlp.has("w1"):
        parts = {"w1": "fc_gate", "w2": "fc_in", "w3": "fc_out"}
    else:
        parts = {"fc1": "fc_in", "fc2": "fc_out"}
    return rows + "".join(linear_rows(f"{at}.mlp.{own}", f"{at}.mlp.{to}") for own, to in parts.items())


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
    rows = (
        attention
        + f"""
        {at} : in                  ->  {at}.hook_resid_pre
        {at}.norm1                 ->  {at}.ln1.hook_normalized
        {at}.attn.proj : in        ->  {at}.attn.hook_z              : b p (h d) -> b p h d
        {at}.{"ls1" if scaled else "attn"}  ->  {at}.hook_attn_out
        {at}.norm2 : in            ->  {at}.hook_resid_mid
        {at}.norm2                 ->  {at}.ln2.hook_normalized
        {at}.{"ls2" if scaled else "mlp"}   ->  {at}.hook_mlp_out
        {at}                       ->  {at}.hook_resid_post
    """
    )
    if module.mlp.has("w12"):
        return (
            rows
            + f"""
            {at}.mlp @ silu : in  ->  {at}.mlp.hook_pre
            {at}.mlp @ mul : in1  ->  {at}.mlp.hook_pre_linear
            {at}.mlp.w3 : in      ->  {at}.mlp.hook_post
        """
        )
    first, value, last = ("w1", "w2", "w3") if module.mlp.has("w1") else ("fc1", "fc1", "fc2")
    return (
        rows
        + f"""
        {at}.mlp.{first}      ->  {at}.mlp.hook_pre
        {at}.mlp.{value}      ->  {at}.mlp.hook_pre_linear
        {at}.mlp.{last} : in  ->  {at}.mlp.hook_post
    """
    )
