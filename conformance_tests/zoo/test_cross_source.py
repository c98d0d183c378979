"""One set of weights, put into the layout of each library that has the architecture: the same canonical activations.

The maps between the layouts are written out here, from the libraries' key names; they know nothing of the adapters.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from one_model import (
    BLOCKS,
    CONFIG,
    D_MLP,
    DEPTH,
    META,
    QKV,
    REGISTERS,
    SECOND,
    SMALL,
    WIDTH,
    State,
    agree,
    draw,
    hooked,
    image,
    renamed,
    split,
    timm,
    transformers,
    without,
)
from prisma_conformance.measure import worst
from prisma_dino.meta import Architecture, MetaViT
from torch import Tensor, nn

# -------------------------------------------------------------------- DINO


def test_the_first_dino_of_meta_timm_and_transformers() -> None:
    meta = MetaViT(Architecture(**META))
    state = draw(meta)
    hf = renamed(
        split(state, *QKV),
        (r"^(cls_token)", r"embeddings.\1"),
        (r"^pos_embed", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^blocks\.", "layers."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"^norm\.", "layernorm."),
        *BLOCKS,
    )
    config = transformers.ViTConfig(**CONFIG, intermediate_size=D_MLP)
    models = {
        "Meta": hooked(meta, state),
        "timm": hooked(timm.models.VisionTransformer(**SMALL), state),
        "transformers": hooked(transformers.ViTModel(config, add_pooling_layer=False), hf),
    }
    ends = {r"^hook_(pooled|logits)$": "transformers' ViTModel returns all tokens, the others the class token"}
    assert agree(models, image(), differ=ends) >= 2 * 35


# -------------------------------------------------------------------- DINOv2


def dinov2_of_transformers(state: State) -> dict[str, Tensor]:
    return renamed(
        split(split(state, *QKV), r"\.w12\.", ".gate_proj.", ".up_proj."),
        (r"^(cls_token|mask_token|register_tokens)", r"embeddings.\1"),
        (r"^pos_embed", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^blocks\.", "encoder.layer."),
        (r"^norm\.", "layernorm."),
        (r"\.w3\.", ".down_proj."),
        *BLOCKS,
    )


def test_dinov2_of_meta_transformers_and_timm() -> None:
    meta = MetaViT(Architecture(**SECOND))
    state = draw(meta)
    models = {
        "Meta": hooked(meta, state),
        "transformers": hooked(
            transformers.Dinov2Model(transformers.Dinov2Config(**CONFIG, mlp_ratio=D_MLP // WIDTH)),
            dinov2_of_transformers(state),
        ),
        "timm": hooked(timm.models.VisionTransformer(**SMALL, init_values=1.0), without(state, "mask_token")),
    }
    assert agree(models, image()) >= 2 * 40


@pytest.mark.parametrize("gated", [False, True])
def test_dinov2_with_registers_of_meta_transformers_and_timm(gated: bool) -> None:
    d_mlp = 2 * D_MLP // 3 if gated else D_MLP  # what transformers makes of the ratio
    kind = {"d_mlp": d_mlp, "mlp": "packed" if gated else "plain", "registers": REGISTERS}
    meta = MetaViT(Architecture(**{**SECOND, **kind}))
    state = draw(meta)
    names = (("register_tokens", "reg_token"), (r"\.w12\.", ".fc1."), (r"\.w3\.", ".fc2."))
    # timm adds the class token's position to the token itself, and keeps none for registers.
    folded = {
        **renamed(without(state, "mask_token"), *names),
        "cls_token": state["cls_token"] + state["pos_embed"][:, :1],
        "pos_embed": state["pos_embed"][:, 1:],
    }
    swiglu = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 2 * d_mlp / WIDTH}
    glu: dict[str, Any] = swiglu if gated else {}
    config = transformers.Dinov2WithRegistersConfig(
        **CONFIG, mlp_ratio=D_MLP // WIDTH, num_register_tokens=REGISTERS, use_swiglu_ffn=gated
    )
    models = {
        "Meta": hooked(meta, state),
        "transformers": hooked(transformers.Dinov2WithRegistersModel(config), dinov2_of_transformers(state)),
    }
    assert agree(models, image()) >= 40
    own = {**SMALL, "init_values": 1.0, "reg_tokens": REGISTERS, "no_embed_class": True, **glu}
    models["timm"] = hooked(timm.models.VisionTransformer(**own), folded)
    folds = {"^hook_pos_embed$": "timm adds the class token's position to the token; the sum is the same"}
    assert agree(models, image(), differ=folds) >= 2 * 40


# -------------------------------------------------------------------- DINOv3


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("key_bias", [False, True])
def test_dinov3_of_meta_transformers_and_timm(gated: bool, key_bias: bool) -> None:
    heads = 2  # of 12 channels, so of three periods
    third = {"registers": REGISTERS, "registers_name": "storage_tokens", "periods": 3, "masked_bias": not key_bias}
    meta = MetaViT(Architecture(**{**SECOND, **third, "heads": heads, "mlp": "split" if gated else "plain"}))
    state = draw(meta)
    keys = slice(WIDTH, 2 * WIDTH)
    mask = torch.ones(3 * WIDTH, dtype=torch.float64)
    mask[keys] = 0
    periods = 100.0 ** (torch.arange(3, dtype=torch.float64) / 3)
    files = {**state, "rope_embed.periods": periods}
    if not key_bias:
        files |= {f"blocks.{layer}.attn.qkv.bias_mask": mask for layer in range(DEPTH)}

    hf = renamed(
        split(state, *QKV),
        (r"^(cls_token|mask_token)", r"embeddings.\1"),
        (r"^storage_tokens", "embeddings.register_tokens"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings"),
        (r"^blocks\.", "model.layer."),
        *((r"\.w1\.", ".gate_proj."), (r"\.w2\.", ".up_proj."), (r"\.w3\.", ".down_proj.")),
        *((r"\.fc1\.", ".up_proj."), (r"\.fc2\.", ".down_proj.")),
        *BLOCKS,
    )
    hf["embeddings.mask_token"] = hf["embeddings.mask_token"][None]
    own = renamed(
        without(state, "mask_token"),
        (r"^storage_tokens", "reg_token"),
        (r"\.ls(\d)\.gamma", r".gamma_\1"),
        *((r"\.w1\.", ".fc1_g."), (r"\.w2\.", ".fc1_x."), (r"\.w3\.", ".fc2.")),
    )
    biases = {name: own.pop(name) for name in list(own) if name.endswith("qkv.bias")}
    if not key_bias:
        hf = without(hf, r"k_proj\.bias")
        for name, bias in biases.items():
            at = name.removesuffix("qkv.bias")
            own |= {f"{at}q_bias": bias[:WIDTH], f"{at}v_bias": bias[2 * WIDTH :]}

    config = transformers.DINOv3ViTConfig(
        **{**CONFIG, "num_attention_heads": heads},
        intermediate_size=D_MLP,
        num_register_tokens=REGISTERS,
        use_gated_mlp=gated,
        key_bias=key_bias,
    )
    if gated:
        config.hidden_act = "silu"
    eva: dict[str, Any] = {
        **SMALL,
        "num_heads": heads,
        "global_pool": "token",
        "use_fc_norm": False,
        "init_values": 1.0,
        "qkv_bias": True,
        "num_reg_tokens": REGISTERS,
        "use_abs_pos_emb": False,
        "use_rot_pos_emb": True,
        "rope_type": "dinov3",
        "rope_temperature": 100,
        "rope_rotate_half": True,
        "swiglu_mlp": gated,
        "swiglu_align_to": 8,
    }
    models = {"Meta": hooked(meta, files), "transformers": hooked(transformers.DINOv3ViTModel(config), hf)}
    if not key_bias:  # timm has no place for one
        models["timm"] = hooked(timm.models.Eva(**eva), own)
    # Each library rounds angles to float32 in its own order; with one set of tables everything else must agree.
    tables = {name: (model.rope_cos, model.rope_sin) for name, model in models.items()}
    for name, model in models.items():
        for ours, theirs in zip(tables[name], tables["Meta"], strict=True):
            assert worst(ours, theirs) < 1e-6
            ours.data = theirs.detach().clone()
        assert model.spec.layout.registers == REGISTERS
    assert agree(models, image()) >= (len(models) - 1) * 44
