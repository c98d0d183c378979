"""Traps of published formats: each has a test that the wrong reading would fail, and is listed with it.

The traps are those that the code which writes and reads the formats sets; a line here without its test is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from coders import drawn, standard
from models import build
from prisma_sae import CoderFacts, SparseCoder, splice

from prisma_core import InputError

TRAPS = {
    "ViT-Prisma: newer code drops hook_point and attaches old files elsewhere": [
        "test_an_explicit_hook_point_of_old_files_counts_and_no_default_stands_in_for_it",
        "test_an_old_file_without_its_place_gets_it_from_the_catalogue",
    ],
    "ViT-Prisma: coders of the class token, or of patches, run on all tokens": [
        "test_the_tokens_that_it_was_trained_on",
        "test_a_coder_of_some_tokens_leaves_the_others_alone",
    ],
    "ViT-Prisma: hook_point_layer may be a list": [
        "test_a_list_of_layers_of_one_is_that_layer_and_of_several_is_refused"
    ],
    "ViT-Prisma: defaults changed with age": [
        "test_a_file_that_does_not_say_its_activation_is_refused",
        "test_a_transcoder_is_brought_back_by_its_inputs_statistics_and_skips_by_the_raw_input",
    ],
    "ViT-Prisma: ln2.hook_normalized is behind weight and bias": [
        "test_the_normalised_input_of_an_mlp_is_behind_weight_and_bias"
    ],
    "ViT-Prisma: model names are of another library": ["test_a_standard_coder_computes_what_vit_prisma_computes"],
    "ViT-Prisma: CLIP's places are the vision tower's in a pair": ["test_measures_of_a_dual_encoder"],
    "ViT-Prisma: images were resized by their shorter side and cut, whatever the model's processor does": [
        "test_images_of_coders_of_dino_were_cut_and_not_squashed"
    ],
    "ViT-Prisma: layer_norm's deviation is by n - 1, and undone without its eps": [
        "test_a_standard_coder_computes_what_vit_prisma_computes"
    ],
    "ViT-Prisma: a gated coder has a bias that nothing uses": ["test_a_gated_coder_has_a_bias_that_nothing_uses"],
    "ViT-Prisma: transcoders come back by their input's statistics": [
        "test_a_transcoder_is_brought_back_by_its_inputs_statistics_and_skips_by_the_raw_input"
    ],
    "ViT-Prisma: weights.pt, else the most images, and no sparsities": [
        "test_the_file_of_the_most_images_is_taken_and_no_sparsities"
    ],
    "ViT-Prisma: its pickles name classes, which must not run": ["test_no_code_of_a_file_runs"],
    "ViT-Prisma: losses of CLIP were published without the logit scale": [
        "test_losses_with_and_without_the_logit_scale_differ",
        "test_losses_of_a_dual_encoder_have_its_own_scale_and_none",
    ],
    "SAELens: b_dec comes off the input or not, by a flag": [
        "test_sae_lens_standard_with_and_without_the_bias_on_the_input"
    ],
    "SAELens: topk rescales by decoder norms": ["test_sae_lens_topk_and_its_rescaling_by_decoder_norms"],
    "SAELens: checkpoints of BatchTopK hold one threshold, finished coders one of each feature": [
        "test_sae_lens_checkpoints_of_batch_topk_keep_what_is_above_their_threshold",
        "test_every_kind_is_saved_as_sae_lens_has_it_too",
    ],
    "SAELens: jumprelu compares with its threshold before the relu": [
        "test_sae_lens_jumprelu_compares_before_the_relu"
    ],
    "SAELens: gated coders have no b_enc": ["test_sae_lens_gated_has_no_b_enc"],
    "SAELens: transcoders take nothing off their input": [
        "test_sae_lens_transcoders_take_nothing_off_their_input_and_leave_the_output_normalised"
    ],
    "SAELens: before version 6 the config is flat": [
        "test_sae_lens_before_version_6_is_flat_and_names_topk_by_its_activation"
    ],
    "SAELens: a checkpoint's scaling factor is beside its weights": [
        "test_sae_lens_scaling_of_a_checkpoint_counts_and_of_a_finished_coder_is_in_its_weights"
    ],
    "SAELens: ViT-Prisma's transcoders are none of its own": [
        "test_a_coder_that_sae_lens_computes_otherwise_is_saved_without_its_config"
    ],
    "SAELens: a coder of one head reads one head": ["test_a_coder_of_one_head_does_not_stand_at_all_heads"],
    "overcomplete: thresholds are no part of the state dict": ["test_the_running_threshold_itself_is_kept"],
    "overcomplete: thresholds of JumpSAE are logarithms; dictionaries are fused, scaled, archetypal, in DataParallel": [
        "test_a_pickled_model_computes_what_it_computed"
    ],
    "overcomplete: a whole pickle is code": ["test_a_pickle_that_names_anything_else_is_refused"],
    "dictionary_learning: its loader rescales; old and new take another bias off": [
        "test_dictionary_learning_old_and_new_autoencoders_differ_in_their_input"
    ],
    "dictionary_learning: k or a threshold, of which -1 is none": ["test_dictionary_learning_topk_and_batch_topk"],
    "saev: files without a schema": ["test_saev_without_a_schema_takes_the_bias_off_and_with_one_does_not"],
    "saev: TopK without ReLU, schemas of several forms": ["test_saev_topk_of_every_schema_keeps_negative_values"],
    "saev: DINOv2's activations were standardised": [
        "test_saev_activations_of_dinov2_were_standardised",
        "test_activations_of_dinov2_cannot_be_left_as_they_are",
    ],
    "sparsify: transcoders take nothing off; groups are neighbours": [
        "test_sparsify_subtracts_the_bias_unless_it_transcodes",
        "test_sparsify_groupmax_keeps_one_of_each_group",
    ],
    "circuit-tracer: the encoder is transposed; cross-layer files": [
        "test_circuit_tracer_transposes_its_encoder",
        "test_circuit_tracers_cross_layer_transcoders_write_to_each_later_layer",
    ],
    "MSAE: hyper-parameters are in the file's name": ["test_msae_is_named_scaled_and_capped"],
    "PatchSAE: a flag says whether the class token alone was read": ["test_patch_sae_is_read_as_a_stub"],
    "all: a coder computes numbers on any model": [
        "test_another_model_place_or_scope_is_an_error_that_says_what_differs"
    ],
}


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_has_its_test(trap: str) -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    there = set(re.findall(r"^def (test_\w+)\(", text, flags=re.MULTILINE))
    assert set(TRAPS[trap]) <= there


def test_the_normalised_input_of_an_mlp_is_behind_weight_and_bias() -> None:
    """What a transcoder of ``ln2.hook_normalized`` reads, with a norm whose weight and bias do something."""
    model = build(registers=1).double()
    norm = model.blocks[0].ln2
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, len(norm.weight)))
        norm.bias.copy_(torch.linspace(-1, 1, len(norm.bias)))
    reads, writes = "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"
    d = model.spec.d_model
    tensors = drawn(0, W_enc=(d, 20), b_enc=(20,), W_dec=(20, d))
    facts = CoderFacts(kind="transcoder", d_in=d, d_sae=20, d_out=d, hook=reads, hook_out=writes)
    coder = SparseCoder(facts, tensors).double()
    image = model.sample_inputs(2, generator=torch.Generator().manual_seed(0))[0].double()
    with splice(model, coder, force=True):
        _, cache = model.run_with_cache(image, names=["resid_mid", "sae.input", writes])
    x = cache["resid_mid", 0]
    bare = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + norm.spec.eps).sqrt()
    torch.testing.assert_close(cache[f"{writes}.sae.hook_input"], bare * norm.weight + norm.bias)
    torch.testing.assert_close(cache[writes], coder(bare * norm.weight + norm.bias))
    assert (coder(bare) - cache[writes]).abs().max() > 0.1


def test_a_coder_of_one_head_does_not_stand_at_all_heads() -> None:
    model = build(registers=1).double()
    hook = "blocks.0.attn.hook_z"
    image: Any = model.sample_inputs(1, generator=torch.Generator().manual_seed(0))[0].double()
    _, cache = model.run_with_cache(image, names=hook)
    heads, d_head = cache[hook].shape[-2:]
    assert heads > 1
    facts = CoderFacts(kind="standard", d_in=d_head, d_sae=12, d_out=d_head, hook=hook)
    one = SparseCoder(facts, standard(0, d_head, 12)).double()
    with splice(model, one, force=True), pytest.raises(InputError, match=rf"{d_head}\].*{heads * d_head}\]"):
        model(image)
