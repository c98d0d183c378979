"""One CLIP in several libraries: the same numbers at every hook point."""

from __future__ import annotations

from functools import partial

import torch
from one_model import (
    CONFIG,
    D_MLP,
    DEPTH,
    HEADS,
    PATCH,
    SIDE,
    SMALL,
    WIDTH,
    State,
    agree,
    draw,
    hooked,
    image,
    open_clip,
    renamed,
    timm,
    transformers,
)
from torch import Tensor, nn


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
