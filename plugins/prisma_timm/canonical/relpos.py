"""timm.models.vision_transformer_relpos.VisionTransformerRelPos."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import ClassVar

from torch import Tensor, nn

from prisma_core.plugin import (
    Adapter,
    BlockSpec,
    HookMap,
    ModelSpec,
    Reader,
    TokenLayout,
    WeightMap,
    linear_rows,
    norm_rows,
    same_for_all,
)
from prisma_timm.canonical import common, functions
from prisma_timm.canonical.blocks import attention_hooks, stream_hooks

RES_POST = "timm.models.vision_transformer_relpos.ResPostRelPosBlock"
BLOCKS = ("timm.models.vision_transformer_relpos.RelPosBlock", RES_POST)
HOOKS = """
    patch_embed    ->  hook_embed
    blocks.0 : in  ->  hook_full_embed
"""


class RelPosAdapter(Adapter):
    """Blocks with a bias for each offset between two patches, from a table or an MLP, per layer or shared."""

    types = ("timm.models.vision_transformer_relpos.VisionTransformerRelPos",)
    ignored: ClassVar[Mapping[str, str]] = {
        **common.IGNORED,
        "RelPos[BM]*.*": "upstream's own function makes the bias of these",
    }

    def spec(self, upstream: Reader) -> ModelSpec:
        rows, columns = common.grid(upstream.patch_embed)
        layout = TokenLayout(cls=int(upstream.has("cls_token")), rows=rows, columns=columns)
        shared = upstream.has("shared_rel_pos")
        return ModelSpec(
            d_model=upstream.embed_dim,
            image_size=upstream.patch_embed.img_size,
            embed=common.patch_embed(upstream.patch_embed, pos=False, dynamic=False),
            layout=layout,
            blocks=tuple(_block(block, shared) for block in upstream.blocks),
            ln_final=common.norm(upstream.norm),
            pool=common.pool(upstream),
            ln_pool=common.norm(upstream.fc_norm),
            d_pool=upstream.embed_dim,
            n_classes=common.classes(upstream.head),
        )

    def weights(self, upstream: Reader, spec: ModelSpec) -> WeightMap:
        table = (
            linear_rows("patch_embed.proj", "embed.proj")
            + norm_rows("patch_embed.norm", "embed.norm")
            + """
            cls_token  ->  embed.prefix  :  1 n d -> n d
            """
            + same_for_all(upstream, [_block_rows(block) for block in upstream.blocks])
            + common.end_rows()
        )
        if not spec.blocks[0].attn.bias:
            return WeightMap.parse(table)
        source, owners = "blocks.{l}.attn.rel_pos", [block.attn.rel_pos for block in upstream.blocks]
        if upstream.has("shared_rel_pos"):
            source, owners = "shared_rel_pos", [upstream.shared_rel_pos]
        names = ", ".join(f"{source}.{name}" for name in functions.own_tensors(owners[0]))
        table += f"[{names}]  ->  blocks.{{l}}.attn.attn_bias  :  {{bias}}"
        return WeightMap.parse(table, {"bias": _bias(owners)})

    def hooks(self, upstream: Reader, spec: ModelSpec) -> HookMap:
        at = "blocks.{l}"
        rows = [
            stream_hooks(at, at, middle="mlp" if block.is_a(RES_POST) else "norm2")
            + attention_hooks(f"{at}.attn", f"{at}.attn", z="proj")
            + common.mlp_hooks(block.mlp, f"{at}.mlp", f"{at}.mlp")
            for block in upstream.blocks
        ]
        table = HOOKS + common.END_HOOKS + same_for_all(upstream, rows)
        return HookMap.parse(table, h=spec.blocks[0].attn.n_heads)

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return common.explicit_attention(upstream)


def _block(block: Reader, shared: bool) -> BlockSpec:
    attn, post = block.attn, block.is_a(RES_POST)
    if not block.is_a(*BLOCKS) or not attn.is_a("timm.models.vision_transformer_relpos.RelPosAttention"):
        raise block.unsupported("its kind of block")
    has_table = attn.has("rel_pos")
    if shared and has_table:
        raise attn.unsupported("a bias of its own besides the shared one")
    return BlockSpec(
        kind="res_post" if post else "pre",
        attn=common.heads(attn, bias=shared or has_table),
        mlp=common.mlp(block.mlp),
        ln1=common.norm(block.norm1),
        ln2=common.norm(block.norm2),
        attn_scale=not post and common.is_scaled(block.ls1),
        mlp_scale=not post and common.is_scaled(block.ls2),
    )


def _block_rows(block: Reader) -> str:
    at = "blocks.{l}"
    return (
        norm_rows(f"{at}.norm1", f"{at}.ln1")
        + linear_rows(f"{at}.attn.qkv", f"{at}.attn.qkv")
        + norm_rows(f"{at}.attn.q_norm", f"{at}.attn.q_norm")
        + norm_rows(f"{at}.attn.k_norm", f"{at}.attn.k_norm")
        + linear_rows(f"{at}.attn.proj", f"{at}.attn.out")
        + norm_rows(f"{at}.norm2", f"{at}.ln2")
        + common.mlp_rows(block.mlp, f"{at}.mlp", f"{at}.mlp")
        + f"""
            {at}.ls1.gamma  ->  {at}.ls1.gamma
            {at}.ls2.gamma  ->  {at}.ls2.gamma
        """
    )


def _bias(owners: list[Reader]) -> Callable[..., Tensor]:
    for owner in owners:
        if _kind(owner) != _kind(owners[0]):
            raise owner.unsupported("biases made in another way than the first layer's")
    make = functions.own_function(owners[0], "get_bias")
    return lambda *tensors: make(*tensors)[0]


def _kind(owner: Reader) -> tuple[object, ...]:
    if owner.is_a("timm.layers.pos_embed_rel.RelPosBias"):
        return "table", tuple(owner.window_size), owner.prefix_tokens
    if owner.is_a("timm.layers.pos_embed_rel.RelPosMlp"):
        window = tuple(owner.window_size)
        if not owner.bias_act.is_a("Sigmoid", "Identity"):
            raise owner.bias_act.unsupported("its activation of biases")
        return "mlp", window, owner.prefix_tokens, owner.mode, owner.bias_gain, owner.num_heads, common.mlp(owner.mlp)
    raise owner.unsupported("its kind of relative position")
