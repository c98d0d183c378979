"""What the hook maps of video models without a canonical form share: rows and equations of attention and MLP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

Claim = tuple[str, Tensor, Tensor]
Acts = Mapping[str, Tensor]
KERNEL = "scaled_dot_product_attention"


def how(lead: str, held: str, shown: str | None = None) -> str:
    """Return axes, or einops where upstream folds some into one.

    >>> how("(batch frame)", "head pos d_head", "pos head d_head")
    '(batch frame) head pos d_head -> batch frame pos head d_head'
    """
    left, right = f"{lead} {held}", f"{lead.strip('()')} {shown or held}"
    return right if left == right else f"{left} -> {right}"


def square_rows(source: str, target: str, axes: str, *, fused: bool) -> str:
    """Return the rows of scores and pattern, from the fused kernel or from a softmax of its own."""
    scores, pattern = (
        (f"{source} @ {KERNEL} : scores", f"{source} @ {KERNEL} : pattern")
        if fused
        else (f"{source} @ softmax : in", f"{source} @ softmax")
    )
    return f"""
        {scores}   ->  {target}.hook_attn_scores  : {axes}  = q . k * scale
        {pattern}  ->  {target}.hook_pattern      : {axes}  = softmax(attn_scores)
    """


def attention_equations(
    at: str, acts: Acts, scale: float, out: nn.Module | None, added: Tensor | None
) -> Iterator[Claim]:
    """Yield what scores and the output of an attention are.

    Args:
        out: the output projection, if there is one.
        added: what it returns.
    """
    turned = "rot_" if f"{at}.hook_rot_q" in acts else ""
    q, k = (acts[f"{at}.hook_{turned}{x}"] for x in "qk")
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) * scale
    yield f"{at}: scores = q . k * scale", acts[f"{at}.hook_attn_scores"], scores
    if out is not None and added is not None:
        made = out(acts[f"{at}.hook_z"].flatten(-2))
        yield f"{at}: z W_O + b_O is what attention adds", added, made.reshape(added.shape)


def mlp_equations(
    at: str, normed: Tensor, up: nn.Module, act: nn.Module, down: nn.Module, acts: Acts
) -> Iterator[Claim]:
    """Yield what an MLP makes of the normed stream."""
    yield f"{at}: mlp.pre = x W_in + b_in", acts[f"{at}.mlp.hook_pre"], up(normed)
    yield f"{at}: mlp.post = act(pre)", acts[f"{at}.mlp.hook_post"], act(acts[f"{at}.mlp.hook_pre"])
    yield f"{at}: mlp_out = post W_out + b_out", acts[f"{at}.hook_mlp_out"], down(acts[f"{at}.mlp.hook_post"])
