"""prisma_patch on a model with a planted circuit: every technique finds it, and a broken twin does not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import COPIES, READS, RELAY, SOURCE, marked, planted
from prisma_patch import (
    Variant,
    ablate,
    activation_patch,
    attribution_patch,
    causal,
    freeze,
    knock_out,
    local,
    logit_difference,
    patch_heads,
    path_patch,
    steer,
    switch,
    together,
)
from torch import Tensor

from prisma_core import HookedViT, InputError, LoadError, NotApplicable, Result, UnknownName

BRIGHT, DARK = marked(1.0), marked(-1.0, seed=1)
METRIC = ("a bright mark", "a dark mark")


@pytest.fixture(scope="module")
def model() -> HookedViT:
    return planted()


def place(result: Result) -> tuple[str, ...]:
    """The labels of the largest effect, the batch left out."""
    return result.top(1)[0][0][:-1]


def test_the_planted_model_answers(model: HookedViT) -> None:
    assert model(BRIGHT).argmax().item() == 1
    assert model(DARK).argmax().item() == 2


# -------------------------------------------------------------------- patching


def test_patching_heads_finds_both_and_no_other(model: HookedViT) -> None:
    effects = patch_heads(model, BRIGHT, DARK, METRIC)
    heads = {(int(layer[1:]), int(head[1:])) for (layer, head, _), _ in effects.top(2)}
    assert heads == {COPIES, READS}
    third = effects.top(3)[2][1]
    assert abs(third) < 0.1 * abs(effects.top(2)[1][1])


@pytest.mark.parametrize(("layer", "token"), [(0, SOURCE), (1, RELAY)])
def test_patching_the_stream_finds_where_the_mark_is(model: HookedViT, layer: int, token: int) -> None:
    effects = activation_patch(model, BRIGHT, DARK, METRIC, at=("resid_pre", layer), over="pos")
    assert place(effects) == (model.layout.token_names()[token],)


def test_a_broken_twin_is_caught(model: HookedViT, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep that patches the token beside the one it names reports the mark one place off."""
    right = Variant.apply
    monkeypatch.setattr(Variant, "apply", lambda self, rows: right(replace(self, part=_beside(self.part)), rows))
    effects = activation_patch(model, BRIGHT, DARK, METRIC, at=("resid_pre", 0), over="pos")
    assert place(effects) == (model.layout.token_names()[SOURCE - 1],)


def _beside(part: tuple[Any, ...]) -> tuple[Any, ...]:
    return (part[0], (part[1] + 1) % 10, *part[2:])


SWEEPS: dict[str, dict[str, object]] = {
    "layer head": {"at": "z", "over": "layer head"},
    "head layer": {"at": "z", "over": ("head", "layer")},
    "head pos": {"at": ("z", 1), "over": "head pos"},
    "neurons": {"at": ("mlp.hook_post", 0), "over": "neuron", "pos": "patches"},
    "queries of patterns": {"at": ("pattern", 1), "over": "head pos"},
    "keys": {"at": ("pattern", 0), "over": "key_pos", "heads": [0, 2]},
    "some heads at some tokens": {"at": ("z", 0), "over": "", "heads": [0, 1], "pos": [0, 3, 5]},
    "values": {"at": "v", "over": "layer pos head", "pos": [1, 5]},
}


@pytest.mark.parametrize("options", SWEEPS.values(), ids=SWEEPS)
@pytest.mark.parametrize("batch_size", [1, 7])
def test_each_place_is_patched_as_by_hand(model: HookedViT, options: dict[str, object], batch_size: int) -> None:
    clean, other = marked(1.0, 2, batch=2), marked(-1.0, 3, batch=2)
    metric = logit_difference(1, 2)
    result = activation_patch(model, clean, other, metric, batch_size=batch_size, **options)
    names = model.resolve(options["at"])
    _, theirs = model.run_with_cache(other, names=names)
    axes = {name: model.hook_points()[name].axes.split() for name in names}
    checked = 0
    for at in itertools.product(*(range(n) for n in result.values.shape[:-1])):
        chosen = dict(zip(result.axes[:-1], at, strict=True))
        name = names[chosen.pop("layer", 0)]

        def swap(x: Tensor, where: object, name: str = name, chosen: dict[str, int] = chosen) -> Tensor:
            on = torch.ones(x.shape, dtype=torch.bool)
            whole = {"head": options.get("heads"), "pos": options.get("pos"), "query_pos": options.get("pos")}
            for axis, label in enumerate(axes[name]):
                given = whole.get(label)
                places = list(range(x.shape[axis])) if given is None else given
                places = list(range(1, 10)) if places == "patches" else places
                index = chosen.get(label, chosen.get("pos") if label == "query_pos" else None)
                index = chosen.get("neuron", index) if label == "d_mlp" else index
                places = places if index is None else [places[index]]
                mask = torch.zeros(x.shape[axis], dtype=torch.bool)
                mask[places] = True
                on &= mask.view([-1 if each == axis else 1 for each in range(x.ndim)])
            return torch.where(on, theirs[name], x)

        by_hand = metric(model.run_with_hooks(clean, hooks={name: swap})) - metric(model(clean))
        torch.testing.assert_close(result.values[at], by_hand, rtol=0, atol=1e-10)
        checked += 1
    assert checked == result.values.numel() // 2


def test_patching_everything_is_the_other_run_and_itself_nothing(model: HookedViT) -> None:
    whole = activation_patch(model, BRIGHT, DARK, METRIC, at="hook_full_embed", over="")
    metric = logit_difference(1, 2)
    torch.testing.assert_close(whole.values, metric(model(DARK)) - metric(model(BRIGHT)))
    assert patch_heads(model, BRIGHT, BRIGHT, METRIC).values.abs().max() < 1e-12


def test_the_mean_is_asked_for_by_name(model: HookedViT) -> None:
    many = marked(0.5, 4, batch=3)
    with pytest.raises(InputError, match=r"1 images against 3.*other='mean'"):
        patch_heads(model, BRIGHT, many, METRIC)
    mean = patch_heads(model, BRIGHT, "mean", METRIC, reference=many)
    _, cache = model.run_with_cache(many, names=("z", 1))
    hooks = {("z", 1): lambda z, at: torch.cat([z[:, :, :2], cache["z", 1].mean(0, keepdim=True)[:, :, 2:]], 2)}
    by_hand = logit_difference(1, 2)(model.run_with_hooks(BRIGHT, hooks=hooks) - model(BRIGHT))
    torch.testing.assert_close(mean.sel(layer=1, head=2).values, by_hand)


@pytest.mark.parametrize("other", ["mean", "resample"])
def test_one_image_does_not_get_its_own_activations_back(model: HookedViT, other: Any) -> None:
    with pytest.raises(InputError, match=f"{other}.*two or more, or reference="):
        patch_heads(model, BRIGHT, other, METRIC)
    dark = patch_heads(model, BRIGHT, other, METRIC, reference=DARK)
    torch.testing.assert_close(dark.values, patch_heads(model, BRIGHT, DARK, METRIC).values)
    with ablate(model, ("z", READS[0]), method="resample", reference=DARK):
        one = model(BRIGHT)
    hooks = {("z", READS[0]): lambda z, at: model.run_with_cache(DARK, names=at.name)[1][at.name]}
    torch.testing.assert_close(one, model.run_with_hooks(BRIGHT, hooks=hooks))


def test_a_patch_that_cannot_reach_the_output_is_said(model: HookedViT) -> None:
    with pytest.raises(NotApplicable, match="class token alone"):
        activation_patch(model, BRIGHT, DARK, METRIC, at=("resid_post", 1), over="pos", pos="patches")


def test_bad_input_names_what_there_is(model: HookedViT) -> None:
    with pytest.raises(UnknownName, match="a bright mark"):
        patch_heads(model, BRIGHT, DARK, "a brigth mark")
    with pytest.raises(InputError, match="'layer' into over"):
        activation_patch(model, BRIGHT, DARK, METRIC, at="z", over="head")
    with pytest.raises(InputError, match="no axis 'head'"):
        activation_patch(model, BRIGHT, DARK, METRIC, at=("resid_pre", 0), over="head")
    with pytest.raises(InputError, match="no registers tokens"):
        activation_patch(model, BRIGHT, DARK, METRIC, at=("z", 0), over="head", pos="registers")


def test_a_sweep_goes_on_where_it_was_stopped(
    model: HookedViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "sweep.safetensors", []
    whole = patch_heads(model, BRIGHT, DARK, METRIC)

    def counted(logits: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return logit_difference(1, 2)(logits)

    with pytest.raises(KeyboardInterrupt):
        patch_heads(model, BRIGHT, DARK, counted, batch_size=1, resume=path)
    before = len(calls)
    again = patch_heads(model, BRIGHT, DARK, counted, batch_size=1, resume=path)
    torch.testing.assert_close(again.values, whole.values)
    assert len(calls) - before < 15  # the mark's nine, of the clean run and noise, and what was left of six
    with pytest.raises(LoadError, match="another sweep"):
        patch_heads(model, DARK, BRIGHT, METRIC, resume=path)
    with pytest.raises(LoadError, match="another sweep"):  # another metric over the same places
        patch_heads(model, BRIGHT, DARK, "nothing", resume=path)
    with pytest.raises(LoadError, match="another sweep"):  # another model
        patch_heads(planted(seed=5), BRIGHT, DARK, METRIC, resume=path)
    with pytest.raises(LoadError, match="another sweep"):  # another donor for the same clean run
        patch_heads(model, BRIGHT, DARK / 2, METRIC, resume=path)


# -------------------------------------------------------------------- to first order, and along paths


def test_attribution_patching_finds_the_heads(model: HookedViT) -> None:
    effects = attribution_patch(model, BRIGHT, DARK, METRIC)
    assert {(int(layer[1:]), int(head[1:])) for (layer, head, _), _ in effects.top(2)} == {COPIES, READS}


def test_integrated_effects_sum_to_the_whole_patch(model: HookedViT) -> None:
    """Completeness: over all of one hook point the integral is the exact effect of patching it."""
    exact = activation_patch(model, BRIGHT, DARK, METRIC, at=("resid_pre", 1), over="")
    found = attribution_patch(model, BRIGHT, DARK, METRIC, at=("resid_pre", 1), over="pos", steps=200)
    torch.testing.assert_close(found.values.sum(0), exact.values, rtol=1e-3, atol=1e-4)
    first = attribution_patch(model, BRIGHT, DARK, METRIC, at=("resid_pre", 1), over="pos")
    assert (first.values.sum(0) - exact.values).abs() > (found.values.sum(0) - exact.values).abs()


@pytest.mark.parametrize(("at", "over"), [("z", "layer head"), ("pattern", "head pos"), (("resid_pre", 1), "")])
def test_the_exact_effects_stand_beside_the_largest(model: HookedViT, at: Any, over: str) -> None:
    images, at = torch.cat([BRIGHT, DARK]), ("pattern", 1) if at == "pattern" else at
    found = attribution_patch(model, images, images.flip(0), METRIC, at=at, over=over, exact=3)
    every = activation_patch(model, images, images.flip(0), METRIC, at=at, over=over)
    assert (found.axes, found.labels) == (every.axes, every.labels)
    measured = found.tensors["exact"].isfinite()
    sizes = found.values.abs().sum(-1).flatten()
    best = sizes.topk(min(3, len(sizes))).indices.sort().values
    assert torch.equal(measured.all(-1).flatten().nonzero().flatten(), best)
    torch.testing.assert_close(found.tensors["exact"][measured], every.values[measured])
    assert "exact" not in attribution_patch(model, BRIGHT, DARK, METRIC).tensors


def test_a_path_goes_from_the_copying_head_to_the_reading_one(model: HookedViT) -> None:
    sender = {"sender": ("z", COPIES[0]), "heads": COPIES[1]}
    alone = activation_patch(model, BRIGHT, DARK, METRIC, at=("z", 0), over="head").sel(head=COPIES[1]).values
    along = path_patch(model, BRIGHT, DARK, METRIC, receivers=("v_input", 1), receiver_heads=READS[1], **sender).values
    torch.testing.assert_close(along, alone, rtol=0.05, atol=0.05)
    for receivers, heads in ((("v_input", 1), 0), (("q_input", 1), READS[1]), ("hook_logits", None)):
        off = path_patch(model, BRIGHT, DARK, METRIC, receivers=receivers, receiver_heads=heads, **sender).values
        assert off.abs().item() < 0.1 * alone.abs().item()


@pytest.mark.parametrize("receivers", [("q_input", 0), ("q_input", 1), ("pattern", 1), "hook_full_embed"])
def test_a_path_backwards_is_said(model: HookedViT, receivers: Any) -> None:
    with pytest.raises(NotApplicable, match="No path leads"):
        path_patch(model, BRIGHT, DARK, METRIC, ("z", 1), receivers)


def test_path_patching_with_nothing_frozen_is_activation_patching(model: HookedViT) -> None:
    everything = ["*attn.hook_z", "*hook_mlp_out"]
    found = path_patch(model, BRIGHT, DARK, METRIC, ("z", 0), heads=1, through=everything)
    exact = activation_patch(model, BRIGHT, DARK, METRIC, at=("z", 0), over="head").sel(head=1)
    torch.testing.assert_close(found.values, exact.values)


def test_the_switch_is_the_planted_head(model: HookedViT) -> None:
    found = switch(model, BRIGHT, DARK, "a bright mark", "a dark mark", pos="cls")
    assert found.flipped
    assert found.heads == (READS,)
    assert (found.before, found.after) == ("a bright mark", "a dark mark")
    with pytest.raises(InputError, match="takes it for 'a dark mark'"):
        switch(model, DARK, BRIGHT, "a bright mark", "a dark mark")


# -------------------------------------------------------------------- ready interventions


def test_ablating_the_reading_head_takes_the_answer_away(model: HookedViT) -> None:
    metric, clean = logit_difference(1, 2), model(BRIGHT)
    with ablate(model, ("z", READS[0]), heads=READS[1], pos="cls"):
        assert metric(model(BRIGHT)).abs() < 0.1 * metric(clean)
    with ablate(model, ("z", READS[0]), heads=0):
        torch.testing.assert_close(metric(model(BRIGHT)), metric(clean), rtol=0.05, atol=0.05)
    assert torch.equal(model(BRIGHT), clean)


def test_mean_and_resample_put_in_what_they_say(model: HookedViT) -> None:
    pair = torch.cat([BRIGHT, DARK])
    _, cache = model.run_with_cache(pair, names=("z", 1))
    with ablate(model, ("z", 1), heads=[2], method="resample", reference=pair):
        _, seen = model.run_with_cache(pair, names=("z", 1))
    assert torch.equal(seen["z", 1][:, :, 2], cache["z", 1][:, :, 2].flip(0))
    assert torch.equal(seen["z", 1][:, :, :2], cache["z", 1][:, :, :2])
    with ablate(model, ("z", 1), method="mean", reference=pair):
        _, seen = model.run_with_cache(BRIGHT, names=("z", 1))
    torch.testing.assert_close(seen["z", 1][0, 3], cache["z", 1].mean((0, 1)))
    with pytest.raises(InputError, match="needs reference="):
        ablate(model, "z", method="mean")


def test_a_knocked_out_edge_changes_what_it_should_and_no_other(model: HookedViT) -> None:
    metric, clean = logit_difference(1, 2), model(BRIGHT)
    with knock_out(model, queries="cls", keys=[RELAY], layers=1):
        _, cache = model.run_with_cache(BRIGHT, names=["pattern", "resid_post"])
        assert metric(model(BRIGHT)).abs() < 0.2 * metric(clean)  # the rest of the row grows: its sum stays 1
    _, before = model.run_with_cache(BRIGHT, names=["pattern", "resid_post"])
    assert cache["pattern", 1][0, :, 0, RELAY].eq(0).all()
    torch.testing.assert_close(cache["pattern", 1][:, :, 1:], before["pattern", 1][:, :, 1:])
    torch.testing.assert_close(cache["resid_post", 1][:, 1:], before["resid_post", 1][:, 1:])
    torch.testing.assert_close(cache["pattern", 1].sum(-1), torch.ones_like(before["pattern", 1].sum(-1)))


def test_a_query_without_any_key_reads_zeros(model: HookedViT) -> None:
    with knock_out(model, queries=[3], heads=[1], layers=0):
        logits, cache = model.run_with_cache(BRIGHT, names=[("z", 0)])
    assert logits.isfinite().all()
    assert cache["z", 0][0, 3, 1].eq(0).all()
    assert cache["z", 0][0, 3, 0].ne(0).all()


SHAPES: dict[str, tuple[Callable[[HookedViT], object], Callable[[int, int], bool]]] = {
    "causal": (causal, lambda q, k: k <= q),
    "local": (lambda model: local(model, 1), lambda q, k: max(abs(q // 3 - k // 3), abs(q % 3 - k % 3)) <= 1),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_masks_leave_the_patches_they_should(model: HookedViT, kind: str) -> None:
    scope, seen = SHAPES[kind]
    with scope(model):
        _, cache = model.run_with_cache(BRIGHT, names="pattern")
    allowed = torch.tensor([[seen(q, k) for k in range(9)] for q in range(9)])
    for layer in range(2):
        patches = cache["pattern", layer][0, :, 1:, 1:]
        assert torch.equal(patches.gt(0), allowed.expand_as(patches))
        assert cache["pattern", layer][0, :, 0].gt(0).all()


def test_steering_and_freezing(model: HookedViT) -> None:
    direction = torch.zeros(model.spec.d_model, dtype=torch.float64)
    direction[2] = 1.0  # the answer's direction
    with steer(model, ("resid_post", 1), direction, -20.0, pos="cls"):
        assert model(BRIGHT).argmax().item() == 2
    with steer(model, ("resid_post", 1), direction, 0.0, project=True):
        assert logit_difference(1, 2)(model(BRIGHT)).abs() < 0.5
    _, cache = model.run_with_cache(BRIGHT, names="z")
    with freeze(model, cache):
        moved = model(DARK)
    with together(freeze(model, cache), ablate(model, ("z", 1), heads=2)):
        other = model(DARK)
    assert moved.argmax().item() == 1
    assert logit_difference(1, 2)(other).abs() < 0.5
    with pytest.raises(InputError, match=r"\[24\]"), steer(model, ("resid_post", 1), torch.zeros(3)):
        model(BRIGHT)
