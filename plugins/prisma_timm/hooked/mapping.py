"""Facts and rows that the hook maps of timm's hierarchical and windowed families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from prisma_core.plugin import MapAdapter, MapSpec, Reader

Equation = tuple[str, Any, Any]


class FamilyMap(MapAdapter):
    """A hook map of one family: every architecture of timm's module has the same kinds of parts.

    Attributes:
        small: arguments that make any of them small.
    """

    small: ClassVar[Mapping[str, Any]]


def facts(upstream: Reader, size: tuple[int, int], *others: tuple[int, int]) -> MapSpec:
    """Write the facts of a model, given its native image size and others that it admits."""
    head = upstream.head.fc
    classes = None if head.is_a("Identity") else getattr(head.module, "out_features", None)
    return MapSpec(shape=(upstream.in_chans, *size), sizes=others, n_classes=classes)


def mlp_rows(block: Reader, source: str, target: str, x: str, *, how: str = "batch pos d_mlp") -> str:
    """Write the rows of timm's Mlp, with a global response norm or without.

    Args:
        x: its input, as a formula names it.
        how: axes of its inner activations.
    """
    if not block.mlp.has("fc1"):
        raise block.mlp.unsupported("its kind of MLP")
    inner = "grn" if block.mlp.has("grn") else None if block.mlp.norm.is_a("Identity") else "norm"
    post = "post" if inner is None else "mid"
    rows = f"""
        {source}.mlp.fc1  ->  {target}.mlp.hook_pre     : {how}  = {source}.mlp.fc1({x})
        {source}.mlp.act  ->  {target}.mlp.hook_{post}  : {how}  = {source}.mlp.act(pre)
    """
    if inner is None:
        return rows
    return rows + f"{source}.mlp.{inner}  ->  {target}.mlp.hook_post  : {how}  = {source}.mlp.{inner}(mid)\n"


def head_rows(head: Reader, x: str) -> str:
    """Write the rows of timm's classifier heads behind two-dimensional tokens ``x``, as a formula names them."""
    if head.global_pool.is_identity():
        raise head.unsupported("a head without pooling")
    if not head.has("norm"):
        # Some models bring channels to the front for their head alone, where a formula has them last.
        pool = "mean" if head.global_pool.pool_type == "avg" else "head.global_pool"
        return f"""
            head.global_pool  ->  hook_pooled  : batch d_model  = {pool}({x})
            head.fc           ->  hook_logits  : batch class    = head.fc(pooled)
        """
    rows = f"""
        head.global_pool  ->  hook_pooled  : batch d_model 1 1 -> batch d_model  = head.global_pool({x})
        head.norm  ->  ln_pool.hook_normalized  : batch d_model 1 1 -> batch d_model  = head.norm(pooled)
    """
    return rows + classifier_rows(head)


def classifier_rows(head: Reader) -> str:
    """Write the rows of the classifier behind ``ln_pool``, and of the layer before it where there is one."""
    if head.pre_logits.is_a("Identity"):
        return "head.fc  ->  hook_logits  : batch class  = head.fc(ln_pool.normalized)\n"
    return """
        head.pre_logits  ->  hook_pre_logits  : batch d_mlp  = head.pre_logits(ln_pool.normalized)
        head.fc          ->  hook_logits      : batch class  = head.fc(pre_logits)
    """
