"""The blocks of transformers' DINOv2 and DINOv3, and what they are made of: facts, weight rows and hook rows."""

from __future__ import annotations

from typing import NamedTuple

from prisma_core.maps.reader import Reader
from prisma_core.spec import Activation, AttentionSpec, BlockSpec, MlpSpec, NormSpec
from prisma_core.toolbox.rows import linear_rows, masks_as_built

LAYER_NORM = "torch.nn.modules.normalization.LayerNorm"
LINEAR = "torch.nn.modules.linear.Linear"
IDENTITY = "torch.nn.modules.linear.Identity"
BLOCKS = ("Dinov2Layer", "Dinov2WithRegistersLayer", "DINOv3ViTLayer")
ATTENTIONS = ("Dinov2Attention", "Dinov2WithRegistersAttention", "DINOv3ViTAttention")
SCALES = ("Dinov2LayerScale", "Dinov2WithRegistersLayerScale", "DINOv3ViTLayerScale")

ACTIVATIONS: dict[str, Activation] = {
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",  # its constant is rounded to eleven digits
    "transformers.activations.AccurateGELUActivation": "gelu_tanh",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
    "transformers.activations.SiLUActivation": "silu",
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.ReLU": "relu",
}


class MlpNames(NamedTuple):
    """Where an MLP keeps its parts."""

    up: str
    down: str
    act: str
    gate: str | None = None


MLPS = {
    "Dinov2MLP": MlpNames("fc1", "fc2", "activation_fn"),
    "Dinov2WithRegistersMLP": MlpNames("fc1", "fc2", "activation_fn"),
    "Dinov2SwiGLUFFN": MlpNames("up_proj", "down_proj", "act_fn", "gate_proj"),
    "Dinov2WithRegistersSwiGLUFFN": MlpNames("up_proj", "down_proj", "act_fn", "gate_proj"),
    "DINOv3ViTMLP": MlpNames("up_proj", "down_proj", "act_fn"),
    "DINOv3ViTGatedMLP": MlpNames("up_proj", "down_proj", "act_fn", "gate_proj"),
}

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


def norm(module: Reader) -> NormSpec:
    """Return the facts of a layer norm."""
    if not module.is_a(LAYER_NORM):
        raise module.unsupported("a norm that is no layer norm")
    return NormSpec(eps=module.eps)


def block(module: Reader) -> BlockSpec:
    """Return the facts of a block."""
    if not module.is_a(*BLOCKS):
        raise module.unsupported("its kind of block")
    for scale in (module.layer_scale1, module.layer_scale2):
        if not scale.is_a(*SCALES):
            raise scale.unsupported("its kind of layer scale")
    return BlockSpec(
        attn=_attention(module.attention),
        mlp=_mlp(module.mlp),
        ln1=norm(module.norm1),
        ln2=norm(module.norm2),
        attn_scale=True,
        mlp_scale=True,
    )


def _attention(attn: Reader) -> AttentionSpec:
    if not attn.is_a(*ATTENTIONS):
        raise attn.unsupported("its kind of attention")
    masks_as_built(attn)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        _linear(getattr(attn, name))
    heads = attn.get("num_heads") or attn.num_attention_heads
    return AttentionSpec(n_heads=heads, n_kv_heads=heads, d_head=attn.head_dim, scale=attn.scaling)


def _linear(module: Reader) -> Reader:
    if not module.is_a(LINEAR):
        raise module.unsupported("a projection that is no linear layer")
    return module


def _mlp(module: Reader) -> MlpSpec:
    names = _mlp_names(module)
    for name in filter(None, (names.up, names.down, names.gate)):
        _linear(getattr(module, name))
    act: Reader = getattr(module, names.act)
    width = getattr(module, names.up).out_features
    return MlpSpec(d_mlp=width, act=activation(act), gated=names.gate is not None)


def _mlp_names(module: Reader) -> MlpNames:
    for kind, names in MLPS.items():
        if module.is_a(kind):
            return names
    raise module.unsupported("its kind of MLP")


def activation(module: Reader) -> Activation:
    """Return the name of an activation function."""
    for name, kind in ACTIVATIONS.items():
        if module.is_a(name):
            if kind == "gelu" and module.get("approximate", "none") != "none":
                raise module.unsupported("an approximated GELU")
            return kind
    raise module.unsupported("its activation function")


def classes(head: Reader) -> int | None:
    """Return how many classes a head tells apart; None if there is no head."""
    return None if head.is_a(IDENTITY) else _linear(head).out_features


def block_rows(module: Reader, source: str) -> str:
    """Return the weight rows of one block; ``source`` is its path."""
    to, attn = "blocks.{l}", f"{source}.attention"
    parts = {name: getattr(module.attention, name) for name in ("q_proj", "k_proj", "v_proj")}
    weights = ", ".join(f"{attn}.{name}.weight" for name in parts)
    biases = [f"{attn}.{name}.bias" if part.has("bias") else "zeros" for name, part in parts.items()]
    if len(set(biases)) == 3 or set(biases) == {"zeros"}:
        bias = "zeros" if biases[0] == "zeros" else f"[{', '.join(biases)}]"
    else:
        raise module.attention.unsupported("two of the biases of queries, keys and values missing")
    names = _mlp_names(module.mlp)
    rows = f"""
        {source}.norm1.{{*}}               ->  {to}.ln1.{{*}}
        [{weights}]                        ->  {to}.attn.qkv.weight
        {bias}                             ->  {to}.attn.qkv.bias
        {source}.layer_scale1.lambda1      ->  {to}.ls1.gamma
        {source}.norm2.{{*}}               ->  {to}.ln2.{{*}}
        {source}.layer_scale2.lambda1      ->  {to}.ls2.gamma
    """
    rows += linear_rows(f"{attn}.o_proj", f"{to}.attn.out")
    rows += linear_rows(f"{source}.mlp.{names.up}", f"{to}.mlp.fc_in")
    rows += linear_rows(f"{source}.mlp.{names.down}", f"{to}.mlp.fc_out")
    return rows + (linear_rows(f"{source}.mlp.{names.gate}", f"{to}.mlp.fc_gate") if names.gate else "")


def block_hooks(module: Reader, source: str, *, rope: bool) -> str:
    """Return the hook rows of one block; ``source`` is its path, ``h`` the number of its heads."""
    to, attn, names = "blocks.{l}", f"{source}.attention", _mlp_names(module.mlp)
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
        {source}.mlp.{names.gate or names.up}  ->  {to}.mlp.hook_pre
        {source}.mlp.{names.up}      ->  {to}.mlp.hook_pre_linear
        {source}.mlp.{names.down} : in  ->  {to}.mlp.hook_post
        {source}.layer_scale2        ->  {to}.hook_mlp_out
        {source}                     ->  {to}.hook_resid_post
    """
    if rope:  # two halves are exchanged with a cat each, then prefix and patches are joined again
        rows += f"""
            {attn} @ cat#2  ->  {to}.attn.hook_rot_q  : b h p d -> b p h d
            {attn} @ cat#3  ->  {to}.attn.hook_rot_k  : b h p d -> b p h d
        """
    return rows
