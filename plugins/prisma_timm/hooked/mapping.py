"""What the hook maps of timm's hierarchical and windowed families share: facts, rows and equations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prisma_core.plugin import MapAdapter, MapSpec, Reader

Claim = tuple[str, Tensor, Tensor]
KERNEL = "scaled_dot_product_attention"


class FamilyMap(MapAdapter):
    """A hook map of one family: every architecture of timm's module has the same kinds of parts.

    Attributes:
        small: arguments that make any of them small.
    """

    small: ClassVar[Mapping[str, Any]]


def facts(upstream: Reader, size: tuple[int, int], *others: tuple[int, int]) -> MapSpec:
    """Return what a model takes, given its native image size and others that it admits."""
    head = upstream.head.fc
    classes = None if head.is_a("Identity") else getattr(head.module, "out_features", None)
    return MapSpec(shape=(upstream.in_chans, *size), sizes=others, n_classes=classes)


def mlp_rows(block: Reader, source: str, target: str, *, how: str = "batch pos d_mlp") -> str:
    """Return the rows of timm's Mlp, with a global response norm or without."""
    inner = "grn" if block.mlp.has("grn") else None if block.mlp.norm.is_a("Identity") else "norm"
    rows = f"{source}.mlp.fc1  ->  {target}.mlp.hook_pre  : {how}  = x W_in + b_in\n"
    if inner is None:
        return rows + f"{source}.mlp.act  ->  {target}.mlp.hook_post  : {how}  = act(pre)\n"
    rows += f"{source}.mlp.act  ->  {target}.mlp.hook_mid  : {how}  = act(pre)\n"
    return rows + f"{source}.mlp.{inner}  ->  {target}.mlp.hook_post  : {how}  = {inner}(mid)\n"


def pattern_rows(source: str, target: str, how: str, *, module: bool = False) -> str:
    """Return the rows of scores and pattern where upstream takes the softmax in a step of its own.

    Args:
        module: the softmax is a module, not a function.
    """
    step = f"{source}.softmax" if module else f"{source} @ softmax"
    return f"""
        {step} : in  ->  {target}.hook_attn_scores  : {how}  = q . k * scale + bias
        {step}       ->  {target}.hook_pattern      : {how}  = softmax(attn_scores)
    """


def opened_rows(source: str, target: str, how: str) -> str:
    """Return the rows of scores and pattern where upstream calls the fused kernel."""
    return f"""
        {source} @ {KERNEL} : scores   ->  {target}.hook_attn_scores  : {how}  = q . k * scale + bias
        {source} @ {KERNEL} : pattern  ->  {target}.hook_pattern      : {how}  = softmax(attn_scores)
    """


def head_rows(head: Reader) -> str:
    """Return the rows of timm's classifier heads behind two-dimensional tokens."""
    if head.global_pool.is_identity():
        raise head.unsupported("a head without pooling")
    if not head.has("norm"):
        return """
            head.global_pool  ->  hook_pooled  : batch d_model  = mean over rows and columns
            head.fc           ->  hook_logits  : batch class
        """
    rows = """
        head.global_pool  ->  hook_pooled  : batch d_model 1 1 -> batch d_model  = mean over rows and columns
        head.norm  ->  ln_pool.hook_normalized  : batch d_model 1 1 -> batch d_model  = ln(pooled)
    """
    return rows + hidden_row(head) + "head.fc  ->  hook_logits  : batch class\n"


def hidden_row(head: Reader) -> str:
    """Return the row of the layer before the classifier, where there is one."""
    if head.pre_logits.is_a("Identity"):
        return ""
    return "head.pre_logits  ->  hook_pre_logits  : batch d_mlp  = act(ln(pooled) W + b)\n"


def mlp_equations(
    at: str, block: nn.Module, x: Tensor, acts: Mapping[str, Tensor], *, channels_first: bool = False
) -> Iterator[Claim]:
    """Yield what an MLP makes of its input ``x [... d]``.

    Args:
        channels_first: upstream's own tensors have the channels behind the batch.
    """
    mlp = block.get_submodule("mlp")
    pre, post = acts[f"{at}.mlp.hook_pre"], acts[f"{at}.mlp.hook_post"]
    made = mlp.get_submodule("act")(pre)
    if f"{at}.mlp.hook_mid" in acts:
        yield f"{at}: mlp.mid = act(pre)", acts[f"{at}.mlp.hook_mid"], made
        inner = mlp.get_submodule("grn" if hasattr(mlp, "grn") else "norm")
        mid = acts[f"{at}.mlp.hook_mid"]
        made = inner(mid.movedim(-1, 1)).movedim(1, -1) if channels_first else inner(mid)
    yield f"{at}: mlp.post = act(pre)", post, made
    weight, bias = _matrix(mlp.get_submodule("fc1"))
    yield f"{at}: mlp.pre = x W_in + b_in", pre, x.reshape(*pre.shape[:-1], -1) @ weight.T + bias


def mlp_out(block: nn.Module, acts: Mapping[str, Tensor], at: str) -> Tensor:
    """Return what an MLP's second layer makes of its inner activations."""
    weight, bias = _matrix(block.get_submodule("mlp.fc2"))
    return acts[f"{at}.mlp.hook_post"] @ weight.T + bias


def _matrix(linear: nn.Module) -> tuple[Tensor, Tensor | float]:
    weight, bias = linear.get_parameter("weight"), getattr(linear, "bias", None)
    return weight.flatten(1), 0.0 if bias is None else bias


def same_bias(at: str, products: Tensor, acts: Mapping[str, Tensor]) -> Claim:
    """Return the claim that scores are these products plus what is the same for every picture."""
    rest = acts[f"{at}.attn.hook_attn_scores"] - products
    return f"{at}: scores = q . k * scale + what no picture changes", rest, rest[:1].expand_as(rest)


def products(q: Tensor, k: Tensor) -> Tensor:
    """Return the dot products of queries and keys ``[... pos head d_head]``."""
    return torch.einsum("...qhd,...khd->...hqk", q, k)
