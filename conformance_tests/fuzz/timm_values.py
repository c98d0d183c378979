"""Arguments of timm's constructors: which there are, and other values for each."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any, get_type_hints

import pytest
from torch import nn

from .hf_fields import others

timm = pytest.importorskip("timm", reason="timm is missing: pip install 'prisma-interp[timm]'")

from timm import layers  # noqa: E402
from timm.models import vision_transformer as vit  # noqa: E402

# One architecture of each class that an adapter takes.
NAMES = (
    *("beit_base_patch16_224", "convnext_atto", "deepseek_vit_412m", "deit_tiny_distilled_patch16_224"),
    *("eva02_tiny_patch14_224", "vit_tiny_patch16_dinov3_qkvb", "hiera_tiny_224", "naflexvit_base_patch16_gap"),
    *("qwen3_vit_88m", "swin_tiny_patch4_window7_224", "swinv2_tiny_window16_256", "swinv2_cr_tiny_ns_224"),
    *("vit_tiny_patch16_224", "vit_srelpos_small_patch16_224", "samvit_base_patch16"),
)
# Values of arguments that take classes, by the end of their names.
CLASSES: dict[str, tuple[Any, ...]] = {
    "norm_layer": (
        *("layernorm", "rmsnorm", "simplenorm", "layernorm2d"),
        *(partial(layers.LayerNorm, eps=1e-2), partial(layers.LayerNorm, affine=False), layers.LayerNormFp32),
        *(layers.RmsNorm, layers.SimpleNorm, layers.LayerNorm2d, nn.LayerNorm, nn.BatchNorm1d, nn.Identity),
    ),
    "act_layer": ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "hard_swish", "mish", "prelu", nn.Tanh),
    "block_fn": (vit.ResPostBlock, vit.ParallelScalingBlock, vit.ParallelThingsBlock, vit.DiffParallelScalingBlock),
    "mlp_layer": (layers.GluMlp, layers.SwiGLU, layers.SwiGLUPacked, layers.GlobalResponseNormMlp, layers.ConvMlp),
    "attn_layer": ("diff", "", layers.Attention, layers.AttentionRope, layers.DiffAttention),
    "embed_layer": (layers.PatchEmbedWithSize, layers.HybridEmbed),
}
APART = {"self", "args", "kwargs", "device", "dtype"}


def arguments(kind: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """Return the arguments of a constructor of timm's by name, those it passes on too, but what places its numbers."""
    inits = [base.__init__ for base in kind.__mro__ if "__init__" in vars(base) and base.__module__.startswith("timm.")]
    parameters = {name: one for init in reversed(inits) for name, one in inspect.signature(init).parameters.items()}
    return {name: one for name, one in parameters.items() if name not in APART}


def values(kind: type[nn.Module], name: str, given: Any) -> Iterator[Any]:
    """Yield other values for an argument than the one that was given."""
    ending = next((end for end in CLASSES if name.endswith(end)), None)
    if ending is not None:
        yield from (one for one in CLASSES[ending] if one != given)
        return
    hint = next((hints[name] for base in kind.__mro__ if name in (hints := get_type_hints(base.__init__))), None)
    seen = [given]
    wide = [(given, 2 * given), (2 * given, given)] if type(given) is int and "uple" in str(hint) else []
    for other in (*others(name, given, hint, inspect.getsource(inspect.getmodule(kind) or timm)), *wide):
        if not any(type(other) is type(one) and other == one for one in seen):
            seen.append(other)
            yield other
