"""Rows of tables that adapters of several libraries write alike, and checks of what they read alike."""

from __future__ import annotations

from collections.abc import Sequence

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
