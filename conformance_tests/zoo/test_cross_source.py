"""One set of weights, put into the layout of each library that has the architecture: the same canonical activations.

The maps between the layouts are written out here, from the libraries' key names; they know nothing of the adapters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from prisma_conformance.measure import worst
from prisma_dino.meta import Architecture, MetaViT
from torch import Tensor, nn

import prisma_core as prisma
from prisma_core.transformer import ZooModel

MISSING = "it is not installed: pip install prisma-interp[all]"
timm = pytest.importorskip("timm", reason=MISSING)
transformers = pytest.importorskip("transformers", reason=MISSING)
open_clip = pytest.importorskip("open_clip", reason=MISSING)

FLOAT64 = 1e-10
WIDTH, HEADS, DEPTH, PATCH, SIDE, D_MLP, REGISTERS, EPS = 24, 3, 2, 4, 3, 48, 2, 1e-4
State = Mapping[str, Tensor]
Sizes = tuple[int, ...]


def draw(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Return random tensors in float64 for every parameter of a module."""
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Tensor] = {}
    for name, x in module.named_parameters():
        scale = 0.5 if x.ndim < 2 or x.shape[0] == 1 else (x.numel() / x.shape[0]) ** -0.5
        drawn[name] = torch.randn(x.shape, generator=generator, dtype=torch.float64) * scale
    return drawn


def renamed(state: State, *pairs: tuple[str, str]) -> dict[str, Tensor]:
    """Return a state dict with each pattern replaced in its names, one after the other."""
    names = {name: name for name in state}
    for pattern, to in pairs:
        names = {old: re.sub(pattern, to, new) for old, new in names.items()}
    return {new: state[old] for old, new in names.items()}


def split(state: State, pattern: str, *targets: str) -> dict[str, Tensor]:
    """Return a state dict in which tensors are cut into equal parts, each with a name of its own."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if re.search(pattern, name):
            parts = tensor.chunk(len(targets))
            found |= {re.sub(pattern, to, name): x for to, x in zip(targets, parts, strict=True)}
        else:
            found[name] = tensor
    return found


def without(state: State, *patterns: str) -> dict[str, Tensor]:
    return {name: x for name, x in state.items() if not any(re.search(pattern, name) for pattern in patterns)}


def hooked(module: nn.Module, state: State) -> ZooModel:
    """Return the hooked form of a library's module with these weights, every one of them used."""
    module = module.double().eval()
    module.load_state_dict(dict(state), strict=True)
    return prisma.adapt(module)


def agree(models: Mapping[str, ZooModel], *inputs: Tensor, differ: Mapping[str, str] | None = None) -> int:
    """Compare every activation of every model with the first one's, name by name; return how many were compared.

    Args:
        differ: patterns of names that may be missing on a side or hold other numbers, each with the reason.
    """
    caches = {name: model.run_with_cache(*inputs)[1] for name, model in models.items()}
    (first, reference), *others = caches.items()
    excused = [re.compile(pattern) for pattern in differ or {}]
    compared = 0
    for name, cache in others:
        apart = {hook for hook in set(cache) ^ set(reference) if not any(one.search(hook) for one in excused)}
        assert not apart, f"only one of {first} and {name} has {sorted(apart)}"
        for hook in set(cache) & set(reference):
            if any(one.search(hook) for one in excused):
                continue
            error = worst(cache[hook], reference[hook])
            assert error < FLOAT64, f"{hook}: {name} differs from {first} by {error:.1e}"
            compared += 1
    return compared


def image() -> Tensor:
    return torch.randn(2, 3, SIDE * PATCH, SIDE * PATCH, dtype=torch.float64)


LAYER_NORM = partial(nn.LayerNorm, eps=EPS)
SMALL: dict[str, Any] = {
    "img_size": SIDE * PATCH,
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
    "mlp_ratio": D_MLP / WIDTH,
    "norm_layer": LAYER_NORM,
    "num_classes": 0,
}
CONFIG: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "image_size": SIDE * PATCH,
    "patch_size": PATCH,
    "layer_norm_eps": EPS,
}
META: dict[str, Any] = {
    "width": WIDTH,
    "depth": DEPTH,
    "heads": HEADS,
    "patch": (PATCH, PATCH),
    "grid": (SIDE, SIDE),
    "d_mlp": D_MLP,
    "eps": EPS,
}
SECOND: dict[str, Any] = {**META, "layer_scale": True, "mask_token": True}
# How transformers names what Meta's blocks hold.
BLOCKS = (
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.ls(\d)\.gamma", r".layer_scale\1.lambda1"),
)
QKV = (r"\.attn\.qkv\.", ".attention.q_proj.", ".attention.k_proj.", ".attention.v_proj.")


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


# -------------------------------------------------------------------- CLIP


def of_open_clip(state: State) -> dict[str, Tensor]:
    """Return transformers' CLIP in open_clip's layout."""
    joined: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".q_proj." in name:
            parts = [state[name.replace(".q_proj.", f".{which}_proj.")] for which in "qkv"]
            joined[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            joined[name] = tensor
    found = renamed(
        joined,
        (r"^vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
        (r"^vision_model\.embeddings\.patch_embedding", "visual.conv1"),
        (r"^vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
        (r"^vision_model\.pre_layrnorm", "visual.ln_pre"),
        (r"^vision_model\.post_layernorm", "visual.ln_post"),
        (r"^vision_model\.encoder\.layers", "visual.transformer.resblocks"),
        (r"^visual_projection\.weight", "visual.proj"),
        (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
        (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"^text_model\.final_layer_norm", "ln_final"),
        (r"^text_model\.encoder\.layers", "transformer.resblocks"),
        (r"^text_projection\.weight", "text_projection"),
        (r"\.self_attn\.", ".attn."),
        (r"\.layer_norm(\d)\.", r".ln_\1."),
        (r"\.fc1\.", ".c_fc."),
        (r"\.fc2\.", ".c_proj."),
    )
    transposed = ("visual.proj", "text_projection")
    return {name: x.T.contiguous() if name in transposed else x for name, x in found.items()}


def of_timm(state: State) -> dict[str, Tensor]:
    """Return the vision tower of transformers' CLIP in timm's layout."""
    at = "vision_model."
    open_clips = {name: x for name, x in of_open_clip(state).items() if name.startswith("visual.")}
    found = renamed(
        open_clips,
        (r"^visual\.transformer\.resblocks", "blocks"),
        (r"^visual\.conv1", "patch_embed.proj"),
        (r"^visual\.ln_pre", "norm_pre"),
        (r"^visual\.ln_post", "norm"),
        (r"^visual\.proj", "head.weight"),
        (r"^visual\.class_embedding", "cls_token"),
        (r"^visual\.positional_embedding", "pos_embed"),
        (r"\.attn\.in_proj_", ".attn.qkv."),
        (r"\.attn\.out_proj\.", ".attn.proj."),
        (r"\.ln_(\d)\.", r".norm\1."),
        (r"\.c_fc\.", ".fc1."),
        (r"\.c_proj\.", ".fc2."),
    )
    found["head.weight"] = state["visual_projection.weight"]
    found["head.bias"] = torch.zeros(len(found["head.weight"]), dtype=torch.float64)
    found["cls_token"] = state[f"{at}embeddings.class_embedding"][None, None]
    found["pos_embed"] = state[f"{at}embeddings.position_embedding.weight"][None]
    return found


# The last norm of the image tower is applied to what is pooled, or to all tokens: the same vector.
ENDS = {
    r"^(vision\.)?(ln_final|ln_pool)\.": "before or after pooling",
    r"^(vision\.)?hook_(ln_final|pooled)$": "before or after pooling",
}


def clip() -> tuple[nn.Module, dict[str, Tensor]]:
    tower = {"num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "hidden_act": "quick_gelu", "hidden_size": WIDTH}
    config = transformers.CLIPConfig(
        vision_config={**tower, "intermediate_size": D_MLP, "image_size": SIDE * PATCH, "patch_size": PATCH},
        text_config={
            **tower,
            "intermediate_size": 4 * WIDTH,
            "vocab_size": 30,
            "max_position_embeddings": 7,
            "eos_token_id": 2,
        },
        projection_dim=16,
    )
    model = transformers.CLIPModel(config)
    return model, {**draw(model), "logit_scale": torch.tensor(1.3, dtype=torch.float64)}


def test_clip_of_transformers_and_open_clip() -> None:
    model, state = clip()
    other = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={
            "layers": DEPTH,
            "width": WIDTH,
            "head_width": WIDTH // HEADS,
            "patch_size": PATCH,
            "image_size": SIDE * PATCH,
            "mlp_ratio": D_MLP / WIDTH,
        },
        text_cfg={"context_length": 7, "vocab_size": 30, "width": WIDTH, "heads": HEADS, "layers": DEPTH},
        quick_gelu=True,
    )
    models = {"transformers": hooked(model, state), "open_clip": hooked(other, of_open_clip(state))}
    ids = torch.tensor([[28, 4, 9, 1, 29, 0, 0], [28, 7, 7, 3, 2, 5, 29]])
    assert agree(models, image(), ids, differ=ENDS) >= 80


def test_clips_vision_tower_of_transformers_and_timm() -> None:
    _, state = clip()
    config = transformers.CLIPVisionConfig(
        **{**CONFIG, "layer_norm_eps": 1e-5}, intermediate_size=D_MLP, hidden_act="quick_gelu", projection_dim=16
    )
    tower = {name: x for name, x in state.items() if name.startswith("visi") or name.startswith("visual_projection")}
    own = timm.models.VisionTransformer(
        **{**SMALL, "norm_layer": partial(nn.LayerNorm, eps=1e-5), "num_classes": 16},
        pre_norm=True,
        act_layer="quick_gelu",
    )
    models = {
        "transformers": hooked(transformers.CLIPVisionModelWithProjection(config), tower),
        "timm": hooked(own, of_timm(state)),
    }
    assert agree(models, image(), differ=ENDS) >= 35
