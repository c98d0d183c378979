"""What adapters of many libraries read and write alike: rows of tables, and facts of torch's own modules."""

from __future__ import annotations

from collections.abc import Sequence

from prisma_core.adapter import Reader

CONV2D = "torch.nn.modules.conv.Conv2d"


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
    if len(set(tables)) != 1:
        raise upstream.unsupported("blocks built of different modules")
    return tables[0]


def plain_patches(proj: Reader) -> None:
    """Refuse a projection that does more than cut a picture into patches and multiply each with a matrix.

    Raises:
        UnsupportedArchitecture: naming what more it does.
    """
    if not proj.is_a(CONV2D) or proj.kernel_size != proj.stride:
        raise proj.unsupported("patches that overlap")
    padded = proj.padding not in ("valid", (0, 0))
    if padded or (*proj.dilation, proj.groups, proj.padding_mode) != (1, 1, 1, "zeros"):
        raise proj.unsupported("a patch projection that pads, skips or splits pixels")
