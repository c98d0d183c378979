"""transformers' dual encoders, and towers with a projection behind them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import ClassVar

from torch import Tensor, nn

from prisma_clip.canonical.common import linear
from prisma_clip.canonical.hf_bert import through
from prisma_clip.canonical.hf_parts import IGNORED, Tower, eager, models, pixels, texts
from prisma_clip.canonical.hf_towers import TOWERS
from prisma_core.plugin import Adapter, AnySpec, DualSpec, HookMap, ModelSpec, Reader, TextSpec, WeightMap, linear_rows


class Projected(Adapter):
    """A tower, and a linear layer behind what it returns."""

    types = models(
        "clip.modeling_clip.CLIPVisionModelWithProjection",
        "clip.modeling_clip.CLIPTextModelWithProjection",
        "metaclip_2.modeling_metaclip_2.MetaClip2VisionModelWithProjection",
        "metaclip_2.modeling_metaclip_2.MetaClip2TextModelWithProjection",
    )
    ignored: ClassVar[Mapping[str, str]] = IGNORED

    def spec(self, upstream: Reader) -> AnySpec:
        at, projection = _which(upstream)
        return projected_spec(getattr(upstream, at), getattr(upstream, projection))

    def weights(self, upstream: Reader, spec: AnySpec) -> WeightMap:
        at, projection = _which(upstream)
        return projected_weights(upstream, spec, at, projection)

    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        at, projection = _which(upstream)
        return projected_hooks(upstream, spec, at, projection)

    def call(self, upstream: nn.Module, *inputs: Tensor) -> Tensor:
        at, _ = _which(Reader(upstream))
        if at == "vision_model":
            return upstream(**pixels(upstream.vision_model, *inputs)).image_embeds
        spec = self.spec(Reader(upstream))
        assert isinstance(spec, TextSpec)
        return upstream(**texts(spec, *inputs)).text_embeds

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return eager(upstream)


def _which(upstream: Reader) -> tuple[str, str]:
    return ("vision_model", "visual_projection") if upstream.has("vision_model") else ("text_model", "text_projection")


def tower(module: Reader) -> Tower:
    """Return the adapter of a tower.

    Raises:
        UnsupportedArchitecture: it is of another kind.
    """
    for adapter in TOWERS:
        if module.is_a(*adapter.types):
            return adapter
    raise module.unsupported("its kind of tower")


def projected_spec(module: Reader, projection: Reader | None) -> ModelSpec | TextSpec:
    """Return the facts of a tower with a linear layer behind it."""
    spec = tower(module).spec(module)
    assert isinstance(spec, ModelSpec | TextSpec)
    if projection is None:
        return spec
    more = {} if tower(module).pooled is None else {"pool": tower(module).pooled}
    return spec.model_copy(update={"n_classes": linear(projection).out_features, **more})


def projected_weights(upstream: Reader, spec: AnySpec, at: str, projection: str | None) -> WeightMap:
    """Return the weight map of a tower with a linear layer behind it."""
    module = getattr(upstream, at)
    table = tower(module).weights(module, spec).prefixed(f"{at}.", "")
    if projection is None:
        return table
    if module.has("transformation"):
        return table.without("head.{*}") | through(f"{at}.transformation", projection, "head")
    return table | WeightMap.parse(linear_rows(projection, "head"))


def projected_hooks(upstream: Reader, spec: AnySpec, at: str, projection: str | None) -> HookMap:
    """Return the hook map of a tower with a linear layer behind it."""
    module = getattr(upstream, at)
    table = tower(module).hooks(module, spec).prefixed(f"{at}.", "")
    if projection is None:
        return table
    head = HookMap.parse(f"{projection}  ->  hook_logits\n")
    if isinstance(spec, TextSpec) and not module.has("transformation"):
        head = head | HookMap.parse(f"{projection} : in  ->  hook_pooled\n")
    return table.without("hook_logits") | head


class HfDual(Adapter):
    """CLIP, SigLIP, SigLIP 2 and MetaCLIP 2 as transformers has them."""

    types = models(
        "clip.modeling_clip.CLIPModel",
        "siglip.modeling_siglip.SiglipModel",
        "siglip2.modeling_siglip2.Siglip2Model",
        "metaclip_2.modeling_metaclip_2.MetaClip2Model",
        "altclip.modeling_altclip.AltCLIPModel",
        "chinese_clip.modeling_chinese_clip.ChineseCLIPModel",
    )
    ignored: ClassVar[Mapping[str, str]] = IGNORED

    def spec(self, upstream: Reader) -> DualSpec:
        visual, written = (None, None)
        if upstream.has("visual_projection"):
            visual, written = upstream.visual_projection, upstream.text_projection
        vision, text = projected_spec(upstream.vision_model, visual), projected_spec(upstream.text_model, written)
        assert isinstance(vision, ModelSpec)
        assert isinstance(text, TextSpec)
        if vision.pool.kind == "none":
            raise upstream.vision_model.unsupported("a tower that returns all tokens instead of one vector")
        return DualSpec(vision=vision, text=text, logit_bias=upstream.has("logit_bias"))

    def weights(self, upstream: Reader, spec: AnySpec) -> WeightMap:
        assert isinstance(spec, DualSpec)
        visual, written = _projections(upstream)
        scalar = "  : 1 ->" if upstream.logit_scale.ndim else ""
        pair = WeightMap.parse(f"""
            logit_scale  ->  logit_scale {scalar}
            logit_bias   ->  logit_bias  {scalar}
        """)
        return (
            projected_weights(upstream, spec.vision, "vision_model", visual).prefixed("", "vision.")
            | projected_weights(upstream, spec.text, "text_model", written).prefixed("", "text.")
            | pair
        )

    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        assert isinstance(spec, DualSpec)
        visual, written = _projections(upstream)
        pair = HookMap.parse("""
            @ matmul : in  ->  hook_text_embed
            @ matmul : in1  ->  hook_image_embed  : d b -> b d
        """)
        return (
            projected_hooks(upstream, spec.vision, "vision_model", visual).prefixed("", "vision.")
            | projected_hooks(upstream, spec.text, "text_model", written).prefixed("", "text.")
            | pair
        )

    def call(self, upstream: nn.Module, *inputs: Tensor) -> Tensor:
        image, tokens = inputs
        spec = self.spec(Reader(upstream))
        return upstream(**texts(spec.text, tokens), **pixels(upstream.vision_model, image)).logits_per_image

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return eager(upstream)


def _projections(upstream: Reader) -> tuple[str | None, str | None]:
    return ("visual_projection", "text_projection") if upstream.has("visual_projection") else (None, None)
