"""The names of all hook points that a canonical model can have."""

from __future__ import annotations

from prisma_core.model import ZooModel


def _in(parts: str, names: str) -> str:
    """Return each of these names in each of these parts."""
    return " ".join(f"{part}.{name}" for part in parts.split() for name in names.split())


_BLOCK = "blocks.{l}"
_ATTN = _in(_BLOCK, "attn attn.{l}")  # blocks of several branches side by side have each part once a branch
_MLP = f"pool.mlp head_mlp {_in(_BLOCK, 'mlp mlp.{l}')}"
_NORMS = f"""
    embed.norm ln_pre ln_final ln_pool pool.ln {_in(_BLOCK, "ln1 ln1.{l} ln2 ln2.{l}")}
    {_in(_ATTN, "q_norm k_norm ln")} {_in("pool.attn", "q_norm k_norm ln_latent")} {_in(_MLP, "ln pre_norm")}
"""
_NAMES = f"""
    hook_embed hook_pos_embed hook_full_embed hook_ln_pre hook_ln_final hook_pooled hook_pooled_dist hook_logits
    {_in("pool", "hook_attn_out hook_mlp_out")}
    {_in(_BLOCK, "hook_resid_pre hook_resid_mid hook_resid_post hook_attn_out hook_mlp_out")}
    {_in(_BLOCK, "hook_q_input hook_k_input hook_v_input")}
    {_in(f"pool.attn {_ATTN}", "hook_q hook_k hook_v hook_attn_scores hook_pattern hook_z")}
    {_in(_ATTN, "hook_rot_q hook_rot_k hook_result")}
    {_in(_MLP, "hook_pre hook_pre_linear hook_mid hook_post")}
    {_in(_NORMS, "hook_scale hook_normalized")}
"""
NAMES = frozenset(_NAMES.split())


def optional_hook_names(model: ZooModel) -> frozenset[str]:
    """The hook points that a model like this could have, had it every part; ``{l}`` for each number."""
    return frozenset(prefix + name for prefix in model.towers() for name in NAMES)
