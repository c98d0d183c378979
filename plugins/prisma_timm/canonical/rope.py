"""timm's rotary embeddings: the tables upstream turns queries and keys by, and how they follow another grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from prisma_core.plugin import Reader, RopeGrid, RopeSpec, TokenLayout
from prisma_timm.canonical import functions

AXIAL = "timm.layers.pos_embed_sincos.RotaryEmbeddingCat"
DINOV3 = "timm.layers.pos_embed_sincos.RotaryEmbeddingDinoV3"
MIXED = "timm.layers.pos_embed_sincos.RotaryEmbeddingMixed"
MULTIMODAL = "timm.layers.pos_embed_sincos.RotaryEmbeddingMRope"

MADE_OF = ("bands", "dim", "depth", "num_heads", "max_res", "temperature", "linear_bands", "in_pixels", "m*_period")
CALLED_WITH = ("grid_*", "ref_feat_shape", "normalize_coords", "rotate_half", "mrope_section", "feat_shape", "t_[xy]")
KEPT = ("pos_embed", "pos_embed_cached")
IGNORED = {
    **{
        f"RotaryEmbedding*.{name}": "what tables are made from; they are taken from upstream's own function"
        for name in (*MADE_OF, *CALLED_WITH, *KEPT)
    },
    **{
        f"RotaryEmbedding*.{name}": "moves coordinates in training only"
        for name in ("shift_coords", "jitter_coords", "rescale_coords", "aug_active")
    },
}


def rope(module: Reader, layout: Literal["interleaved", "half"], dynamic: bool) -> RopeSpec:
    """Return the facts of a rotary embedding whose attentions turn channels by ``layout``."""
    if module.is_a(MIXED):
        return RopeSpec(layout=layout, per_layer=True, per_head=True)
    if not module.is_a(AXIAL, DINOV3, MULTIMODAL):
        raise module.unsupported("its kind of rotary embedding")
    return RopeSpec(layout=layout, grid=_grid(module, layout) if dynamic else None)


def _grid(module: Reader, layout: str) -> RopeGrid | None:
    if module.is_a(MULTIMODAL) or module.rotate_half != (layout == "half"):
        return None
    column_first = module.grid_indexing == "xy"
    if module.is_a(DINOV3):
        return RopeGrid(
            coordinates="centred",
            waves=_waves(module.periods),
            column_first=column_first,
            offset=module.grid_offset,
            normalize=module.normalize_coords,
        )
    if module.grid_type != "index":
        return None
    reference = module.ref_feat_shape
    return RopeGrid(
        coordinates="index",
        waves=_waves(module.bands),
        column_first=column_first,
        offset=module.grid_offset,
        reference=None if reference is None else tuple(reference),
        in_float32=True,
    )


def _waves(tensor: Tensor) -> tuple[float, ...]:
    return () if tensor.is_meta else tuple(tensor.tolist())  # a model without data has no waves, as it has no weights


def rope_rows(module: Reader, source: str) -> str:
    """Return the weight row of the tables; its function is ``rope_tables``."""
    names = ", ".join(f"{source}.{name}" for name in functions.own_tensors(module))
    return f"""
        [{names}]  ->  [rope_cos, rope_sin]  :  {{rope}}
    """


def rope_tables(module: Reader, spec: RopeSpec, layout: TokenLayout) -> Callable[..., Tensor]:
    """Return the function that makes both tables, one after the other, of the embedding's own tensors.

    It calls the embedding the way upstream's models do, so that numbers and gradients are upstream's.
    """
    options = {} if module.has("feat_shape") else {"shape": (layout.rows, layout.columns)}
    embed = functions.own_function(module, "get_embed", **options)

    def tables(*tensors: Tensor) -> Tensor:
        made = embed(*tensors)
        if any(tensor.dtype == torch.float64 for tensor in tensors):
            made = made.double()  # timm makes them in float32 in any model; in half precision it turns by what it keeps
        made = rearrange(made, "l h p d -> l p h d" if spec.per_layer else "p d -> p 1 d")
        sin, cos = made.chunk(2, dim=-1)
        return torch.cat([_with_prefix(cos, 1.0, layout.n_prefix), _with_prefix(sin, 0.0, layout.n_prefix)])

    return tables


def _with_prefix(table: Tensor, value: float, n_prefix: int) -> Tensor:
    prefix = table.new_full((*table.shape[:-3], n_prefix, *table.shape[-2:]), value)
    return torch.cat([prefix, table], dim=-3)
