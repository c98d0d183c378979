"""What the sweep of upstream's states found (``fuzz/test_states.py``), each by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from third_party import Block, Mapped, Plain, drawn, image
from torch import Tensor, nn
from upstreams import case

import prisma_core as prisma
from prisma_core import UnsupportedArchitecture
from prisma_core.plugin import HookMap, Reader


def reversed_ids(model: Any) -> None:
    model.embeddings.position_ids.copy_(model.embeddings.position_ids.flip(-1))


def another_function(model: Any) -> None:
    model.encoder.layers[-1].mlp.activation_fn.act = torch.relu


def flag_of_a_bias(model: Any) -> None:
    model.data2vec_vision.encoder.layer[-1].attention.attention.has_relative_position_bias ^= True


def hook_where_one_pattern_ignores(model: Any) -> None:
    model.data2vec_vision.pooler.register_forward_hook(lambda module, args, result: result * 2)


def heads(model: Any) -> None:
    model.layers[-1].attention.head_dim //= 2


def heads_that_only_the_adapter_reads(model: Any) -> None:
    model.encoder.layers[-1].self_attn.num_heads = 1


def padding(model: Any) -> None:
    model.roberta.embeddings.padding_idx = 0


def tokens_beside_features(model: Any) -> None:
    model.visual.output_tokens = False


def tokens_before_the_patches(model: Any) -> None:
    model.num_prefix_tokens += 1


def no_number_of_tokens(model: Any) -> None:
    model.num_prefix_tokens = None


def tokens_that_do_not_turn(model: Any) -> None:
    model.blocks[-1].attn.num_prefix_tokens = 0


def no_mask(model: Any) -> None:
    model.text.transformer.encoder.layer[1].attention.is_cross_attention = True


def no_eps(model: Any) -> None:
    model.layers[-1].layernorm_after.eps = 0.0


def one_block_less(model: Any) -> None:
    """Stages are counted by the configuration, so that the last is none."""
    del (model.model if hasattr(model, "model") else model.encoder).layer[-1]


@pytest.mark.parametrize(
    ("plugin", "name", "change", "words"),
    [
        ("clip", "hf/CLIPVisionModel", reversed_ids, "'embeddings'.*position_ids"),
        ("clip", "hf/SiglipVisionModel", another_function, "activation_fn'.*not gelu_tanh"),
        ("hf", "Data2VecVisionForImageClassification", flag_of_a_bias, "attention'.*has_relative_position_bias=False"),
        ("hf", "Data2VecVisionForImageClassification", hook_where_one_pattern_ignores, "pooler'.*forward hook"),
        ("hf", "ViTModel", heads, r"attention'.*head_dim=\d+"),
        (
            "hf",
            "Idefics2VisionTransformer",
            heads_that_only_the_adapter_reads,
            "self_attn'.*num_heads=1 beside head_dim=8",
        ),
        ("clip", "hf/AltCLIPTextModel", padding, "embeddings'.*padding_idx=0"),
        ("clip", "coca_base", tokens_beside_features, "'visual'.*output_tokens=False"),
        ("timm", "naflexvit_base_patch16_gap", tokens_before_the_patches, "num_prefix_tokens=5.*of 4"),
        ("timm", "test_vit", no_number_of_tokens, "num_prefix_tokens=None"),
        ("timm", "test_vit", tokens_before_the_patches, r"num_prefix_tokens=\d"),
        ("timm", "eva02_base_patch14_224", tokens_that_do_not_turn, "'blocks.1.attn'.*num_prefix_tokens=0"),
        ("dino", "dinov3_backbone", one_block_less, "'model.layer'.*1 blocks.*stage2"),
        ("dino", "dinov2_backbone", one_block_less, "'encoder.layer'.*1 blocks.*stage2"),
        ("clip", "xlm-roberta-base-ViT-B-32/whole", no_mask, "layer.1.attention'.*is_cross_attention=True"),
        ("hf", "ViTModel", no_eps, "eps.*'layers.1.layernorm_after'"),
        ("hf", "VitPoseBackbone", one_block_less, "'encoder.layer'.*1 blocks.*stage2"),
    ],
)
@torch.no_grad()
def test_states_that_no_tensor_shows(plugin: str, name: str, change: Callable[[Any], None], words: str) -> None:
    model = case(plugin, name)
    prisma.adapt(model)
    change(model)
    with pytest.raises(UnsupportedArchitecture, match=words):
        prisma.adapt(model)


@pytest.mark.parametrize("name", ["test_vit", "beit_base_patch16_224", "eva02_base_patch14_224", "test_vit4"])
@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_a_scale_that_the_fused_kernel_is_not_given(name: str, fused: bool) -> None:
    """Upstream's attribute counts where attention goes step by step, and nowhere else."""
    model = case("timm", name).double()
    before = prisma.adapt(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn, module.scale = fused, 30 * module.scale
    after = prisma.adapt(model)
    x = after.sample_inputs()[0].double()
    torch.testing.assert_close(after(x), model(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after.run_with_cache(x)[0], model(x), rtol=1e-10, atol=1e-10)
    assert torch.equal(after(x), before(x)) == fused


@pytest.mark.parametrize("name", ["dinov2.layers.attention.MemEffAttention", "dinov3.layers.attention.SelfAttention"])
def test_a_scale_that_some_of_metas_kernels_are_not_given(name: str) -> None:
    model = case("dino", "meta_v3")
    attention = model.blocks[0].attn
    own, (home, _, kind) = type(attention), name.rpartition(".")
    attention.scale *= 2
    prisma.adapt(model)
    attention.__class__ = type(kind, (own,), {"__module__": home})
    with pytest.raises(UnsupportedArchitecture, match=rf"{kind} at 'blocks.0.attn'.*scale="):
        prisma.adapt(model)


@torch.no_grad()
def test_a_scale_that_open_clips_fused_kernel_is_not_given() -> None:
    open_clip = pytest.importorskip("open_clip")
    sizes = {"width": 32, "layers": 1, "head_width": 16, "image_size": 32, "patch_size": 8, "qk_norm": True}
    text = {"width": 16, "heads": 2, "layers": 1}
    model = open_clip.create_model("ViT-B-32", embed_dim=8, vision_cfg=sizes, text_cfg=text).eval().double()
    attention = model.visual.transformer.resblocks[0].attn
    attention.scale, x = 30 * attention.scale, torch.randn(1, 3, 32, 32).double()
    torch.testing.assert_close(prisma.adapt(model).encode_image(x), model.encode_image(x), rtol=1e-10, atol=1e-10)
    attention.use_fsdpa = False  # which open_clip cannot run
    assert prisma.adapt(model).spec.vision.blocks[0].attn.scale == attention.scale


@torch.no_grad()
def test_a_pooling_that_upstream_s_code_does_not_know_is_none() -> None:
    model = case("timm", "deepseek_vit_412m")
    x = torch.randn(2, *model.encoder.patch_embed.proj.weight.shape[1:2], *model.encoder.patch_embed.img_size)
    averaged = prisma.adapt(model)(x)
    model.global_pool = "token"
    each = model(x)
    assert each.ndim == averaged.ndim + 1
    torch.testing.assert_close(prisma.adapt(model)(x), each)
    model, x = model.double(), x.double()  # in which its norms compute in float32
    torch.testing.assert_close(prisma.adapt(model)(x), model(x), rtol=1e-10, atol=1e-12)


READ_BY_RUNNING = [("timm", "eva02_base_patch14_224"), ("hf", "Idefics2VisionTransformer"), ("dino", "meta_v3")]


@pytest.mark.parametrize(("plugin", "name"), READ_BY_RUNNING)
def test_adapters_that_run_a_part_to_read_it_run_no_hook_of_the_user_s(plugin: str, name: str) -> None:
    model = case(plugin, name)

    def hook(module: nn.Module, args: Any, result: Any = None) -> None:
        raise RuntimeError("this was no pass of the user's")

    for module in model.modules():
        module.register_forward_hook(hook)
        module.register_forward_pre_hook(hook)
    with pytest.raises(UnsupportedArchitecture, match="forward pre hook"):
        prisma.adapt(model)


def test_a_failure_of_an_adapter_names_what_it_read() -> None:
    model = case("clip", "ViT-B-16")
    model.visual.pool_type = "argmax"
    with pytest.raises(
        prisma.PrismaError, match=r"KeyError: 'argmax'.*The last that it read: 'visual.pool_type', 'argmax'"
    ):
        prisma.adapt(model)


def test_a_method_of_a_class_that_is_called_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    model = case("clip", "coca_base")
    encode = type(model).encode_image
    monkeypatch.setattr(type(model), "encode_image", lambda self, *args, **how: encode(self, *args, **how) * 2)
    with pytest.raises(UnsupportedArchitecture, match="encode_image that is not its class's own"):
        prisma.adapt(model)


@pytest.mark.parametrize("package", ["peft.tuners.lora", "torch._dynamo.eval_frame", "torch.nn.parallel"])
def test_what_stands_in_the_place_of_a_part_has_a_way_out(package: str) -> None:
    net = drawn()
    net.norm.__class__ = type("Wrapped", (nn.LayerNorm,), {"__module__": package})
    with pytest.raises(UnsupportedArchitecture, match=r"merge_and_unload\(\)|wrapper\._orig_mod|wrapper\.module"):
        prisma.adapt(net, adapter=Plain())


@pytest.mark.parametrize("adapter", [Plain(), Mapped()])
def test_weights_that_are_put_elsewhere_until_a_pass(adapter: Any) -> None:
    net: Any = drawn()
    net.head._hf_hook = type("AlignDevicesHook", (), {"offload": True})()
    with pytest.raises(UnsupportedArchitecture, match=r"'head'.*remove_hook_from_submodules"):
        prisma.adapt(net, adapter=adapter)


# -------------------------------------------------------------------- models hooked as they are


class Counting(Mapped):
    """Its hook points stand at calls of functions."""

    def hooks(self, upstream: Reader, spec: Any) -> HookMap:
        return HookMap.parse("layers.0.norm1 @ layer_norm : in -> blocks.0.hook_in : batch pos d_model")


class Sums(Mapped):
    def hooks(self, upstream: Reader, spec: Any) -> HookMap:
        return HookMap.parse("layers.0 @ flip -> blocks.0.hook_flipped : batch pos d_model")


def flips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give blocks a call of torch's that can be counted."""
    mixed = Block.mixed
    code = compile("def mixed(self, x): return self.fc2(self.act(self.fc1(x.flip(-1))))", Block.__module__, "exec")
    home = dict(vars(__import__(Block.__module__)))
    exec(code, home)
    home["mixed"].__qualname__ = mixed.__qualname__
    monkeypatch.setattr(Block, "mixed", home["mixed"])


@torch.no_grad()
def test_functions_that_a_hook_calls_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    flips(monkeypatch)
    net, inputs = drawn(), list[Tensor]()
    net.layers[0].fc1.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    net.layers[0].attn.register_forward_pre_hook(lambda module, args: (args[0].flip(0).flip(1),))
    monkeypatch.setattr("prisma_core.zoo.check_counted", lambda *args: None)  # the class was changed here
    model = prisma.adapt(net, adapter=Sums())
    logits, cache = model.run_with_cache(image())
    assert torch.equal(cache["blocks.0.hook_flipped"], inputs[-1])
    assert torch.equal(logits, net(image()))


def test_other_code_where_calls_are_counted_is_refused() -> None:
    net: Any = drawn()
    prisma.adapt(net, adapter=Counting())
    norm = net.layers[0].norm1
    forward = norm.forward
    norm.forward = lambda x: forward(nn.functional.layer_norm(x, x.shape[-1:]))
    with pytest.raises(UnsupportedArchitecture, match=r"'layers\.0\.norm1'.*by number"):
        prisma.adapt(net, adapter=Counting())
    del norm.forward
    twice = {"__module__": "acme", "forward": lambda self, x: nn.LayerNorm.forward(self, x) * 2}
    norm.__class__ = type("Acme", (nn.LayerNorm,), twice)
    with pytest.raises(UnsupportedArchitecture, match=r"acme\.Acme at 'layers\.0\.norm1'.*by number"):
        prisma.adapt(net, adapter=Counting())


@torch.no_grad()
def test_a_copy_of_a_hooked_model_has_its_own_functions() -> None:
    net: Any = drawn()
    attn = net.layers[1]
    forward = attn.forward
    attn.forward = lambda x: forward(x) * 2 + 1
    net.norm.register_forward_hook(lambda module, args, result: result * 2 if module is net.norm else result * 0)
    model = prisma.adapt(net, adapter=Mapped())
    x, copied = image(), copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    before = model(x)
    for weight in copied.parameters():
        weight.mul_(1.5)
    assert torch.equal(model(x), before)
    assert not torch.equal(copied(x), before)
    for weight in model.parameters():
        weight.mul_(1.5)
    assert torch.equal(copied(x), model(x))
