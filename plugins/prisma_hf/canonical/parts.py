"""Parts of transformers' vision models: norms, activations, projections, unfused attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from prisma_core.plugin import TRANSFORMERS, NormClass, PartReader, Reader, at, eager_attention, multihead_attention

RMS = NormClass("rms", "variance_epsilon", in_float32=True, weight_in_float32=False)
READ = PartReader(
    norms={
        f"transformers.models.{name}RMSNorm": RMS
        for name in (
            "aimv2.modeling_aimv2.Aimv2",
            "internvl.modeling_internvl.InternVLVision",
            "ovis2.modeling_ovis2.Ovis2",
            "pixtral.modeling_pixtral.Pixtral",
            "qianfan_ocr.modeling_qianfan_ocr.QianfanOCRVision",
            "sapiens2.modeling_sapiens2.Sapiens2",
        )
    },
    activations=TRANSFORMERS,
)
norm, linear = READ.norm, READ.linear

IGNORED = {
    "*.config": "what it was built from; the facts are read off the modules",
    "*.gradient_checkpointing": "memory in training",
    "*.name_or_path": "where it came from",
    "*.warnings_issued": "what was said before",
    "*.generation_config": "of text",
    "*.can_generate": "of text",
    "*.num_labels": "the width of the head",
    "Sequential.1": "puts pixels of patches together to an image, behind the logits",
    "PixelShuffle.upscale_factor": "how pixels of patches are put together to an image, behind the logits",
    "*.kernel_config": "which kernels run",
    "*.loss_type": "of training",
    "*.mask_token": "stands for patches that the caller hides",
    "*.pooler": "its output stands beside the main output",
    "*.patch_size": "the size of the patch projection's kernel",
    "*.image_size": "the same in several places; one is read",
    "*.all_tied_weights_keys": "how weights are saved",
    "*.tie_weights_keys": "how weights are saved",
    "*.base_model_tp_plan": "how weights are spread over devices",
    "*.base_model_pp_plan": "how weights are spread over devices",
    "*.base_model_ep_plan": "how weights are spread over devices",
    "*.tp_plan": "how weights are spread over devices",
    "*.attention_dropout": "off in evaluation",
    "*.hidden_dropout_prob": "off in evaluation",
    "*.drop_prob": "off in evaluation",
    "*.num_channels": "the channels of the patch projection",
    "*.num_patches": "the number of positions",
    "*.patch_shape": "the image's size by that of a patch",
    "*.grid_size": "the image's size by that of a patch",
    "*.num_patches_per_side": "the image's size by that of a patch",
    "*.num_positions": "the number of positions",
    "*.num_tokens": "the number of positions less that of patches",
    "*.n_cls_tokens": "the number of tokens before the patches",
    "*RotaryEmbedding.rope_type": "upstream's own function makes the tables",
    "*RotaryEmbedding.attention_scaling": "upstream's own function makes the tables",
    "*.has_relative_position_bias": "there is a module for it, or none",
    "*.chunk_size_feed_forward": "memory",
    "*.seq_len_dim": "memory",
    "*.attention_head_size": "the width of the projections by the number of heads",
    "*.hidden_size": "the width of the projections",
    "*.intermediate_size": "the width of the projections",
    "*.num_key_value_groups": "the widths of the projections",
    "*.num_key_value_heads": "the widths of the projections",
    "*.num_features": "the width of each stage",
    "*.stage_names": "the streams that it can hand over; the last is its main output",
    "*.out_features": "the streams that it hands over",
    "*.backbone_type": "how it was built",
    "*.num_register_tokens": "the number of register tokens",
    "*.use_head": "there is a module for it, or none",
    "*.dropout": "off in evaluation",
    "*.dropout_prob": "off in evaluation",
    "*.drop_path*": "off in evaluation",
    "*Pooler.layernorm": "of what stands beside the main output",
    "*.deepstack_visual_indexes": "which streams the language model reads besides",
    "Embedding.padding_idx": "of training",
    "Embedding.max_norm": "the core refuses a model that sets it, whose passes change the weights",
    "Embedding.norm_type": "upstream sets no norm",
    "Sapiens2RopePositionEmbedding.base": "what the frequencies were made from; they are read",
    "Sapiens2RopePositionEmbedding.num_patches_*": "the image's size by that of a patch",
    "*.num_hidden_layers": "the number of blocks",
    "*.spatial_merge_*": "how many patches make a token of the language model",
    "*.num_grid_per_side": "the root of the number of positions",
    "*.temporal_patch_size": "the frames that the patch projection reads",
    "*.in_channels": "the channels of the patch projection",
    "*Attention.dim": "the width of the projections",
    "*.share_layernorm": "there is a norm behind each block, or one for all",
    "MultiheadAttention.dropout": "off in evaluation",
    "MultiheadAttention.[kv]dim": "the shape of the weights",
    "*.all_head_size": "heads times their width",
    "*.embed_dim": "the width of the projections",
    "*.head_dim": "the width of the projections by the number of heads",
    "*Pooler.activation": "of what stands beside the main output",
    "GELUActivation.act": "the function that the class is named after",
    "GELUTanh.act": "the function that the class is named after",
    "AccurateGELUActivation.precomputed_constant": "of the tanh formula",
    "*DropPath.*": "off in evaluation",
}


def find(reader: Reader, path: str) -> Any:
    """Return what stands at a dotted path, or None where it ends in nothing."""
    above, _, name = path.rpartition(".")
    owner = at(reader, above)
    return getattr(owner, name) if owner.has(name) else None


@contextmanager
def explicit_attention(upstream: nn.Module) -> Iterator[None]:
    """Make upstream compute attention step by step for the time of the scope, where its class is another one too."""
    fused = [part for part in upstream.modules() if "Sdpa" in type(part).__name__]
    kinds = [type(part) for part in fused]
    try:
        for part, kind in zip(fused, kinds, strict=True):
            part.__class__ = kind.__base__
        with eager_attention(upstream), multihead_attention(upstream):
            yield
    finally:
        for part, kind in zip(fused, kinds, strict=True):
            part.__class__ = kind
