"""Registers: outliers found where they were planted, models with other numbers of registers, neurons moved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from prisma_conformance.randomise import randomise
from prisma_registers import (
    Neuron,
    attention_to,
    extra_registers,
    register_neurons,
    registers_at_test_time,
    token_norms,
    without_registers,
)
from registered import images, two_towers, vit
from torch import Tensor

import prisma_core as prisma
from prisma_core import HookedViT, InputError, ModelSpec, NotApplicable
from prisma_core.cli.app import main
from prisma_core.host import installed
from prisma_core.maps.places import HookMap
from prisma_core.spec import (
    MapSpec,
    PoolSpec,
)
from prisma_core.upstream.model import HookedUpstream
from prisma_core.zoo import tensors_of


def fingerprint(model: HookedViT) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors_of(model).items()}


def plant(model: HookedViT, layer: int, neuron: int, spot: int) -> None:
    """Make one neuron fire at one patch alone, and write a huge vector into the stream."""
    mark = torch.randn(12, generator=torch.Generator().manual_seed(9)).double()
    with torch.no_grad():
        for block in model.blocks:  # nothing else speaks loudly
            block.attn.out.weight.mul_(1e-2)
            block.mlp.fc_out.weight.mul_(1e-2)
        model.embed.pos_embed[:] *= 0.1
        model.embed.pos_embed[model.layout.n_prefix + spot] = 30 * mark
        mlp = model.blocks[layer].mlp
        direction = torch.nn.functional.layer_norm(mark, (12,))
        mlp.fc_in.weight[neuron] = direction / model.blocks[layer].ln2.weight
        mlp.fc_in.bias[neuron] = -8
        mlp.fc_out.weight[:, neuron] = 200 * torch.randn(12, generator=torch.Generator().manual_seed(5)).double()


@torch.no_grad()
def test_norms_are_those_of_the_stream_and_outliers_stand_where_they_were_planted() -> None:
    model, x = vit(), images()
    plant(model, 1, 7, spot=6)
    norms = token_norms(model, x, batch_size=2)
    _, cache = model.run_with_cache(x)
    assert torch.allclose(norms.norms[2], cache["resid_post", 2].norm(dim=-1), rtol=1e-12)
    found = norms.outliers(factor=5)
    planted = model.layout.n_prefix + 6
    assert found[1:, :, planted].all()
    assert found[1:].sum() == 2 * 3
    cutoff = float(norms.norms[1, :, planted].min()) - 1
    assert norms.first_layer(cutoff=cutoff) == 1
    row = norms.by_layer(cutoff=cutoff)[1]
    assert row.positions == ("r1c2",)
    assert row.outliers == pytest.approx(1 / 12)
    assert row.largest == pytest.approx(float(norms.norms[1].max()))


@torch.no_grad()
def test_norms_that_half_precision_does_not_hold() -> None:
    model, x = vit(), images()
    model.embed.pos_embed[3, :2] = torch.tensor([60000.0, 40000.0])
    exact = token_norms(model, x).norms
    half = token_norms(model.half(), x.half()).norms
    assert exact.max() > 65504
    torch.testing.assert_close(half.double(), exact, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_the_planted_neuron_is_found_and_moved_into_an_added_token() -> None:
    model, x = vit(registers=0), images()
    plant(model, 1, 7, spot=6)
    cutoff = float(token_norms(model, x).norms[1, :, model.layout.n_prefix + 6].min()) - 1
    neurons = register_neurons(model, x, top=3, cutoff=cutoff)
    assert (neurons[0].layer, neurons[0].index) == (1, 7)
    assert neurons[0].score > 20 * neurons[0].elsewhere
    assert neurons[0].score > neurons[1].score > neurons[2].score
    before, clean = fingerprint(model), model(x)
    with registers_at_test_time(model, neurons[:1]) as cleaned:
        moved = token_norms(cleaned, x)
        _, cache = cleaned.run_with_cache(x, names=["blocks.1.mlp.hook_post"])
    assert moved.layout.registers == 1
    assert moved.first_layer(cutoff=cutoff) is None
    assert (moved.norms[1, :, 1] > cutoff).all()
    acts = cache["blocks.1.mlp.hook_post"][..., 7]
    assert not acts[:, 2:].any()
    assert (acts[:, 1] > 0).all()
    assert torch.equal(model(x), clean)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(model).items())


@pytest.mark.parametrize("pool", [PoolSpec(kind="token"), PoolSpec(kind="avg")])
@torch.no_grad()
def test_without_registers_is_what_masking_them_gives(pool: PoolSpec) -> None:
    model, x = vit(registers=2, pool=pool), images()
    registers = model.layout.slice("registers")

    def hide(scores: Tensor, at: object) -> None:
        scores[..., registers] = -torch.inf

    masked, cache = model.run_with_cache(x, names="resid_post", hooks={"attn_scores": hide})
    with without_registers(model) as bare:
        logits, short = bare.run_with_cache(x, names="resid_post")
    assert bare.layout.registers == 0
    assert torch.allclose(logits, masked, rtol=0, atol=1e-11)
    kept = torch.cat([cache["resid_post", 2][:, :1], cache["resid_post", 2][:, 3:]], 1)
    assert torch.allclose(short["resid_post", 2], kept, rtol=0, atol=1e-11)
    assert not torch.isclose(model(x), logits).all()


@torch.no_grad()
def test_added_registers_take_part_and_removing_them_gives_the_model_back() -> None:
    model, x = vit(registers=1), images()
    with extra_registers(model, 3) as wider:
        assert wider.layout.registers == 4
        changed, cache = wider.run_with_cache(x, names=["hook_full_embed", "pattern"])
        assert not cache["hook_full_embed"][:, 2:5].any()
        assert cache["pattern", 0].shape[-1] == model.layout.n_tokens + 3
        with without_registers(wider) as bare, without_registers(model) as same:
            assert torch.equal(bare(x), same(x))
    assert not torch.isclose(model(x), changed).all()
    # A token that no one reads changes nothing.
    with extra_registers(model, 1, values=torch.ones(1, 12)) as wider, wider.hooks({"attn_scores": _hide_third}):
        assert torch.allclose(wider(x), model(x), rtol=0, atol=1e-11)


def _hide_third(scores: Tensor, at: object) -> None:
    scores[..., 2] = -torch.inf


@torch.no_grad()
def test_weights_are_shared_and_other_sizes_still_work() -> None:
    model = vit(registers=2, rope=False, bias=False)
    with without_registers(model) as bare:
        assert bare.blocks[1].mlp.fc_in.weight.data_ptr() == model.blocks[1].mlp.fc_in.weight.data_ptr()
        larger = torch.randn(1, 3, 20, 16).double()
        bare(larger)
        assert bare.layout_for(larger).rows == 5


@torch.no_grad()
def test_attention_to_registers_by_head() -> None:
    model, x = vit(registers=2), images()
    _, cache = model.run_with_cache(x, names="pattern")
    wanted = cache["pattern", 1][:, :, 3:, 1:3].sum(-1).mean((0, 2))
    found = attention_to(model, x, "registers", batch_size=2)
    assert found.shape == (3, 2)
    assert torch.allclose(found[1], wanted)
    own = attention_to(model, x, [2, -11], queries=torch.arange(15) > 2, per_image=True, batch_size=2)
    assert own.shape == (3, 2, 3)
    assert torch.allclose(own[1], cache["pattern", 1][:, :, 3:][..., [2, 4]].sum(-1).mean(2).T)
    assert torch.allclose(attention_to(model, x, [1, 2, 2]), found)
    total = sum(attention_to(model, x, kind) for kind in ("cls", "registers", "patches"))
    assert torch.allclose(total, torch.ones(3, 2).double())


def test_what_cannot_be_done_is_said() -> None:
    bare, x = vit(registers=0), images()
    with pytest.raises(NotApplicable, match="no registers to remove"), without_registers(bare):
        pass
    with pytest.raises(NotApplicable, match="no tokens of the kind 'registers'"):
        attention_to(bare, x)
    with pytest.raises(InputError, match=r"values \[2 12\], got shape \[1, 12\]"):
        extra_registers(bare, 2, values=torch.zeros(1, 12)).__enter__()
    with pytest.raises(InputError, match="No neuron 20 in layer 0: there are 20"):
        registers_at_test_time(bare, [Neuron(0, 20)]).__enter__()
    with pytest.raises(NotApplicable, match="No patch is an outlier"):
        register_neurons(bare, x, cutoff=1e9)
    with pytest.raises(InputError, match="at least one image"):
        token_norms(bare, x[:0])


@pytest.mark.parametrize(
    ("pool", "facts"),
    [
        ("avg", {"with_prefix": True}),
        ("token_and_avg", {"with_prefix": True}),
        ("token", {"cls": 0}),
        ("token_and_avg", {"cls": 0}),
    ],
)
def test_registers_that_a_pooling_reads_keep_their_number(pool: str, facts: dict[str, Any]) -> None:
    model = HookedViT(ModelSpec.plain(registers=2, pool=pool, **facts))
    for scope in (without_registers(model), extra_registers(model, 1)):
        with pytest.raises(NotApplicable, match=f"{pool} pooling reads registers"), scope:
            pass


def test_attention_by_head_of_sides_and_of_layers_that_differ() -> None:
    spec = ModelSpec.plain(registers=2, n_parallel=2)
    model, x = HookedViT(spec), torch.randn(2, 3, 8, 12)
    _, cache = model.run_with_cache(x, names="*hook_pattern")
    wanted = torch.cat([cache[f"blocks.1.attn.{side}.hook_pattern"] for side in (0, 1)], 1)
    found = attention_to(model, x, "registers")
    torch.testing.assert_close(found[1], wanted[:, :, 3:, 1:3].sum(-1).mean((0, 2)))
    other = spec.blocks[1].model_copy(update={"n_parallel": 1})
    uneven = HookedViT(spec.model_copy(update={"blocks": (spec.blocks[0], other)}))
    with pytest.raises(NotApplicable, match="differ in their number of heads"):
        attention_to(uneven, x, "registers")


SAID: dict[str, tuple[str, Callable[[HookedViT, Tensor], object]]] = {
    "a negative cutoff": ("cutoff above 0", lambda m, x: token_norms(m, x).outliers(cutoff=-3)),
    "no factor": ("factor above 0", lambda m, x: token_norms(m, x).by_layer(factor=0)),
    "a negative factor": ("factor above 0", lambda m, x: token_norms(m, x).first_layer(factor=-1)),
    "both": ("got both", lambda m, x: register_neurons(m, x, cutoff=5, factor=3)),
    "paths": (r"as a tensor .* got list\. model\.preprocess", lambda m, x: token_norms(m, ["cat.jpg"])),
    "paths for neurons": ("got list", lambda m, x: register_neurons(m, ["cat.jpg"])),
    "paths for attention": ("got list", lambda m, x: attention_to(m, ["cat.jpg"], "cls")),
    "no such position": ("No position", lambda m, x: attention_to(m, x, [3, 40])),
    "no position": ("at least one position", lambda m, x: attention_to(m, x, [])),
    "positions by name": (r"keys\[0\]= .*; got 'cls'", lambda m, x: attention_to(m, x, ["cls", "patches"])),
    "pairs": (r"such as \[Neuron\(.* got \(0, 1\)", lambda m, x: registers_at_test_time(m, [(0, 1)]).__enter__()),
    "one neuron": ("one by itself", lambda m, x: registers_at_test_time(m, Neuron(0, 1)).__enter__()),
    "half a neuron": ("as whole numbers", lambda m, x: registers_at_test_time(m, [Neuron(0, 0.5)]).__enter__()),
    "a number in quotes": ("got '4'", lambda m, x: extra_registers(m, "4").__enter__()),
    "values in lists": (r"\[1 12\], got list", lambda m, x: extra_registers(m, 1, values=[[0.0] * 12]).__enter__()),
}


@pytest.mark.parametrize("what", SAID)
def test_what_makes_no_sense_is_refused_in_words(what: str) -> None:
    says, study = SAID[what]
    with pytest.raises(InputError, match=says):
        study(vit(), images())


def test_the_command_shows_outlier_patches_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (40, 30), "teal").save(path)
    assert main(["registers", "toy:scenes-3l", str(path), "--cutoff", "1e-3"]) == 0  # every token is one
    first = " ".join(capsys.readouterr().out.partition("\n")[2].split())
    assert 0 <= first.find("r0c0") < first.find("patches more, cls")
    assert main(["registers", "toy:scenes-3l", str(path), "--cutoff", "-3"]) == 1
    assert "cutoff above 0" in capsys.readouterr().err
    assert main(["registers", "toy:scenes-3l"]) == 2
    assert "prisma registers --help" in " ".join(capsys.readouterr().err.split())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (40, 30), "teal").save(path)
    assert main(["registers", "toy:scenes-3l", str(path)]) == 0
    said = capsys.readouterr().out
    assert "1 image, 0 registers" in said
    assert [line.split()[0] for line in said.splitlines() if line.strip()[:1].isdigit()][:3] == ["0", "1", "2"]
    assert main(["registers", "toy:scenes-3l", str(tmp_path / "missing.png")]) == 1
    assert "missing.png" in capsys.readouterr().err


def test_models_without_tokens_of_their_own_are_refused_in_words() -> None:
    mapped = HookedUpstream(
        torch.nn.Linear(4, 4), HookMap.parse("-> hook_logits : batch pos d_model"), MapSpec(shape=(6, 4)), lambda y: y
    ).double()
    x = torch.randn(1, 6, 4).double()
    for study in (
        lambda model: token_norms(model, x),
        lambda model: attention_to(model, x),
        lambda model: register_neurons(model, x),
        lambda model: without_registers(model).__enter__(),
        lambda model: extra_registers(model).__enter__(),
        lambda model: registers_at_test_time(model, [Neuron(0, 0)]).__enter__(),
    ):
        with pytest.raises(NotApplicable, match="this is a HookedUpstream"):
            study(mapped)
        with pytest.raises(NotApplicable, match=r"give model\.vision"):
            study(two_towers())


def test_no_neurons_are_no_neurons_to_move() -> None:
    with pytest.raises(InputError, match="at least one neuron"):
        registers_at_test_time(vit(), []).__enter__()


REGISTER_VITS = [
    ("timm", "vit_small_patch14_reg4_dinov2"),
    ("timm", "vit_base_patch16_dinov3"),
    ("timm", "vit_betwixt_patch16_reg4_gap_256"),
    ("dino", "dinov2_registers"),
    ("dino", "dinov3"),
    ("dino", "meta_v2_registers"),
]


@pytest.mark.parametrize(("plugin", "name"), REGISTER_VITS)
@torch.no_grad()
def test_register_vits_of_the_libraries(plugin: str, name: str) -> None:
    case = next(case for case, _ in installed().cases({plugin}) if case.name == name)
    model = prisma.adapt(randomise(case.build(), torch.Generator().manual_seed(4)).double().eval())
    (x,) = (given.double() for given in model.sample_inputs(2, generator=torch.Generator().manual_seed(5)))
    registers = model.layout.slice("registers")
    assert registers.stop - registers.start == model.layout.registers > 0

    def hide(scores: Tensor, at: object) -> None:
        scores[..., registers] = -torch.inf

    _, cache = model.run_with_cache(x, names="resid_post", hooks={"attn_scores": hide})
    with without_registers(model) as bare:
        _, short = bare.run_with_cache(x, names="resid_post")
    last = cache["resid_post", -1]
    kept = torch.cat([last[:, : registers.start], last[:, registers.stop :]], 1)
    assert torch.allclose(short["resid_post", -1], kept, rtol=0, atol=1e-10)
    share = attention_to(model, x, "registers")
    assert share.shape == (model.spec.n_layers, model.spec.blocks[0].attn.n_heads)
    assert ((share > 0) & (share < 1)).all()


@pytest.mark.parametrize("scope", [without_registers, extra_registers, registers_at_test_time])
def test_a_scope_without_with_says_so(scope: Any) -> None:
    changed = scope(vit(), []) if scope is registers_at_test_time else scope(vit())
    for use in (lambda: changed(torch.zeros(1)), lambda: changed.run_with_cache(torch.zeros(1)), lambda: changed.spec):
        with pytest.raises((InputError, AttributeError), match=rf"with {scope.__name__}\(model"):
            use()
    assert not hasattr(changed, "layout")


def test_gated_neurons_count_by_size_whatever_their_sign() -> None:
    """A neuron and its mirror image, whose output weights are turned too, are the same function."""
    torch.manual_seed(0)
    spec = ModelSpec.plain(d_model=12, layers=1, image=16, gated=True, act="silu", d_mlp=20)
    model = HookedViT(spec).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        model.blocks[0].mlp.fc_out.weight[:, 5] *= 100
        model.blocks[0].mlp.fc_gate.bias[5] = 6.0
        model.blocks[0].mlp.fc_in.weight[5] *= 8
    mirror = copy.deepcopy(model)
    with torch.no_grad():
        fc_in, fc_out = mirror.blocks[0].mlp.fc_in, mirror.blocks[0].mlp.fc_out
        for tensor in (fc_in.weight[5], fc_in.bias[5], fc_out.weight[:, 5]):
            tensor.neg_()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(mirror(x), model(x))
    one, other = (register_neurons(each, x, top=2, factor=1.2) for each in (model, mirror))
    assert [neuron[:2] for neuron in one] == [neuron[:2] for neuron in other]
    assert (one[0].layer, one[0].index) == (0, 5)
    assert one[0].score == pytest.approx(other[0].score)
    with registers_at_test_time(model, [Neuron(0, 5)]) as a, registers_at_test_time(mirror, [Neuron(0, 5)]) as b:
        torch.testing.assert_close(a(x), b(x))
        held = [each.run_with_cache(x)[1]["post", 0][:, 1, 5] for each in (a, b)]
        torch.testing.assert_close(held[0], -held[1])
        assert held[0].abs().min() > 0
