"""Rows and equations that adapters of several libraries write alike, and checks of what they read alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prisma_core.maps.places import FUSED
from prisma_core.maps.reader import Reader


def norm_rows(source: str, target: str) -> str:
    """Return the weight rows of a norm; ones and zeros where it has none."""
    return f"""
        {source}.weight | ones  ->  {target}.weight
        {source}.bias | zeros   ->  {target}.bias
    """


def linear_rows(source: str, target: str) -> str:
    """Return the weight rows of a linear layer; zeros where it has no bias."""
    return f"""
        {source}.weight        ->  {target}.weight
        {source}.bias | zeros  ->  {target}.bias
    """


def same_for_all(upstream: Reader, tables: Sequence[str]) -> str:
    """Return the one table that all blocks have.

    Raises:
        UnsupportedArchitecture: they have different ones.
    """
    if not tables:
        raise upstream.unsupported("no blocks")
    if (other := next((i for i, table in enumerate(tables) if table != tables[0]), None)) is not None:
        raise upstream.unsupported(f"blocks built of different modules: block {other} is not as block 0")
    return tables[0]


def per_block_table(tables: Sequence[str]) -> str:
    """Return the table that all blocks have, or all of theirs, numbered, where they are built of different modules."""
    if len(set(tables)) == 1:
        return tables[0]
    return "".join(table.replace("{l}", str(number)) for number, table in enumerate(tables))


def masks_as_built(attn: Reader, *, causal: bool = False) -> None:
    """Check that attention of transformers' reads the tokens that its model's own masks allow, and no others.

    Its kernels obey ``is_causal``: the attention's own, or one in the configuration, though no class declares it there.

    Args:
        causal: whether the model masks what comes after a token.

    Raises:
        UnsupportedArchitecture: a flag says otherwise.
    """
    flag = getattr(attn.get("config"), "is_causal", None)
    if flag is not None and bool(flag) != causal:
        raise attn.unsupported(f"config.is_causal={flag!r}, which changes what a token may read; take it out")
    if attn.get("is_causal") and not causal:
        raise attn.unsupported("causal attention: under fused kernels a token reads those before it alone")


def ends_with_last_stage(backbone: Reader, blocks: Reader) -> None:
    """Refuse a backbone whose last feature map is not the last block's.

    Raises:
        UnsupportedArchitecture: it is of an earlier stage, or there are more stages or fewer.
    """
    if len(backbone.stage_names) != len(blocks) + 1:  # the first is the embedding
        raise blocks.unsupported(f"{len(blocks)} blocks, where its stages are {list(backbone.stage_names)!r}")
    if backbone.out_features[-1] != backbone.stage_names[-1]:
        raise backbone.unsupported(
            f"a last feature map that is not the last block's (out_features={list(backbone.out_features)!r}; add "
            f"{backbone.stage_names[-1]!r}; the others are hook points)"
        )


# -------------------------------------------------------------------- models without a canonical form


def score_rows(
    source: str,
    target: str,
    axes: str,
    *,
    fused: bool,
    softmax: str = " @ softmax",
    scores: str = "q . k * scale + bias",
) -> str:
    """Write the rows of scores and pattern of one attention.

    >>> print(score_rows("blocks.0.attn", "blocks.0.attn", "batch head query_pos key_pos", fused=False, scores="q . k"))
    blocks.0.attn @ softmax : in  ->  blocks.0.attn.hook_attn_scores  : batch head query_pos key_pos  = q . k
    blocks.0.attn @ softmax  ->  blocks.0.attn.hook_pattern  : batch head query_pos key_pos  = softmax(attn_scores)
    <BLANKLINE>

    Args:
        source: upstream's module.
        target: our part.
        axes: of both, or einops: ``(batch window) head query_pos key_pos -> ...``.
        fused: whether it calls the fused kernel, which is then opened; else it takes a softmax in a step of its own.
        softmax: the place of that step behind the module: ``.softmax`` where it is a module.
        scores: what scores are: a formula, or words where ``MapAdapter.equations`` proves them.
    """
    first, second = (f"{source}{softmax} : in", f"{source}{softmax}")
    if fused:
        first, second = (f"{source} @ {FUSED} : {side}" for side in ("scores", "pattern"))
    return (
        f"{first}  ->  {target}.hook_attn_scores  : {axes}  = {scores}\n"
        f"{second}  ->  {target}.hook_pattern  : {axes}  = softmax(attn_scores)\n"
    )


def products(q: Tensor, k: Tensor) -> Tensor:
    """Dot products of queries and keys ``[... pos head d_head]``: ``[... head query_pos key_pos]``."""
    return torch.einsum("...qhd,...khd->...hqk", q, k)


def argument(module: nn.Module, path: str, *inputs: Tensor) -> Tensor:
    """Run a module of upstream's, and return what a submodule takes in: the windows that attention in one reads.

    Args:
        module: such as a block.
        path: of the submodule, below the module.
        inputs: of the module, as upstream has them.
    """
    taken: list[Tensor] = []
    hook = module.get_submodule(path).register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0].clone()))
    try:
        module(*inputs)
    finally:
        hook.remove()
    return taken[0]


def same_bias(at: str, products: Tensor, acts: Mapping[str, Tensor]) -> tuple[str, Tensor, Tensor]:
    """Equation for ``MapAdapter.equations``: scores are these products plus a bias that is the same for every input.

    It fails for another layer's queries or keys, and for the two exchanged; the bias itself it does not name.

    Args:
        at: the part that holds ``hook_attn_scores``, such as ``blocks.0.attn``.
        products: scaled products of queries and keys, with the axes of the scores.
        acts: activations of at least two inputs.
    """
    bias = acts[f"{at}.hook_attn_scores"] - products
    return f"{at}: scores = q . k * scale + a bias, the same for every input", bias, bias[:1].expand_as(bias)
