"""Weights of all layers: what they hold, that they cannot be written in vain, and the circuits they make."""

from __future__ import annotations

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import nn

from prisma_core import InputError, ModelSpec, NotApplicable
from prisma_core.spec import TextSpec
from prisma_core.transformer import HookedText, HookedViT
from prisma_core.transformer.circuits import Circuits, stacked

EXACT = {"rtol": 1e-9, "atol": 1e-9}
SHAPES = {
    "W_Q": (2, 4, 18, 6), "W_K": (2, 4, 18, 6), "W_V": (2, 4, 18, 6), "W_O": (2, 4, 6, 18),
    "b_Q": (2, 4, 6), "b_K": (2, 4, 6), "b_V": (2, 4, 6), "b_O": (2, 18),
    "W_in": (2, 18, 20), "W_gate": (2, 18, 20), "W_out": (2, 20, 18), "b_in": (2, 20), "b_out": (2, 18),
}  # fmt: skip
NAMES = sorted(SHAPES)


def part(name: str) -> str:
    return "mlp" if name in ("W_in", "W_gate", "W_out", "b_in", "b_out") else "attn"


@pytest.mark.parametrize("name", NAMES)
def test_stacks_hold_the_weights_of_every_layer(make, name):
    vit = make(gated=True)
    stack = getattr(vit, name)
    assert stack.shape == SHAPES[name]
    assert torch.equal(stack, stacked(vit, name))
    for layer in range(2):
        assert torch.equal(stack[layer], getattr(getattr(vit.blocks[layer], part(name)), name))
    axes = re.search(r"``\[(.*)\]``", vars(Circuits)[name].__doc__)
    assert axes is not None
    assert len(axes[1].split()) == stack.ndim


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "write",
    [
        lambda stack: stack.__setitem__(0, 0.0),
        lambda stack: stack.zero_(),
        lambda stack: stack[0].mul_(2),
        lambda stack: stack[1][0].fill_(1),
        lambda stack: stack.__iadd__(1),
        lambda stack: nn.init.normal_(stack[0]),
        lambda stack: stack.cpu().copy_(torch.ones(())),
    ],
    ids=["set", "zero_", "part mul_", "part of a part", "+=", "init", "cpu copy_"],
)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_write_that_would_be_lost_names_where_to_write(make, name, write, grad):
    vit = make(gated=True)
    before = copy.deepcopy(vit.state_dict())
    with torch.set_grad_enabled(grad), pytest.raises(InputError, match=rf"model\.blocks\[l\]\.{part(name)}\.{name}\b"):
        write(getattr(vit, name))
    assert all(torch.equal(tensor, before[key]) for key, tensor in vit.state_dict().items())


WRITES = {
    "view": lambda stack: stack.view(-1).zero_(),
    "flatten[]": lambda stack: stack.flatten().__setitem__(0, 1.0),
    "mT": lambda stack: stack.mT.fill_(1),
    "iteration": lambda stack: [part.zero_() for part in stack],
    "unbind": lambda stack: stack.unbind(0)[0].mul_(2),
    "split": lambda stack: torch.split(stack, 1)[1].mul_(2),
    "einops": lambda stack: rearrange(stack, "layer ... -> ... layer").zero_(),
    "detach": lambda stack: stack.detach().zero_(),
    "data": lambda stack: stack.data.zero_(),
    "data =": lambda stack: setattr(stack, "data", torch.zeros(1)),
    "set_": lambda stack: stack.set_(torch.zeros(1)),
    "out=": lambda stack: torch.mul(torch.ones(stack.shape), 2, out=stack),
    "out= of a view": lambda stack: torch.mul(torch.ones(stack[0].shape), 2, out=stack[0]),
    "inplace=": lambda stack: nn.functional.relu(stack, inplace=True),
    "foreach": lambda stack: torch._foreach_mul_([stack], 2),
    "masked": lambda stack: stack.masked_fill_(stack > 0, 0),
    "function": lambda stack: torch.clamp_(stack, 0, 1),
    "as_strided": lambda stack: stack.as_strided((3,), (1,)).zero_(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("inference", [True, False], ids=["inference_mode", "no_grad"])
def test_a_write_through_whatever_shares_memory_is_refused_too(vit, write, inference):
    with torch.inference_mode() if inference else torch.no_grad():
        stack = vit.W_O
        before = stack.clone()
        with pytest.raises(InputError, match=r"model\.blocks\[l\]\.attn\.W_O"):
            write(stack)
        assert torch.equal(stack, before)
        write(before)  # of one's own: written
        assert before.shape != stack.shape or not torch.equal(before, stack)


def test_arrays_of_a_stack_are_read_only(vit):
    stack = vit.W_O.detach()
    for array in (stack.numpy(), np.asarray(stack), stack.mT.numpy()):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    assert stack.clone().numpy().flags.writeable


def test_everything_else_is_done_with_stacks_as_with_tensors(vit):
    stack = vit.W_O
    assert type(stack * 2) is type(stack.clone()) is type(stack.mean(0)) is torch.Tensor
    own = stack.clone().detach()
    own[0] = 0
    assert torch.equal(own[1], stack[1])
    assert torch.equal(pickle.loads(pickle.dumps(stack.detach())), stack)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(vit.W_O), stack)
        vit.blocks[0].attn.W_O.copy_(stack[1])
    assert torch.equal(vit.W_O[0], stack[1])
    (grad,) = torch.autograd.grad(vit.W_O.square().sum(), vit.blocks[1].attn.out.weight)
    torch.testing.assert_close(grad, 2 * vit.blocks[1].attn.out.weight)
    assert torch.vmap(lambda layer: layer.mT.sum(0))(stack).shape == (2, 18, 6)
    pairs = torch.func.grad(lambda x: (x @ vit.W_O[0, 0]).sum())(torch.ones(6))
    torch.testing.assert_close(pairs, vit.blocks[0].attn.W_O[0].sum(1))
    assert torch.compile(lambda: vit.W_O[0] * 2, backend="eager", fullgraph=True)().shape == (4, 6, 18)


@pytest.mark.parametrize("value", [torch.zeros, lambda *shape: nn.Parameter(torch.zeros(*shape))])
def test_views_and_stacks_are_no_places_for_other_tensors(vit, value):
    attn, mlp = vit.blocks[0].attn, vit.blocks[0].mlp
    for module, name, shape, place in (
        (attn, "W_O", (4, 6, 18), r"module\.W_O"),
        (mlp, "W_in", (18, 20), r"module\.W_in"),
        (vit, "W_Q", (2, 4, 18, 6), r"model\.blocks\[l\]\.attn\.W_Q"),
        (vit, "W_U", (18, 7), r"model\.W_U"),
    ):
        with pytest.raises(InputError, match=rf"no_grad\(\): {place}\[\.\.\.\] = value"):
            setattr(module, name, value(*shape))


def test_views_are_written_through(vit, image):
    before = vit(image)
    attn = vit.blocks[0].attn
    with torch.no_grad():
        attn.W_O[2] = 0
        attn.b_V += 1.5
        vit.blocks[1].mlp.W_out *= 2
    assert not attn.out.weight[:, 12:18].any()
    assert attn.out.weight.any()
    assert (vit(image) - before).abs().max() > 0.1


@pytest.mark.parametrize("facts", [{}, {"kv_heads": 2}, {"n_parallel": 2, "kv_heads": 1}])
def test_circuits(make, image, facts):
    """Scores of zero-bias heads are x QK x^T; what a head writes is pattern x OV."""
    vit = make(**facts, attn_bias=False)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name.endswith("qkv.bias"):
                parameter.zero_()
    _, cache = vit.run_with_cache(image)
    result = vit.run_with_cache(image, names="result")[1]
    sides = facts.get("n_parallel", 1)
    for layer in range(2):
        for side in range(sides):
            number = f".{side}" if sides > 1 else ""
            x = cache[f"blocks.{layer}.ln1{number}.hook_normalized"]
            for head in range(4):
                at = (layer, 4 * side + head)
                scores = 0.3 * (x @ vit.QK[at].A) @ (vit.QK[at].B @ x.mT)
                attn = f"blocks.{layer}.attn{number}"
                torch.testing.assert_close(scores, cache[f"{attn}.hook_attn_scores"][:, head], **EXACT)
                written = cache[f"{attn}.hook_pattern"][:, head] @ x @ vit.OV[at].AB
                torch.testing.assert_close(written, result[f"{attn}.hook_result"][:, :, head], **EXACT)


def test_composition_scores(make):
    vit = make(layers=3)
    circuits = {"Q": vit.QK.AB, "K": vit.QK.AB.mT, "V": vit.OV.AB}
    for mode, reads in circuits.items():
        scores = vit.all_composition_scores(mode)
        assert scores.shape == (3, 4, 3, 4)
        for earlier, later in [(0, 1), (0, 2), (1, 2)]:
            for head in range(4):
                left, right = vit.OV.AB[earlier, head], reads[later, 3 - head]
                expected = (left @ right).norm() / left.norm() / right.norm()
                torch.testing.assert_close(scores[earlier, head, later, 3 - head], expected, **EXACT)
        assert not any(scores[layer, :, : layer + 1].any() for layer in range(3))
    with pytest.raises(InputError, match="'Q', 'K' or 'V', got 'O'"):
        vit.all_composition_scores("O")


@pytest.mark.parametrize("facts", [{}, {"n_parallel": 2, "kv_heads": 1}])
def test_head_labels_are_those_of_the_stacks(make, image, facts):
    vit = make(**facts)
    labels = vit.run_with_cache(image)[1].stack_head_results(return_labels=True)[1]
    assert vit.all_head_labels() == labels
    assert len(labels) == vit.QK.shape[0] * vit.QK.shape[1]


@pytest.mark.parametrize("facts", [{}, {"scale": True}, {"n_parallel": 2}, {"kind": "parallel"}, {"mlp": False}])
def test_biases_are_what_belongs_to_nobody(make, image, facts):
    vit = make(**facts)
    _, cache = vit.run_with_cache(image)
    with_mlp = facts.get("mlp", True)
    between = with_mlp and facts.get("kind") != "parallel"  # a place between attention and MLP
    assert not vit.accumulated_bias(0).any()
    for layer, mlp_input in ((1, False), (-1, False), *([(1, True)] if between else [])):
        added = cache.decompose_resid(layer, mlp_input, incl_embeds=False).sum(0)
        heads = cache.stack_head_results(2 if mlp_input else layer).sum(0)
        if not with_mlp:
            torch.testing.assert_close(heads + vit.accumulated_bias(layer), added, **EXACT)
            continue
        neurons = cache.stack_neuron_results(layer).sum(0)
        torch.testing.assert_close(heads + neurons + vit.accumulated_bias(layer, mlp_input), added, **EXACT)
        mlps = cache.decompose_resid(layer, mlp_input, "mlp", incl_embeds=False).sum(0)
        bias = vit.accumulated_bias(layer, mlp_input, include_mlp_biases=False)
        torch.testing.assert_close(heads + mlps + bias, added, **EXACT)


def test_a_norm_behind_a_bias(make):
    with pytest.raises(NotApplicable, match=r"Layer 0 norms a bias \(ln1\)"):
        make(kind="res_post").accumulated_bias(1)
    assert make(kind="res_post", norm=None).accumulated_bias(2).shape == (18,)
    with pytest.raises(InputError, match="No layer 3"):
        make().accumulated_bias(3)


def test_embeddings_and_heads(vit, image):
    patches = image.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    _, cache = vit.run_with_cache(image)
    torch.testing.assert_close(patches @ vit.W_E + vit.embed.proj.bias, cache["hook_embed"], **EXACT)
    assert torch.equal(cache["hook_pos_embed"][1], vit.W_pos)
    torch.testing.assert_close(cache["hook_ln_final"][:, 0] @ vit.W_U + vit.b_U, vit(image), **EXACT)
    with torch.no_grad():
        vit.W_E[:, 3] = 0
        vit.W_pos.zero_()
        vit.b_U += 1
    assert not vit.embed.proj.weight[3].any()
    assert not vit.embed.pos_embed.any()


def test_embeddings_of_texts():
    text = HookedText(TextSpec.plain())
    assert text.W_E is text.embed.W_E
    assert text.W_pos.shape == (8, 12)
    assert text.W_U.shape == (12, 12)
    assert text.W_in.shape == (2, 12, 48)


@pytest.mark.parametrize(
    ("facts", "name", "words"),
    [
        ({"mlp": None}, "W_in", "exactly one MLP"),
        ({"n_parallel": 2}, "b_out", "exactly one MLP"),
        ({"n_parallel": 2}, "b_O", "exactly one attention"),
        ({}, "W_gate", "not gated"),
        ({"n_classes": None}, "W_U", "no head, so it has no W_U"),
        ({"n_classes": None}, "b_U", "no head, so it has no b_U"),
        ({"pos": False}, "W_pos", "no W_pos"),
        ({"pos_factorized": True}, "W_pos", "pos_rows and pos_columns"),
        ({"stem": "opaque"}, "W_E", r"model\.embed\.stem"),
    ],
)
def test_weights_that_are_not_there(facts, name, words):
    vit = HookedViT(ModelSpec.plain(**facts), nn.Identity() if "stem" in facts else None)
    with pytest.raises(NotApplicable, match=words):
        getattr(vit, name)


def test_layers_of_different_sizes():
    spec = ModelSpec.plain()
    wide = ModelSpec.plain(d_mlp=13, d_head=4).blocks[0]
    vit = HookedViT(spec.model_copy(update={"blocks": (spec.blocks[0], wide)}))
    for name in ("W_in", "W_Q"):
        with pytest.raises(NotApplicable, match="differ in their sizes"):
            getattr(vit, name)
    assert vit.b_O.shape == (2, 12)
