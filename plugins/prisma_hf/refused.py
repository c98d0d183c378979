"""Families of transformers that no adapter takes and timm has as well, where they are hooked upstreams."""

from __future__ import annotations

from prisma_core.plugin import Refusal

INSTEAD = {  # feature, reference, classes
    ("relative positions that depend on the query", "timm:samvit_base_patch16"): (
        "sam.modeling_sam.SamModel",
        "sam.modeling_sam.SamVisionModel",
        "sam.modeling_sam.SamVisionEncoder",
    ),
    ("attention in windows", "timm:swin_tiny_patch4_window7_224"): (
        "swin.modeling_swin.SwinModel",
        "swin.modeling_swin.SwinForImageClassification",
        "swin.modeling_swin.SwinForMaskedImageModeling",
        "swin.modeling_swin.SwinBackbone",
    ),
    ("attention in windows", "timm:swinv2_tiny_window8_256"): (
        "swinv2.modeling_swinv2.Swinv2Model",
        "swinv2.modeling_swinv2.Swinv2ForImageClassification",
        "swinv2.modeling_swinv2.Swinv2ForMaskedImageModeling",
        "swinv2.modeling_swinv2.Swinv2Backbone",
    ),
    ("queries pooled between blocks", "timm:hiera_tiny_224"): (
        "hiera.modeling_hiera.HieraModel",
        "hiera.modeling_hiera.HieraForImageClassification",
        "hiera.modeling_hiera.HieraForPreTraining",
        "hiera.modeling_hiera.HieraBackbone",
    ),
    ("convolutions in place of attention", "timm:convnext_tiny"): (
        "convnext.modeling_convnext.ConvNextModel",
        "convnext.modeling_convnext.ConvNextForImageClassification",
        "convnext.modeling_convnext.ConvNextBackbone",
    ),
    ("convolutions in place of attention", "timm:convnextv2_tiny"): (
        "convnextv2.modeling_convnextv2.ConvNextV2Model",
        "convnextv2.modeling_convnextv2.ConvNextV2ForImageClassification",
        "convnextv2.modeling_convnextv2.ConvNextV2Backbone",
    ),
}


def refusals() -> list[Refusal]:
    """Return one for each family."""
    return [
        Refusal(
            tuple(f"transformers.models.{name}" for name in names),
            f"{feature}; timm's model of this family is a hooked upstream, such as prisma.load('{reference}')",
        )
        for (feature, reference), names in INSTEAD.items()
    ]
