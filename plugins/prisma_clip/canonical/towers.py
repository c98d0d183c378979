"""open_clip's models: the dual encoders, and each of their towers as a model of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from prisma_clip.canonical import native, timm_tower
from prisma_clip.canonical.hf_bert import OpenClipText
from prisma_core.plugin import (
    Adapter,
    AnySpec,
    DualSpec,
    HookMap,
    ModelSpec,
    Reader,
    TextSpec,
    WeightMap,
    multihead_attention,
)

VISION = "open_clip.transformer.VisionTransformer"
TEXT = "open_clip.transformer.TextTransformer"
TIMM = "open_clip.timm_model.TimmModel"
HF_TEXT = "open_clip.hf_model.HFTextEncoder"
CLIP = "open_clip.model.CLIP"
CUSTOM_TEXT = "open_clip.model.CustomTextCLIP"
COCA = "open_clip.coca_model.CoCa"

IGNORED = {
    **native.IGNORED,
    **timm_tower.IGNORED,
    "*.output_dict": "how outputs are wrapped",
    "*.context_length": "rows of the position embedding",
    "*.vocab_size": "rows of the token embedding",
    "CLIP.text_eos_id": "read where it is pooled at",
    "CoCa.pad_id": "what captions are filled up with",
}


@contextmanager
def _explicit(adapters: Sequence[tuple[Adapter, nn.Module]], upstream: nn.Module):
    with ExitStack() as stack:
        stack.enter_context(multihead_attention(upstream))
        for adapter, module in adapters:
            stack.enter_context(adapter.unfused_attention(module))
        yield


class VisionAdapter(Adapter):
    """open_clip's own vision tower."""

    types = (VISION,)
    ignored: ClassVar[Mapping[str, str]] = IGNORED

    def spec(self, upstream: Reader) -> ModelSpec:
        return native.vision(upstream)

    def weights(self, upstream: Reader, spec: AnySpec) -> WeightMap:
        assert isinstance(spec, ModelSpec)
        return native.vision_weights(upstream, spec)

    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        assert isinstance(spec, ModelSpec)
        return native.vision_hooks(upstream, spec)

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return multihead_attention(upstream)


class TimmAdapter(Adapter):
    """A vision tower of timm's in open_clip's wrapping."""

    types = (TIMM,)
    ignored: ClassVar[Mapping[str, str]] = IGNORED

    def spec(self, upstream: Reader) -> ModelSpec:
        return timm_tower.spec(upstream)

    def weights(self, upstream: Reader, spec: AnySpec) -> WeightMap:
        assert isinstance(spec, ModelSpec)
        return timm_tower.weights(upstream, spec)

    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        assert isinstance(spec, ModelSpec)
        return timm_tower.hooks(upstream, spec)

    def stem(self, upstream: Reader, spec: AnySpec) -> nn.Module | None:
        return timm_tower.trunk_adapter(upstream).stem(upstream.trunk, spec)

    def parts(self, upstream: Reader) -> Sequence[Adapter]:
        return [timm_tower.trunk_adapter(upstream)]

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        reader = Reader(upstream)
        return timm_tower.trunk_adapter(reader).unfused_attention(reader.trunk.module)


class TextAdapter(Adapter):
    """open_clip's own text tower."""

    types = (TEXT,)
    ignored: ClassVar[Mapping[str, str]] = IGNORED

    def spec(self, upstream: Reader) -> TextSpec:
        eos = upstream.eos_id if upstream.pool_type == "eos" else None
        return native.text(upstream, pool=upstream.pool_type, eos_id=eos)

    def weights(self, upstream: Reader, spec: AnySpec) -> WeightMap:
        assert isinstance(spec, TextSpec)
        return native.text_weights(upstream, spec)

    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        assert isinstance(spec, TextSpec)
        return native.text_hooks(upstream, spec) | HookMap.parse("-> hook_logits")

    def call(self, upstream: nn.Module, *inputs: Tensor) -> Tensor:
        (tokens,) = inputs
        if upstream.attn_mask is not None and upstream.cls_emb is None:  # a causal one takes only texts of full length
            tokens = F.pad(tokens, (0, upstream.context_length - tokens.shape[1]))
        return self.output(upstream(tokens))

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return multihead_attention(upstream)


TOWERS: dict[str, Adapter] = {
    VISION: VisionAdapter(),
    TIMM: TimmAdapter(),
    TEXT: TextAdapter(),
    HF_TEXT: OpenClipText(),
}


def tower(module: Reader) -> Adapter:
    """Return the adapter of a tower.

    Raises:
        UnsupportedArchitecture: it is of another kind.
    """
    for name, adapter in TOWERS.items():
        if module.is_a(name):
            return adapter
    raise module.unsupported("its kind of tower")


class DualAdapter(Adapter):
    """Dual encoders: open_clip's CLIP, CustomTextCLIP, and CoCa without the decoder that writes captions."""

    types = (CLIP, CUSTOM_TEXT, COCA)
    ignored: ClassVar[Mapping[str, str]] = IGNORED

    def spec(self, upstream: Reader) -> DualSpec:
        if upstream.is_a(COCA):
            upstream.visual.expect(output_tokens=True)
            upstream.text.expect(output_tokens=True)
        vision = tower(upstream.visual).spec(upstream.visual)
        text = self._text(upstream)
        assert isinstance(vision, ModelSpec)
        if "none" in (vision.pool.kind, text.pool.kind):
            raise upstream.unsupported("a tower that returns all tokens instead of one vector")
        return DualSpec(vision=vision, text=text, logit_bias=upstream.has("logit_bias"))

    def _text(self, upstream: Reader) -> TextSpec:
        if not upstream.is_a(CLIP):
            spec = tower(upstream.text).spec(upstream.text)
            assert isinstance(spec, TextSpec)
            return spec
        # CLIP takes the parts out of its text tower, and keeps them itself.
        eos = upstream.text_eos_id if upstream.text_pool_type == "eos" else None
        return native.text(upstream, pool=upstream.text_pool_type, eos_id=eos)

    def weights(self, upstream: Reader, spec: AnySpec) -> WeightMap:
        assert isinstance(spec, DualSpec)
        vision = tower(upstream.visual).weights(upstream.visual, spec.vision)
        if upstream.is_a(CLIP):
            text = native.text_weights(upstream, spec.text).prefixed("", "text.")
        else:
            text = tower(upstream.text).weights(upstream.text, spec.text).prefixed("text.", "text.")
        scalar = "  : 1 ->" if upstream.logit_scale.ndim else ""
        pair = WeightMap.parse(f"""
            logit_scale  ->  logit_scale {scalar}
            logit_bias   ->  logit_bias  {scalar}
            ignore text_decoder.{{*}} : writes captions; the dual encoder does not use it
        """)
        return vision.prefixed("visual.", "vision.") | text | pair

    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        assert isinstance(spec, DualSpec)
        vision = tower(upstream.visual).hooks(upstream.visual, spec.vision)
        pair = ""
        if upstream.is_a(CLIP):
            text = native.text_hooks(upstream, spec.text).prefixed("", "text.")
            pair = "@ normalize#1 : in  ->  text.hook_logits\n"
        else:
            text = tower(upstream.text).hooks(upstream.text, spec.text).prefixed("text.", "text.")
        if not upstream.is_a(COCA):  # whose forward writes captions, and needs as many texts as images
            pair += """
                @ normalize    ->  hook_image_embed
                @ normalize#1  ->  hook_text_embed
            """
        return vision.prefixed("visual.", "vision.") | text | HookMap.parse(pair)

    def stem(self, upstream: Reader, spec: AnySpec) -> nn.Module | None:
        assert isinstance(spec, DualSpec)
        return tower(upstream.visual).stem(upstream.visual, spec.vision)

    def parts(self, upstream: Reader) -> Sequence[Adapter]:
        text = [] if upstream.is_a(CLIP) else [tower(upstream.text)]
        return [*tower(upstream.visual).parts(upstream.visual), *text]

    def call(self, upstream: nn.Module, *inputs: Tensor) -> Tensor:
        image, tokens = inputs
        if Reader(upstream).is_a(COCA):  # its forward writes captions too, and needs a text for each image
            seen, read, scale = upstream.encode_image(image), upstream.encode_text(tokens), upstream.logit_scale.exp()
            bias = [] if upstream.logit_bias is None else [upstream.logit_bias]
        else:
            result = upstream(image, tokens)
            seen, read, scale, *bias = result.values() if isinstance(result, dict) else result  # as output_dict says
        alike = scale * seen @ read.T
        return alike + bias[0] if bias else alike

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        reader = Reader(upstream)
        towers = [reader.visual] if reader.is_a(CLIP) else [reader.visual, reader.text]
        return _explicit([(tower(one), one.module) for one in towers], upstream)
