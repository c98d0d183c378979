"""Axes and rows that the hook maps of video models without a canonical form share."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

Equation = tuple[str, Tensor, Tensor]
Acts = Mapping[str, Tensor]


def how(lead: str, held: str, shown: str | None = None) -> str:
    """Write axes, or einops where upstream folds some into one.

    >>> how("(batch frame)", "head pos d_head", "pos head d_head")
    '(batch frame) head pos d_head -> batch frame pos head d_head'
    """
    left, right = f"{lead} {held}", f"{lead.strip('()')} {shown or held}"
    return right if left == right else f"{left} -> {right}"


def mlp_rows(at: str, to: str, token: str, *, x: str, act: str, lead: str = "batch") -> str:
    """Write the rows of an MLP whose layers are ``fc1`` and ``fc2``.

    Args:
        at: upstream's MLP.
        to: our block.
        token: the axis of its tokens.
        x: its input, as a formula names it.
        act: the path of its activation.
    """
    return f"""
        {at}.fc1       ->  {to}.mlp.hook_pre   : {how(lead, f"{token} d_mlp")}    = {at}.fc1({x})
        {at}.fc2 : in  ->  {to}.mlp.hook_post  : {how(lead, f"{token} d_mlp")}    = {act}(pre)
        {at}           ->  {to}.hook_mlp_out   : {how(lead, f"{token} d_model")}  = {at}.fc2(mlp.post)
    """
