"""What goes in beside a model fits or is refused: metrics, labels, files to resume from, tokens, directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import prisma_lens as lens
import prisma_patch as patch
import prisma_registers as registers
import pytest
import torch
from models import build
from torch import Tensor

import prisma_core as prisma
from prisma_core import ActivationCache, HookedViT, InputError, LoadError, NotApplicable, Result, UnknownName

X = torch.randn(4, 3, 8, 12, generator=torch.Generator().manual_seed(0))
Y = torch.randn(4, 3, 8, 12, generator=torch.Generator().manual_seed(1))


def model(**options: Any) -> HookedViT:
    return build(registers=2, n_classes=5, **options).float()


# -------------------------------------------------------------------- metrics


def right(logits: Tensor) -> Tensor:
    return logits.argmax(-1) == 2


@pytest.mark.parametrize("as_number", [lambda x: x, Tensor.long], ids=["bool", "int"])
def test_metrics_of_whole_numbers_give_floating_point_effects(as_number: Any) -> None:
    made = model()
    found = patch.activation_patch(made, X, Y, lambda x: as_number(right(x)), at=("resid_post", 1), over="layer").values
    assert torch.equal(found[0], right(made(Y)).float() - right(made(X)).float())
    patched = patch.path_patch(made, X, Y, lambda x: as_number(right(x)), ("resid_post", 1)).values
    assert torch.equal(patched, found[0])
    one = patch.edge_effects(made, ["input->logits"], X, Y, lambda x: as_number(right(x)))
    assert one.values.is_floating_point()


def test_complex_metrics_are_refused() -> None:
    with pytest.raises(InputError, match="complex64"):
        patch.activation_patch(model(), X, Y, lambda x: x[:, 0].to(torch.complex64))


# -------------------------------------------------------------------- files to resume from


def test_a_sweep_does_not_go_on_from_another_metric_with_the_same_clean_value(tmp_path: Path) -> None:
    made, file = model(), tmp_path / "sweep.safetensors"
    clean = made(X).detach()
    first = patch.activation_patch(made, X, "zero", lambda x: (x - clean).norm(dim=-1), resume=file)
    again = patch.activation_patch(made, X, "zero", lambda x: (x - clean).norm(dim=-1), resume=file)
    assert torch.equal(first.values, again.values)
    with pytest.raises(LoadError, match="another sweep"):
        patch.activation_patch(made, X, "zero", lambda x: (x - clean).abs().sum(-1), resume=file)


def test_a_sweep_does_not_go_on_from_another_model_with_the_same_clean_value(tmp_path: Path) -> None:
    made, file = model(), tmp_path / "sweep.safetensors"
    for scale in (1.0, 2.0):
        with torch.no_grad():
            made.blocks[1].attn.W_O.mul_(scale)
        clean = made(X).detach()
        if scale == 1.0:
            patch.activation_patch(made, X, "zero", lambda x, at=clean: (x - at).norm(dim=-1), resume=file)
            continue
        with pytest.raises(LoadError, match="another sweep"):
            patch.activation_patch(made, X, "zero", lambda x, at=clean: (x - at).norm(dim=-1), resume=file)


def test_a_series_does_not_go_on_from_another_run_with_the_same_first_checkpoint(tmp_path: Path) -> None:
    first, last, file = model(), model(seed=1), tmp_path / "series.safetensors"

    def size(one: HookedViT) -> float:
        return float(one.blocks[1].attn.W_O.norm())

    held = patch.over_checkpoints({0: first, 9: last}, size, resume=file)
    seen: list[HookedViT] = []
    again = patch.over_checkpoints({0: first, 9: last}, lambda one: seen.append(one) or size(one), resume=file)
    assert torch.equal(held.values, again.values)
    assert seen == [first]
    assert again.names("checkpoint") == ("0", "9")
    with torch.no_grad():
        last.blocks[1].attn.W_O.mul_(2)
    with pytest.raises(LoadError, match="step 9"):
        patch.over_checkpoints({0: first, 9: last}, size, resume=file)


# -------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("classes", "labels", "rows"),
    [
        ((0, 1), ["a", "b", "c"], ("b",)),
        ((0, 2), None, ("2",)),
        ((0, 1, 2), ["a", "b", "c", "d"], ("a", "b", "c")),
        ((0, 2, 4), None, ("0", "2", "4")),
    ],
)
def test_directions_of_a_probe_are_named_after_the_classes_they_are_of(
    classes: tuple[int, ...], labels: list[str] | None, rows: tuple[str, ...]
) -> None:
    made = model()
    images = torch.randn(30, 3, 8, 12, generator=torch.Generator().manual_seed(3))
    truth = torch.tensor(classes)[torch.arange(30) % len(classes)]
    probe = lens.probe(made, [(images, truth)], "resid_post", labels=labels, control=False)
    assert lens.logit_lens(made, X, probe).names("class") == rows
    assert lens.attribute(made, X, probe).names("class") == rows


def test_a_result_that_lacks_what_a_probe_writes_is_no_probe() -> None:
    bare = Result(torch.zeros(1, 1), ("place", "task"), technique="probe")
    for call in (lens.logit_lens, lens.attribute):
        with pytest.raises(InputError, match="fit the probe again"):
            call(model(), X, bare)


@pytest.mark.parametrize(
    "given",
    [torch.tensor([[0], [1], [0], [1]]), torch.tensor([0]), torch.tensor([0.7, 1, 0, 1]), torch.tensor([0, 1, 2, 0])],
    ids=["a column", "one for all", "fractions", "no such class"],
)
def test_mean_ablation_refuses_labels_that_do_not_fit(given: Tensor) -> None:
    with pytest.raises(InputError, match="label"):
        lens.mean_ablation(model(), [(X, given)], [0, 1])


@pytest.mark.parametrize("order", [1, -1])
def test_mean_ablation_refuses_labels_of_some_batches(order: int) -> None:
    batches = [(X, torch.tensor([0, 1, 0, 1])), X][::order]
    with pytest.raises(InputError, match="or none at all"):
        lens.mean_ablation(model(), batches, [0, 1])


# -------------------------------------------------------------------- texts, directions, baselines


def test_textspan_of_texts_that_lie_elsewhere_is_empty_and_of_odd_numbers_refused() -> None:
    along = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    chosen, shares = lens.textspan(along, torch.tensor([[0.0, 1.0]]))
    assert (chosen, shares.shape) == ([], (0,))
    for outputs, texts in ((along / 0, along), (along, along / 0), (along.long(), along)):
        with pytest.raises(InputError, match="finite"):
            lens.textspan(outputs, texts)


def test_taking_out_a_direction_does_not_depend_on_its_length() -> None:
    made = model().half()
    unit = torch.zeros(made.spec.d_model)
    unit[:2] = 1
    outputs: list[Tensor] = []
    for length in (1.0, 6e4):
        with torch.no_grad(), patch.steer(made, ("resid_post", 0), length * unit, 0.0, project=True):
            outputs.append(made(X.half()).float())
    assert (outputs[0] - made(X.half()).float()).abs().max() > 1e-2
    assert torch.allclose(*outputs, rtol=1e-2, atol=1e-2)
    with pytest.raises(InputError, match="length 0"):
        patch.steer(made, ("resid_post", 0), 0 * unit, project=True)


def test_a_baseline_of_more_axes_is_refused() -> None:
    with pytest.raises(InputError, match="baseline"):
        lens.integrated_gradients(model(), X, 1, baseline=torch.zeros(1, 1, 1, 1, 1), steps=1)


def test_freezing_takes_a_cache_of_this_models_hook_points() -> None:
    _, cache = model().run_with_cache(X)
    axes = {f"vision.{name}": each for name, each in cache.axes.items()}
    other = ActivationCache({f"vision.{name}": x for name, x in cache.items()}, axes=axes)
    with pytest.raises(UnknownName, match=r"vision\."):
        patch.freeze(model(), other)


# -------------------------------------------------------------------- tokens


def test_masks_of_a_pair_are_of_its_images() -> None:
    clip = prisma.load("toy:clip-scenes")
    texts = ["a red circle", "a blue star"]
    with torch.no_grad():
        plain = clip.encode_text(texts)
        for scope in (patch.knock_out(clip, "patches", "cls"), patch.causal(clip), patch.local(clip)):
            with scope:
                assert torch.equal(clip.encode_text(texts), plain)


def test_subsets_of_an_images_tokens_are_none_of_a_texts() -> None:
    clip = prisma.load("toy:clip-scenes")
    images, tokens = torch.rand(2, 3, 64, 64), clip.tokens(["a red circle", "a blue star"])
    z = "text.blocks.0.attn.hook_z"
    for call in (
        lambda: patch.ablate(clip, z, pos="cls"),
        lambda: patch.activation_patch(
            clip, (images, tokens), "zero", lambda x: x[:, 0], at=z, over="layer", pos="cls"
        ),
        lambda: patch.path_patch(clip, (images, tokens), (images, tokens), lambda x: x[:, 0], z, pos="cls"),
    ):
        with pytest.raises(InputError, match="no token layout"):
            call()


@pytest.mark.parametrize("at", ["hook_embed", "blocks.0.attn.hook_pattern", "hook_pooled"])
def test_factors_refuse_positions_where_a_hook_point_has_none(at: str) -> None:
    images, factor = torch.rand(12, 3, 8, 12), {"f": torch.linspace(0, 1, 12)}
    with pytest.raises(InputError, match="no positions"):
        patch.factors_by_place(model(), images, factor, at=at, pos="cls")
    with pytest.raises(InputError, match="finite"):
        patch.factors_by_place(model(), images, {"f": factor["f"] / 0}, at="resid_post")


# -------------------------------------------------------------------- dtypes, and models of norms


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tuned_lens_of_a_half_model_is_fitted_in_float32(dtype: torch.dtype) -> None:
    made, batch = model().to(dtype), X.to(dtype)
    fitted = lens.fit_tuned_lens(made, [batch] * 20, progress=False)
    assert {each.dtype for each in fitted.parameters()} == {torch.float32}
    plain, tuned = lens.lens_kl(made, [batch], fitted).values.sum(0).tolist()
    assert tuned < plain


def test_a_lens_without_biases_goes_on_without() -> None:
    made = model()
    bare = lens.TunedLens({**lens.TunedLens.of(made).config, "bias": False})
    fitted = lens.fit_tuned_lens(made, [X], start=bare, progress=False)
    assert {name.rpartition(".")[2] for name, _ in fitted.named_parameters()} == {"weight"}


def test_shares_of_attention_are_as_exact_as_the_model() -> None:
    made = model().double()
    _, cache = made.run_with_cache(X.double(), names="pattern")
    steps = [(torch.eye(x.shape[-1]) + x.mean(1)) / 2 for x in (cache["pattern", at] for at in range(len(made.blocks)))]
    want = torch.linalg.multi_dot([each[0] for each in reversed(steps)]) if len(steps) > 1 else steps[0][0]
    assert torch.allclose(lens.rollout(made, X.double()).values[0], want, rtol=1e-12, atol=1e-14)


def test_tables_hold_numbers_as_they_are() -> None:
    large = Result(torch.tensor([2**24 + 1, 3]), ("place",))
    exact = Result(torch.tensor([1 + 2.0**-40, 0.5], dtype=torch.double), ("place",))
    assert large.top(1)[0][1] == 2**24 + 1
    assert exact.top(1)[0][1] == 1 + 2.0**-40
    pytest.importorskip("pandas", reason="the table of a result is pandas'")
    assert large.to_dataframe()["value"].tolist() == [2**24 + 1, 3]
    assert exact.to_dataframe()["value"].tolist() == [1 + 2.0**-40, 0.5]


def test_register_neurons_take_norms_of_this_model_and_layers_with_neurons() -> None:
    made = model()
    norms = registers.token_norms(made, X)
    fewer = type(norms)(norms.norms[:1], norms.layout)
    with pytest.raises(InputError, match=f"after {len(made.blocks)} blocks"):
        registers.register_neurons(made, X, norms=fewer, factor=1.0001)
    bare = prisma.load("toy:dsprites-attn-1l")
    with pytest.raises(NotApplicable, match="no neuron"):
        registers.register_neurons(bare, torch.rand(2, 1, 64, 64), factor=1.0001)
