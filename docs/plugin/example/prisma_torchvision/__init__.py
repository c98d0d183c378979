"""torchvision's vision transformers for Prisma."""

from prisma_core import LoadError, ModelSpec, TokenLayout, UnknownName, hookimpl
from prisma_core.plugin import (
    Adapter,
    AttentionSpec,
    BlockSpec,
    Case,
    EmbedSpec,
    HookMap,
    Images,
    Loaded,
    MlpSpec,
    ModelInfo,
    NormSpec,
    PoolSpec,
    Preprocess,
    Source,
    WeightMap,
)

WEIGHTS = """
    conv_proj.{*}                                              ->  embed.proj.{*}
    class_token                                                ->  embed.prefix     : 1 n d -> n d
    encoder.pos_embedding                                      ->  embed.pos_embed  : 1 p d -> p d
    encoder.layers.encoder_layer_{l}.ln_{n}.{*}                ->  blocks.{l}.ln{n}.{*}
    encoder.layers.encoder_layer_{l}.self_attention.in_proj_{*}   ->  blocks.{l}.attn.qkv.{*}
    encoder.layers.encoder_layer_{l}.self_attention.out_proj.{*}  ->  blocks.{l}.attn.out.{*}
    encoder.layers.encoder_layer_{l}.mlp.0.{*}                 ->  blocks.{l}.mlp.fc_in.{*}
    encoder.layers.encoder_layer_{l}.mlp.3.{*}                 ->  blocks.{l}.mlp.fc_out.{*}
    encoder.ln.{*}                                             ->  ln_final.{*}
    heads.head.{*}                                             ->  head.{*}"""
HOOKS = """
    conv_proj                                        ->  hook_embed  : b d r c -> b (r c) d
    encoder.dropout                                  ->  hook_full_embed
    encoder.layers.encoder_layer_{l} : in            ->  blocks.{l}.hook_resid_pre
    encoder.layers.encoder_layer_{l}.ln_{n}          ->  blocks.{l}.ln{n}.hook_normalized
    encoder.layers.encoder_layer_{l}.self_attention  ->  blocks.{l}.hook_attn_out
    encoder.layers.encoder_layer_{l}.ln_2 : in       ->  blocks.{l}.hook_resid_mid
    encoder.layers.encoder_layer_{l}.mlp.0           ->  blocks.{l}.mlp.hook_pre
    encoder.layers.encoder_layer_{l}.mlp.3 : in      ->  blocks.{l}.mlp.hook_post
    encoder.layers.encoder_layer_{l}.mlp             ->  blocks.{l}.hook_mlp_out
    encoder.layers.encoder_layer_{l}                 ->  blocks.{l}.hook_resid_post
    encoder.ln                                       ->  hook_ln_final
    heads : in                                       ->  hook_pooled
    heads                                            ->  hook_logits"""


class TorchvisionAdapter(Adapter):
    types = ("torchvision.models.vision_transformer.VisionTransformer",)
    ignored = dict.fromkeys(("*.norm_layer", "*.seq_length"), "derived") | {"*.*dropout": "off in evaluation"}

    def spec(self, upstream):
        width, size, patch = upstream.hidden_dim, upstream.image_size, upstream.patch_size
        stem = upstream.conv_proj.expect("Conv2d", stride=(patch, patch), padding=(0, 0), dilation=(1, 1), groups=1)
        return ModelSpec(
            d_model=width,
            image_size=(size, size),
            embed=EmbedSpec(patch=stem.stride, in_channels=stem.expect(padding_mode="zeros").in_channels),
            layout=TokenLayout(cls=1, rows=size // patch, columns=size // patch),
            blocks=tuple(_block(layer, upstream.mlp_dim) for layer in upstream.encoder.layers),
            ln_final=NormSpec(eps=upstream.encoder.ln.expect("LayerNorm").eps),
            pool=PoolSpec(kind="token"),
            d_pool=width,
            n_classes=upstream.expect(representation_size=None).num_classes,
        )

    def weights(self, upstream, spec):
        return WeightMap.parse(WEIGHTS)

    def hooks(self, upstream, spec):
        return HookMap.parse(HOOKS)


def _block(layer, d_mlp):
    attn, (_, act, *_) = layer.self_attention, layer.mlp
    n_heads, d_head, width = layer.num_heads, attn.head_dim, attn.embed_dim
    attn.expect("MultiheadAttention", num_heads=n_heads, kdim=width, vdim=width, batch_first=True)
    attn.expect(bias_k=None, bias_v=None, add_zero_attn=False)
    act.expect("GELU", approximate="none")
    attention = AttentionSpec(n_heads=n_heads, n_kv_heads=n_heads, d_head=d_head, scale=d_head**-0.5)
    ln1, ln2 = (NormSpec(eps=norm.expect("LayerNorm").eps) for norm in (layer.ln_1, layer.ln_2))
    return BlockSpec(attn=attention, mlp=MlpSpec(d_mlp=d_mlp, act="gelu"), ln1=ln1, ln2=ln2)


class TorchvisionSource(Source):
    name, library, install = "torchvision", "torchvision", "pip install torchvision"

    def load(self, rest, *, pretrained=True):
        from torchvision.models import get_model

        tag, images = _find(rest)
        given = {"num_classes": len(tag.meta["categories"]), "image_size": tag.meta["min_size"][0]}
        try:
            model = get_model(rest.partition(".")[0], weights=tag if pretrained else None, **given)
        except (OSError, RuntimeError) as error:
            raise LoadError(f"The weights of torchvision:{rest} cannot be had from {tag.url}: {error}") from error
        return Loaded(model.eval(), images.preprocess, tuple(tag.meta["categories"]))

    def models(self):
        from torchvision.models import get_model_weights, list_models

        for name in list_models(include="vit_*"):
            yield from (ModelInfo(f"torchvision:{name}.{tag.name}", name, True) for tag in get_model_weights(name))

    def case(self, rest):
        from torchvision.models import VisionTransformer

        shape = {"image_size": 24, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 18, "mlp_dim": 28}
        images = _find(rest)[1]
        return Case(rest, lambda: VisionTransformer(**shape, num_classes=7), images=lambda upstream: images)


def _find(rest):
    from torchvision.models import get_model_weights

    name, _, tag = rest.partition(".")
    try:
        tag = get_model_weights(name)[tag or "DEFAULT"]
    except (ValueError, KeyError) as error:
        raise UnknownName(f"No model {rest!r}: `prisma models --source torchvision` lists what there is.") from error
    own = tag.transforms()
    size, mode = own.crop_size[0], own.interpolation.value
    fit = Preprocess(size=(size, size), crop=size / own.resize_size[0], interpolation=mode, mean=own.mean, std=own.std)
    return tag, Images(fit, own)


prisma_sources = hookimpl(lambda: [TorchvisionSource()])
prisma_adapters = hookimpl(lambda: [TorchvisionAdapter()])
prisma_cases = hookimpl(lambda: [TorchvisionSource().case("vit_b_16")])
