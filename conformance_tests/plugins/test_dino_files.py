"""``dino:FILE``: Meta's own state dicts, whole checkpoints, and what is refused."""

from __future__ import annotations

import argparse
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from prisma_conformance.randomise import randomise
from prisma_dino.meta import Architecture, MetaViT
from prisma_dino.meta_cases import SECOND, SMALL, THIRD, build
from torch import Tensor

import prisma_core as prisma
from prisma_core import InputError, UnsupportedArchitecture
from prisma_core.errors import LoadError

RESIZED_WITH_REGISTERS = {"registers": 2, "antialias": True, "offset": 0.0}
GENERATIONS = {
    "v1": {},
    "v2": SECOND,
    "v2_registers": {**SECOND, **RESIZED_WITH_REGISTERS},
    "v2_giant": {**SECOND, **RESIZED_WITH_REGISTERS, "mlp": "packed"},
    "v3": THIRD,
    "v3_plus": {**THIRD, "mlp": "split"},
    "v3_7b": {**THIRD, "mlp": "split", "masked_bias": False, "qkv_bias": False, "local_norm": True},
}


def drawn(**options: Any) -> MetaViT:
    """Return a model with random weights, and with masks and periods as files have them."""
    model = build(Architecture(**{**SMALL, **options}))
    kept = {name: x.clone() for name, x in model.named_buffers()}
    eps = model.norm.eps
    randomise(model, torch.Generator().manual_seed(0))
    for name, buffer in model.named_buffers():
        buffer.copy_(kept[name])
    for part in model.modules():
        if hasattr(part, "eps"):
            part.eps = eps  # no file holds it
    return model


def written(model: MetaViT, path: Path, wrap: Callable[[dict[str, Tensor]], Any] = dict) -> str:
    torch.save(wrap(model.state_dict()), path / "weights.pth")
    return f"dino:{path / 'weights.pth'}"


def options(**given: Any) -> dict[str, Any]:
    """Return what a small model's file cannot say, and no real one has to."""
    return {"image_size": 12} if given.get("periods") else {"heads": 3}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_file_gives_the_facts_and_the_numbers_of_its_model(generation: str, tmp_path: Path) -> None:
    given = GENERATIONS[generation]
    upstream = drawn(**given)
    model = prisma.load(written(upstream, tmp_path), **options(**given))
    assert model.spec == prisma.adapt(upstream).spec
    upstream, model = upstream.double(), model.double()
    bound = 1e-6 if given.get("periods") else 1e-12  # rotary tables were made in float32
    for size in ((12, 12), (20, 20), (16, 8), (4, 36)):
        image = torch.randn(2, 3, *size, dtype=torch.float64)
        theirs = upstream(image).detach()
        assert float((model(image).detach() - theirs).abs().max() / theirs.std()) < bound


@pytest.mark.parametrize("generation", GENERATIONS)
def test_export_gives_the_file_back(generation: str, tmp_path: Path) -> None:
    given = GENERATIONS[generation]
    upstream = drawn(**given)
    exported = prisma.export(prisma.load(written(upstream, tmp_path), **options(**given)))
    wanted = upstream.state_dict()
    assert list(exported) == list(wanted)
    assert all(torch.equal(exported[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("given", "how"),
    [
        ({}, {"scale_factor": (5.1 / 3, 2.1 / 3)}),
        (SECOND, {"scale_factor": (5.1 / 3, 2.1 / 3)}),
        ({**SECOND, **RESIZED_WITH_REGISTERS}, {"size": (5, 2), "antialias": True}),
    ],
)
def test_positions_follow_other_sizes_as_metas_do(given: dict[str, Any], how: dict[str, Any], tmp_path: Path) -> None:
    upstream = drawn(**given)
    model = prisma.load(written(upstream, tmp_path), heads=3)
    grid = upstream.pos_embed[:, 1:].detach().reshape(1, 3, 3, 24).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, mode="bicubic", **how).permute(0, 2, 3, 1).reshape(10, 24)
    found = model.embed.positions((5, 2))
    prefix = 1 + given.get("registers", 0)
    assert torch.equal(found[prefix:], wanted)
    assert torch.equal(found[:1], upstream.pos_embed[0, :1])
    assert not found[1:prefix].any()


def test_eps_is_that_of_the_generation_unless_given(tmp_path: Path) -> None:
    first, third = drawn(), drawn(**THIRD)
    assert prisma.load(written(first, tmp_path), heads=3).spec.ln_final.eps == 1e-6
    assert prisma.load(written(third, tmp_path)).spec.ln_final.eps == 1e-5
    assert prisma.load(written(third, tmp_path), eps=1e-3).spec.blocks[1].ln2.eps == 1e-3


def test_heads_are_of_64_channels_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    wide = MetaViT(replace(Architecture(**SMALL), width=128, heads=2))
    assert prisma.load(written(wide, tmp_path)).spec.blocks[0].attn.n_heads == 2
    with pytest.raises(InputError, match=r"24 channels.*heads of 64.*heads=NUMBER"):
        prisma.load(written(drawn(), tmp_path))
    with pytest.raises(InputError, match=r"24 channels.*not 5"):
        prisma.load(written(drawn(), tmp_path), heads=5)
    third = written(drawn(**THIRD), tmp_path)
    assert prisma.load(third).spec.blocks[0].attn.n_heads == 3
    with pytest.raises(InputError, match="so 3 heads, not heads=4"):
        prisma.load(third, heads=4)


def test_the_native_size_is_in_the_file_or_224(tmp_path: Path) -> None:
    assert prisma.load(written(drawn(**THIRD), tmp_path)).spec.image_size == (224, 224)
    with pytest.raises(InputError, match="no multiple"):
        prisma.load(written(drawn(**THIRD), tmp_path), image_size=30)
    with pytest.raises(InputError, match="12 pixels a side"):
        prisma.load(written(drawn(), tmp_path), heads=3, image_size=24)


def test_preprocessing_is_metas(tmp_path: Path) -> None:
    model = prisma.load(written(drawn(), tmp_path), heads=3)
    image = torch.rand(300, 400, 3).numpy()
    assert model.preprocess is not None
    assert model.preprocess(image).shape == (1, 3, 224, 224)
    assert model(model.preprocess(image)).shape == (1, 24)
    other = prisma.load(written(drawn(), tmp_path), heads=3, mean=(0.43, 0.41, 0.3), std=(0.2, 0.16, 0.14)).preprocess
    assert (other.mean, other.std) == ((0.43, 0.41, 0.3), (0.2, 0.16, 0.14))


# -------------------------------------------------------------------- checkpoints of training


def test_the_teacher_of_a_training_checkpoint_is_taken_unless_the_student_is_asked_for(tmp_path: Path) -> None:
    teacher, student = drawn(), drawn(layer_scale=True)
    head = {"mlp.0.weight": torch.randn(8, 24), "last_layer.weight_g": torch.ones(5, 1)}

    def checkpoint(state: dict[str, Tensor]) -> dict[str, Any]:
        def network(state: dict[str, Tensor], at: str) -> dict[str, Tensor]:
            return {
                **{f"{at}backbone.{name}": x for name, x in state.items()},
                **{f"{at}head.{name}": x for name, x in head.items()},
            }

        return {
            "student": network(student.state_dict(), "module."),
            "teacher": network(state, ""),
            "optimizer": {"state": {}, "param_groups": []},
            "epoch": 3,
            "best": np.float64(0.5),
            "generator": {"keys": np.arange(3, dtype=np.uint32)},
            "args": argparse.Namespace(arch="vit_small", lr=0.1),
            "dino_loss": {"center": torch.zeros(1, 5)},
        }

    reference, image = written(teacher, tmp_path, checkpoint), torch.randn(1, 3, 12, 12)
    assert torch.allclose(prisma.load(reference, heads=3)(image), teacher(image), atol=1e-5)
    model = prisma.load(reference, heads=3, key="student")
    assert torch.allclose(model(image), student(image), atol=1e-5)
    with pytest.raises(InputError, match=r"no network named 'ema': it holds student, teacher, dino_loss.*one of them"):
        prisma.load(reference, heads=3, key="ema")


def test_blocks_in_chunks_and_networks_side_by_side_are_found(tmp_path: Path) -> None:
    teacher, image = drawn(**SECOND), torch.randn(1, 3, 12, 12)

    def checkpoint(state: dict[str, Tensor]) -> dict[str, Any]:
        chunked = {name.replace("blocks.1.", "blocks.1.1.").replace("blocks.0.", "blocks.0.0."): name for name in state}
        teachers = {f"teacher.backbone.{name}": state[old] for name, old in chunked.items()}
        return {
            "model": {**teachers, **{f"student.backbone.{name}": torch.zeros(1) for name in chunked}},
            "iteration": 7,
        }

    assert torch.allclose(
        prisma.load(written(teacher, tmp_path, checkpoint), heads=3)(image), teacher(image), atol=1e-5
    )


@torch.no_grad()
def test_timm_has_the_same_streams_but_another_split_of_the_class_token(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    from timm.models.vision_transformer import checkpoint_filter_fn

    own = drawn(**{**SECOND, **RESIZED_WITH_REGISTERS})
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 40 / 24, "img_size": 12, "patch_size": 4}
    upstream = timm.create_model("vit_small_patch14_reg4_dinov2", reg_tokens=2, **sizes).eval()
    upstream.load_state_dict(checkpoint_filter_fn(dict(own.state_dict()), upstream))
    image = torch.randn(1, 3, 12, 12)
    _, theirs = prisma.adapt(upstream).run_with_cache(image)
    _, ours = prisma.load(written(own, tmp_path), heads=3).run_with_cache(image)
    assert not theirs["hook_pos_embed"][0, 0].any()
    assert torch.equal(ours["hook_pos_embed"][0, 0], own.pos_embed[0, 0])
    for name in ("hook_full_embed", "blocks.0.attn.hook_pattern", "blocks.1.hook_resid_post", "hook_pooled"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------- what is refused


def test_another_architecture_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(8, 3, 7, 7), "bn1.weight": torch.zeros(8)}, tmp_path / "resnet.pth")
    with pytest.raises(LoadError, match=r"lacks cls_token.*holds conv1.weight"):
        prisma.load(f"dino:{tmp_path / 'resnet.pth'}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.mlp.fc2.bias"), "missing blocks.1.mlp.fc2.bias"),
        (lambda s: s.update({"cls_norm.weight": torch.ones(24)}), "extra cls_norm.weight"),
        (lambda s: s.update({"norm.bias": torch.ones(23)}), r"norm.bias has shape \[23\], expected \[24\]"),
        (lambda s: s.update({"norm.bias": torch.full((24,), torch.nan)}), "NaN or infinite, in norm.bias"),
        (lambda s: s.pop("norm.bias"), "missing norm.bias.*prisma.adapt"),
        (lambda s: s.pop("blocks.0.mlp.fc2.weight"), "missing blocks.0.mlp.fc2.weight"),
        (lambda s: s.pop("pos_embed"), "missing pos_embed"),
        (lambda s: s.update({"blocks.last.bias": torch.ones(2)}), "extra blocks.last.bias"),
        (lambda s: s.update({"patch_embed.proj.weight": torch.ones(2)}), r"has shape \[2\], expected 4 axes.*adapt"),
        (lambda s: s.update({"pos_embed": torch.ones(10, 24)}), r"pos_embed has shape \[10, 24\], expected 3 axes"),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 9, 24)}), "8 patches, which are no square"),
    ],
)
def test_tensors_that_do_not_account_for_the_model_are_named(
    change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    def changed(state: dict[str, Tensor]) -> dict[str, Tensor]:
        change(state)
        return dict(state)

    with pytest.raises(LoadError, match=message):
        prisma.load(written(drawn(), tmp_path, changed), heads=3)


def test_an_option_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"takes no 'head'.*heads"):
        prisma.load(written(drawn(), tmp_path), head=3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"heads": True}, "heads= to be a whole number of heads, at least 1; got True"),
        ({"heads": 0}, "heads= to be .*got 0"),
        ({"heads": -2}, "heads= to be .*got -2"),
        ({"heads": "a"}, "heads= to be .*got 'a'"),
        ({"eps": 0}, "eps= to be a number above 0.*got 0"),
        ({"eps": -1}, "eps= to be .*got -1"),
        ({"std": (0, 0, 0)}, "std= to be a number above 0 a channel.*got"),
        ({"std": (1.0, 1.0, float("inf"))}, "std= to be"),
        ({"mean": "imagenet"}, "mean= to be a number a channel.*got 'imagenet'"),
        ({"mean": (1, 2)}, r"mean and std, 3 numbers each.*got mean=\(1.0, 2.0\)"),
        ({"image_size": -16}, "image_size= to be a whole number of pixels a side.*got -16"),
        ({"image_size": (12, 16, 20)}, "image_size= to be"),
        ({"image_size": (12, 14)}, "no multiple"),
        ({"key": 3}, "key= to be the name of a network.*got 3"),
        ({"key": "studnt"}, "no network named 'studnt': it holds one alone. Leave key= out"),
    ],
)
def test_an_option_of_another_kind_is_refused_in_a_line(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as told:
        prisma.load(written(drawn(**THIRD), tmp_path), **given)
    assert "\n" not in str(told.value)


def test_the_only_network_of_a_checkpoint_is_not_another_that_was_asked_for(tmp_path: Path) -> None:
    teacher = drawn()
    reference = written(teacher, tmp_path, lambda state: {"teacher": dict(state), "epoch": 3})
    image = torch.randn(1, 3, 12, 12)
    assert torch.allclose(prisma.load(reference, heads=3, key="teacher")(image), teacher(image), atol=1e-5)
    with pytest.raises(InputError, match=r"no network named 'student': it holds teacher"):
        prisma.load(reference, heads=3, key="student")


def test_a_native_size_that_is_not_square(tmp_path: Path) -> None:
    upstream = drawn(**{**THIRD, "grid": (3, 5)})
    model = prisma.load(written(upstream, tmp_path), image_size=(12, 20)).double()
    assert model.spec == prisma.adapt(upstream).spec
    assert (model.spec.image_size, model.layout.rows, model.layout.columns) == ((12, 20), 3, 5)
    assert model.preprocess(torch.rand(30, 40, 3)).shape == (1, 3, 12, 20)
    for size in ((12, 20), (20, 12)):
        image = torch.randn(2, 3, *size, dtype=torch.float64)
        assert torch.allclose(model(image), upstream.double()(image), rtol=0, atol=1e-6)


def test_images_of_other_channels_have_no_preprocessing_until_it_is_given(tmp_path: Path) -> None:
    reference = written(drawn(in_channels=1), tmp_path)
    with pytest.raises(InputError, match="mean="):
        prisma.load(reference, heads=3).preprocess(torch.rand(30, 40))
    seen = prisma.load(reference, heads=3, mean=[0.5], std=[0.2]).preprocess(torch.rand(30, 40))
    assert seen.shape == (1, 1, 224, 224)


def test_a_mask_that_was_never_set_is_refused(tmp_path: Path) -> None:
    model = drawn(**THIRD)
    model.blocks[1].attn.qkv.bias_mask.fill_(torch.nan)
    with pytest.raises(LoadError, match=r"blocks.1.attn.qkv.bias_mask.*before"):
        prisma.load(written(model, tmp_path))


def test_another_module_of_the_first_ones_name_is_refused() -> None:
    other = type("VisionTransformer", (MetaViT,), {"__module__": "vision_transformer"})(Architecture(**SMALL))
    with pytest.raises(UnsupportedArchitecture, match=r"interpolate_antialias.*facebookresearch/dino's has not"):
        prisma.adapt(other)


FORK = """
class VisionTransformer(MetaViT):
    def forward(self, image):
        p = self.patch_embed(image).flatten(1, 2)
        x = torch.cat([self.cls_token.expand(len(p), -1, -1), p], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x, None)
        return {output}
"""


@pytest.mark.parametrize(
    ("output", "fork"), [("self.norm(x)[:, 0]", False), ("self.norm(x)[:, 1:].mean(1)", True), ("x[:, 0]", True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_fork_of_the_first_one_s_code_is_refused(output: str, fork: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = ModuleType("vision_transformer")
    vars(module).update(MetaViT=MetaViT, torch=torch)
    exec(FORK.replace("{output}", output), vars(module))  # the code of a file of this name
    model = module.VisionTransformer(Architecture(**{**SMALL, "eps": 1e-6})).eval().to(dtype)
    torch.nn.init.normal_(model.cls_token)
    for name in ("grid", "interpolate_antialias", "interpolate_offset", "interpolate_in_float32"):
        delattr(model, name)
    model.embed_dim = model.num_features = model.norm.normalized_shape[0]
    model.pos_drop = torch.nn.Identity()
    if fork:
        with pytest.raises(UnsupportedArchitecture, match="another output than facebookresearch/dino's: it is a fork"):
            prisma.adapt(model)
        return
    hooked = prisma.adapt(model)
    image = hooked.sample_inputs(2)[0].to(dtype)
    torch.testing.assert_close(hooked(image), model(image), rtol=1e-2, atol=1e-2)
    model.blocks[1].norm2.register_forward_hook(lambda *args: pytest.fail("a hook ran in no pass of its user's"))
    with pytest.raises(UnsupportedArchitecture, match=r"'blocks\.1\.norm2'.*forward hook"):
        prisma.adapt(model)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"teacher": drawn().state_dict(), "code": _Code()}, tmp_path / "code.pth")
    with pytest.raises(LoadError, match="refused"):
        prisma.load(f"dino:{tmp_path / 'code.pth'}", heads=3)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"code": _Code()}, protocol=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(LoadError, match=r"bare\.pth"):
            prisma.load(f"dino:{tmp_path / 'bare.pth'}")
    with pytest.raises(LoadError, match="No file"):
        prisma.load(f"dino:{tmp_path / 'nothing.pth'}")


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the file's code was run",))
