"""timm's rotary embeddings: the tables upstream turns queries and keys by, and how they follow another grid."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call

from prisma_core.adapter import Reader
from prisma_core.layout import TokenLayout
from prisma_core.spec import RopeGrid, RopeSpec

AXIAL = "timm.layers.pos_embed_sincos.RotaryEmbeddingCat"
DINOV3 = "timm.layers.pos_embed_sincos.RotaryEmbeddingDinoV3"
MIXED = "timm.layers.pos_embed_sincos.RotaryEmbeddingMixed"
MULTIMODAL = "timm.layers.pos_embed_sincos.RotaryEmbeddingMRope"

_MADE = "what the tables were made from, and those are read"
_AUGMENT = "augments coordinates in training only"
IGNORED = {
    f"{name}.{attribute}": reason
    for name in ("RotaryEmbeddingCat", "RotaryEmbeddingDinoV3", "RotaryEmbeddingMixed", "RotaryEmbeddingMRope")
    for attribute, reason in {
        "dim": _MADE,
        "depth": _MADE,
        "num_heads": _MADE,
        "max_res": _MADE,
        "temperature": _MADE,
        "linear_bands": _MADE,
        "in_pixels": _MADE,
        "min_period": _MADE,
        "max_period": _MADE,
        "mrope_section": _MADE,
        "grid_indexing": _MADE,
        "grid_offset": _MADE,
        "grid_type": _MADE,
        "ref_feat_shape": _MADE,
        "normalize_coords": _MADE,
        "rotate_half": "attention says how it turns; tables are taken as they are",
        "shift_coords": _AUGMENT,
        "jitter_coords": _AUGMENT,
        "rescale_coords": _AUGMENT,
        "aug_active": _AUGMENT,
    }.items()
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
            waves=tuple(module.periods.tolist()),
            column_first=column_first,
            offset=module.grid_offset,
            normalize=module.normalize_coords,
        )
    if module.grid_type != "index":
        return None
    reference = module.ref_feat_shape
    return RopeGrid(
        coordinates="index",
        waves=tuple(module.bands.tolist()),
        column_first=column_first,
        offset=module.grid_offset,
        reference=None if reference is None else tuple(reference),
        in_float32=True,
    )


def rope_rows(module: Reader, source: str) -> str:
    """Return the weight row of the tables; its function is ``rope_tables``."""
    names = ", ".join(f"{source}.{name}" for name in _tensors(module.module))
    return f"""
        [{names}]  ->  [rope_cos, rope_sin]  :  {{rope}}
    """


def rope_tables(module: Reader, spec: RopeSpec, layout: TokenLayout) -> Callable[..., Tensor]:
    """Return the function that makes both tables, one after the other, of the embedding's own tensors.

    It is upstream's own, so that numbers and gradients are.
    """
    own = copy.deepcopy(module.module).eval()
    cached = module.has("feat_shape")
    embed = _Embed(own, None if cached else (layout.rows, layout.columns))
    names = [f"rope.{name}" for name in _tensors(own)]

    def tables(*tensors: Tensor) -> Tensor:
        made = functional_call(embed, dict(zip(names, tensors, strict=True)), ())
        floating = next(tensor for tensor in tensors if tensor.is_floating_point())
        made = made.to(torch.promote_types(made.dtype, floating.dtype))
        made = rearrange(made, "l h p d -> l p h d" if spec.per_layer else "p d -> p 1 d")
        sin, cos = made.chunk(2, dim=-1)
        return torch.cat([_with_prefix(cos, 1.0, layout.n_prefix), _with_prefix(sin, 0.0, layout.n_prefix)])

    return tables


def _with_prefix(table: Tensor, value: float, n_prefix: int) -> Tensor:
    prefix = table.new_full((*table.shape[:-3], n_prefix, *table.shape[-2:]), value)
    return torch.cat([prefix, table], dim=-3)


def _tensors(module: nn.Module) -> list[str]:
    return [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]


class _Embed(nn.Module):
    """A rotary embedding called the way its model calls it."""

    def __init__(self, rope: nn.Module, shape: tuple[int, int] | None):
        super().__init__()
        self.rope = rope
        self.shape = shape

    def forward(self) -> Tensor:
        return self.rope.get_embed() if self.shape is None else self.rope.get_embed(shape=self.shape)  # pyright: ignore
