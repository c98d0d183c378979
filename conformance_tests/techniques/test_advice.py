"""Where a default or a name does not fit a kind of model, the error names the argument, and what there is instead."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from prisma_lens import attribute, grad_cam, integrated_gradients, logit_lens, rollout
from prisma_patch import ablate, activation_patch
from prisma_registers import extra_registers

import prisma_core as prisma

timm = pytest.importorskip("timm", reason="timm is missing: pip install 'prisma-interp[timm]'")


@pytest.fixture(scope="module")
def swin() -> prisma.HookedModel:
    sizes = {"img_size": 56, "num_classes": 5, "embed_dim": 16}
    made = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), **sizes)
    return prisma.adapt(made)


IMAGE = torch.rand(1, 3, 56, 56)


def test_saliency_names_its_argument_where_the_default_hook_point_is_missing(swin: prisma.HookedModel) -> None:
    for technique in (grad_cam, integrated_gradients):
        with pytest.raises(prisma.UnknownName, match="at="):
            technique(swin, IMAGE, 0)
    assert integrated_gradients(swin, IMAGE, 0, at="hook_embed", steps=1).shape == {"batch": 1, "row": 14, "column": 14}


def test_a_key_of_one_layer_in_each_stage_selects_several(swin: prisma.HookedModel) -> None:
    _, cache = swin.run_with_cache(IMAGE, names="pattern")
    with pytest.raises(prisma.UnknownName, match=r"selects 4 hook points.*stages.0.blocks.0.attn.hook_pattern"):
        cache["pattern", -1]


def test_a_sweep_over_layers_with_other_numbers_of_heads_names_some_that_agree(swin: prisma.HookedModel) -> None:
    with pytest.raises(prisma.NotApplicable, match=r"at='stages.0.blocks.0.attn.hook_z'"):
        activation_patch(swin, IMAGE, IMAGE.flip(3), 0, at="z", over="layer head")


def test_layers_with_other_tokens_have_no_rollout() -> None:
    transformers = pytest.importorskip("transformers", reason="pip install 'prisma-interp[hf]'")
    narrow = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    decoder = {f"decoder_{name}": size for name, size in narrow.items()}
    config = transformers.ViTMAEConfig(image_size=32, patch_size=8, **narrow, **decoder)
    model = prisma.adapt(transformers.ViTMAEForPreTraining(config))
    with pytest.raises(prisma.NotApplicable, match=r"differ in their tokens.*decoder"):
        rollout(model, torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize(("tower", "other"), [("vision", "texts"), ("text", "images")])
def test_a_pair_of_towers_is_read_along_what_the_other_reads(tower: Literal["vision", "text"], other: str) -> None:
    clip = prisma.load("toy:clip-scenes")
    given = torch.rand(1, 3, 64, 64) if tower == "vision" else ["a red circle"]
    with pytest.raises(prisma.NotApplicable, match=f"target=, {other}"):
        logit_lens(clip, given, tower=tower)


def test_a_model_without_classes_is_read_along_a_target() -> None:
    model = prisma.adapt(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=0))
    for technique in (logit_lens, lambda *given: attribute(*given, 0)):
        with pytest.raises(prisma.NotApplicable, match=r"target=.*\[class 192\]"):
            technique(model, torch.rand(1, 3, 32, 32))


def test_a_checkpoint_of_another_size_says_what_the_model_was_built_with(tmp_path: Path) -> None:
    torch.save(timm.create_model("vit_tiny_patch16_224", depth=1).state_dict(), tmp_path / "mine.pt")
    with pytest.raises(prisma.LoadError, match="depth="):
        prisma.load(f"timm:vit_tiny_patch16_224@{tmp_path / 'mine.pt'}")
    assert prisma.load(f"timm:vit_tiny_patch16_224@{tmp_path / 'mine.pt'}", depth=1).spec.n_layers == 1


def test_a_pair_of_towers_says_which_tower_has_what_it_lacks() -> None:
    pair = prisma.load("toy:clip-scenes")
    with pytest.raises(AttributeError, match=r"model\.vision\.layout"):
        pair.layout  # noqa: B018
    with pytest.raises(AttributeError, match=r"model\.vision\.blocks or model\.text\.blocks"):
        pair.blocks  # noqa: B018
    with pytest.raises(AttributeError, match="texts"):
        pair.text.layout  # noqa: B018
    with pytest.raises(prisma.InputError, match=r"model\.tokens\(texts\)"):
        pair.text.preprocess("cat.jpg")


def test_a_scope_says_what_is_on() -> None:
    model = prisma.load("toy:scenes-cls")
    scope = ablate(model, "z")
    name = "blocks.0.attn.hook_z"
    assert repr(scope).startswith(f"<scope, not entered yet: {name}, ")
    with scope:
        assert repr(scope).startswith(f"<scope, open: {name}, ")
        model(*model.sample_inputs())
    assert repr(scope) == "<scope, closed>"
    assert "extra_registers" in repr(extra_registers(model, 1))
