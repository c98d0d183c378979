"""CLIP's decomposition, TextSpan and second-order effects: exact sums on random towers, and planted truths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import build
from planted import READS, RELAY, marked, planted
from planted_dual import WORDS, planted_dual, random_dual
from prisma_lens import (
    attribute,
    head_outputs,
    induction,
    mean_ablation,
    name_heads,
    neuron_outputs,
    second_order,
    segment,
    textspan,
)
from torch import Tensor
from twins import rejects, twin

from prisma_core import HookedDual, InputError, NotApplicable

EXACT = {"rtol": 1e-9, "atol": 1e-9}
TOWERS: dict[str, dict[str, Any]] = {
    "class token": {"scale": True, "registers": 2},
    "mean": {"pool": "avg", "ln_final": False, "ln_pool": True},
    "attention": {"pool": "attention"},
    "ln_pre, parallel": {"ln_pre": True, "kind": "parallel"},
    "side by side": {"n_parallel": 2},
    "grouped, rope": {"kv_heads": 2, "rope": True, "qk_norm": True, "attn_bias": True},
    "no norms": {"norm": None, "ln_final": False},
}
BRIGHT, DARK = marked(1.0), marked(-1.0)
PAIR = ["a bright mark", "a dark mark"]


@pytest.fixture(params=TOWERS.values(), ids=TOWERS)
def clip(request: pytest.FixtureRequest) -> HookedDual:
    return random_dual(**request.param)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def scenes(n: int = 16, size: float = 0.4) -> Tensor:
    """Images with bright and dark marks in turn."""
    return torch.cat([marked(size * (-1) ** at, seed=at) for at in range(n)])


# -------------------------------------------------------------------- heads' parts of the vector


def test_heads_and_the_rest_sum_to_the_images_vector(clip: HookedDual, images: Tensor) -> None:
    found = head_outputs(clip, [images[:2], images[2:]])
    whole = found.values.sum((0, 1)) + found.tensors["rest"]
    torch.testing.assert_close(whole, clip.encode_image(images, normalize=True), **EXACT)
    along = attribute(clip, images, list(WORDS), by="head").values
    texts = clip.encode_text(list(WORDS), normalize=True) * clip.logit_scale.exp()
    torch.testing.assert_close(found.values @ texts.T, along, **EXACT)


def test_a_twin_that_forgets_the_length_does_not_sum(images: Tensor) -> None:
    def truth(study: Any) -> None:
        clip = random_dual(scale=True)
        found = study(clip, images)
        total = found.values.sum((0, 1)) + found.tensors["rest"]
        torch.testing.assert_close(total, clip.encode_image(images, normalize=True), **EXACT)

    right = "layers.append(at_token(cache.project_stack(torch.cat(heads)), token) / scale)"
    truth(head_outputs)
    with pytest.raises(NotApplicable, match="components sum to"):  # it compares with the pass itself
        truth(twin(head_outputs, right, right.replace(" / scale", "")))


# -------------------------------------------------------------------- mean ablation


def test_the_layer_that_writes_the_answer_is_the_one_that_cannot_be_ablated() -> None:
    def truth(study: Any) -> None:
        found = study(planted_dual(), [scenes()[:7], scenes()[7:]], PAIR)
        assert found.sel(kind="attn", layer="L0").values == 1
        assert found.sel(kind="attn", layer="L1").values <= 0.75
        assert (found.sel(kind="mlp").values == 1).all()
        assert found.facts["intact"] == 1

    rejects(truth, mean_ablation, "torch.where(ablated[:, None, None], mean, stack)",
            "torch.where(ablated[:, None, None], stack, mean)")  # fmt: skip


def test_labels_make_it_an_accuracy_and_classifiers_take_it_too() -> None:
    images = scenes()
    right = torch.tensor([0, 1] * 8)
    assert mean_ablation(planted_dual(), [(images, right)], PAIR).facts["intact"] == 1
    assert mean_ablation(planted_dual(), [(images, 1 - right)], PAIR).facts["intact"] == 0
    found = mean_ablation(planted(), [(images, right)], PAIR)
    assert (found.facts["intact"], found.unit) == (1, "accuracy")
    with pytest.raises(InputError, match="labels from 0 to 1"):
        mean_ablation(planted(), [(images, right + 1)], PAIR)
    with pytest.raises(InputError, match="two images"):
        mean_ablation(planted_dual(), images[:1], PAIR)
    with pytest.raises(InputError, match="two texts"):
        mean_ablation(planted_dual(), images, PAIR[:1])


def test_the_means_are_of_parts_of_vectors_of_unit_length() -> None:
    clip, texts = random_dual(norm=None, ln_final=False), list(WORDS)
    sizes = torch.logspace(-1, 1, 12, dtype=torch.float64)[:, None, None, None]
    drawn = sizes * torch.randn(12, 3, 8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, cache = clip.vision.run_with_cache(drawn)
    parts, labels = cache.decompose_resid(return_labels=True)
    parts = cache.project_stack(parts) / clip.vision(drawn).norm(dim=-1)[:, None]
    ablated = torch.tensor([label.endswith("attn_out") for label in labels])[:, None, None]
    lost = (parts - parts.mean(1, keepdim=True)).where(ablated, 0).sum(0)
    answers = (clip.encode_image(drawn, normalize=True) - lost) @ clip.encode_text(texts, normalize=True).T
    share = (answers.argmax(-1) == clip(drawn, clip.tokens(texts)).argmax(-1)).float().mean()

    def truth(study: Any) -> None:
        assert study(clip, drawn, texts).sel(kind="attn").values[-1] == share

    rejects(truth, mean_ablation, "outputs / unit_scale(model, cache) @", "outputs @")


# -------------------------------------------------------------------- maps


def test_the_map_shows_where_the_head_has_the_word_from() -> None:
    def truth(study: Any) -> None:
        clip = planted_dual()
        found = study(clip, torch.cat([BRIGHT, DARK]), [*PAIR, "a cat"])
        assert found.shape == {"batch": 2, "row": 3, "column": 3, "class": 3}
        assert found.sel(batch=0, **{"class": "a bright mark"}).top(1)[0][0] == ("1", "1")
        assert divmod(RELAY - 1, 3) == (1, 1)
        assert found.values.argmax(-1)[:, 1, 1].tolist() == [0, 1]
        sources = attribute(clip, torch.cat([BRIGHT, DARK]), [*PAIR, "a cat"], by="source").values.sum(0)
        torch.testing.assert_close(found.values.flatten(1, 2).movedim(0, 1), sources[1:], **EXACT)

    rejects(truth, segment, "axis=0).movedim(-2, 0)", "axis=0).transpose(0, 1).flip(1).movedim(-2, 0)")


# -------------------------------------------------------------------- TextSpan


def test_texts_that_made_the_outputs_are_found_in_order_of_their_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    pool = torch.nn.functional.normalize(torch.randn(40, 16, generator=generator), dim=-1)
    sizes = torch.tensor([5.0, 3.0, 1.5])
    outputs = torch.randn(400, 3, generator=generator) * sizes @ pool[[7, 21, 33]]
    chosen, shares = textspan(outputs, pool, 3)
    assert chosen == [7, 21, 33]
    assert shares.sum().item() == pytest.approx(1, abs=1e-4)
    moved, again = textspan(outputs + 100 * pool[5], pool, 3)  # a mean explains nothing
    assert moved == chosen
    torch.testing.assert_close(again, shares, rtol=1e-3, atol=1e-4)
    half, rounded = textspan((300 * outputs).half(), pool.half(), 3)  # whose squares float16 does not hold
    assert half == chosen
    torch.testing.assert_close(rounded, shares, rtol=1e-3, atol=1e-3)


def test_textspan_takes_out_what_it_has_named() -> None:
    """Two texts nearly alike: without taking the first one out, the second would be named next."""

    def truth(span: Any) -> None:
        pool = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0], [1.0, 0.1, 0], [0, 0, 1.0]]), dim=-1)
        outputs = torch.randn(300, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([4.0, 1.0])
        outputs = outputs @ torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
        assert span(outputs, pool, 2)[0] == [0, 2]

    rejects(truth, textspan, "c, t = c - (c @ unit)[:, None] * unit, t - (t @ unit)[:, None] * unit", "pass")


def test_the_head_that_sees_marks_is_named_after_them() -> None:
    clip = planted_dual()
    outputs, pool = head_outputs(clip, scenes(24)).values, clip.encode_text(list(WORDS), normalize=True).detach()

    def truth(name: Any) -> None:
        found = name(clip, scenes(24), list(WORDS), k=2)
        assert found.facts["texts"]["L1H2"][0] in PAIR
        assert found.sel(head="L1H2", rank=0).values > 0.95
        for layer, head in ((0, 1), (1, 0), (1, 2)):
            chosen, shares = textspan(outputs[layer, head], pool, 2)
            assert found.facts["texts"][f"L{layer}H{head}"] == [list(WORDS)[each] for each in chosen]
            torch.testing.assert_close(found.sel(head=f"L{layer}H{head}").values, shares, **EXACT)

    rejects(truth, name_heads, "found.values[layer, head]", "found.values[layer, head - 1]")
    rejects(truth, name_heads, "texts[each] for each in chosen", "texts[-1 - each] for each in chosen")
    found = name_heads(clip, scenes(24), list(WORDS), k=2)
    last = name_heads(clip, head_outputs(clip, scenes(24)), list(WORDS), k=2, layers=[-1])
    assert last.names("head") == ("L1H0", "L1H1", "L1H2")
    assert last.facts["texts"]["L1H2"] == found.facts["texts"]["L1H2"]
    assert last.tensors["random"].shape == (3, 2)
    with pytest.raises(NotApplicable, match="text tower"):
        name_heads(clip.vision, scenes(4), list(WORDS))
    with pytest.raises(InputError, match="do not vary"):
        name_heads(clip, scenes(1), list(WORDS))


# -------------------------------------------------------------------- second-order effects


def by_hand(clip: HookedDual, images: Tensor, layer: int, neuron: int, texts: list[str]) -> Tensor:
    """The effect of a neuron through each later attention alone, by running the tower with all else held."""
    tower = clip.vision
    output, clean = tower.run_with_cache(images)
    held = {
        name: (lambda x, at: clean[at.name])
        for name in clean
        if name.endswith(("hook_scale", "hook_pattern", "hook_mlp_out", "hook_resid_pre", "hook_attn_out"))
    }
    branches = [name for name in clean if name.endswith("hook_post") and f"blocks.{layer}." in name]
    mlp = tower.blocks[layer].mlp
    total = torch.zeros_like(output)
    for later in range(layer + 1, len(tower.blocks)):
        gamma = getattr(tower.blocks[layer].ls2, "gamma", torch.ones(()).double())
        without = clean["resid_pre", later] - clean[branches[0]][..., neuron, None] * mlp.W_out[neuron] * gamma

        def flow(x: Tensor, at: Any, stream: Tensor = without) -> Tensor:
            return stream

        def back(x: Tensor, at: Any, stream: Tensor = clean["resid_pre", later]) -> Tensor:
            return stream

        hooks = {**held, f"blocks.{later}.hook_resid_pre": flow}
        del hooks[f"blocks.{later}.hook_attn_out"]
        _, cache = tower.run_with_cache(images, hooks=hooks, names=[("attn_out", later)])
        change = clean["attn_out", later] - cache["attn_out", later]
        end = {"ln_final.hook_scale": held["ln_final.hook_scale"]} if "ln_final.hook_scale" in held else {}
        last = f"blocks.{len(tower.blocks) - 1}.hook_resid_post"
        lower = clean[last] - change
        total = total + output - tower.run_with_hooks(images, hooks={**end, last: lambda x, at, s=lower: s})
    texts_in = clip.encode_text(texts, normalize=True) * clip.logit_scale.exp()
    return total / output.norm(dim=-1, keepdim=True) @ texts_in.T


@pytest.mark.parametrize("facts", [{"scale": True, "layers": 3}, {"layers": 3, "kv_heads": 2, "pool": "avg"}])
def test_second_order_is_what_is_lost_when_one_attention_does_not_read_the_neuron(
    images: Tensor, facts: dict[str, Any]
) -> None:
    clip, texts = random_dual(**facts), list(WORDS)[:2]

    def truth(study: Any) -> None:
        found = study(clip, images, texts)
        for layer, neuron in ((0, 3), (1, 7), (2, 5)):
            expected = by_hand(clip, images, layer, neuron, texts)
            torch.testing.assert_close(found.values[layer, neuron], expected, **EXACT)
        assert not found.values[2].any()
        assert found.values[:2].abs().max() > 1e-3

    rejects(truth, second_order, "norm.centred(u * norm.weight.to(u) / scale)", "(u * norm.weight.to(u) / scale)")


def test_forward_and_backward_agree_on_every_kind_of_tower(clip: HookedDual, images: Tensor) -> None:
    texts = list(WORDS)
    along = clip.encode_text(texts, normalize=True) * clip.logit_scale.exp()
    found = second_order(clip, images, texts).values
    if clip.spec.vision.blocks[0].n_parallel > 1:
        with pytest.raises(NotApplicable, match="2 MLPs"):
            neuron_outputs(clip, images, 0, [0])
        return
    outputs = neuron_outputs(clip, images, 0, [2, 11])
    torch.testing.assert_close(outputs.values @ along.T, found[0, [2, 11]], **EXACT)


def test_a_planted_neuron_speaks_through_the_head_that_reads_it() -> None:
    """A neuron of block 0 writes the direction that the reading head of block 1 carries to the class token."""
    from planted import COPY, MIDDLE

    clip = planted_dual()
    with torch.no_grad():
        mlp = clip.vision.blocks[0].mlp
        mlp.W_in[MIDDLE, 2] += 0.3
        mlp.W_out[2, COPY] += 1.0
    found = second_order(clip, BRIGHT, "a bright mark")
    assert found.top(1)[0][0][:2] == ("L0", "N2")
    assert (
        attribute(clip, BRIGHT, "a bright mark", by="neuron").sel(layer=0, neuron=2).values.abs()
        < 0.1 * found.top(1)[0][1]
    )
    assert READS == (1, 2)
    along = clip.encode_text(list(WORDS), normalize=True) * clip.logit_scale.exp()

    def truth(outputs: Any) -> None:
        written = outputs(clip, torch.cat([BRIGHT, DARK]), 0, [2, 0]).values
        assert written.shape == (2, 2, along.shape[1])
        assert list(WORDS)[int((along @ written[0, 0]).argmax())] == "a bright mark"
        assert (along[0] @ written[0, 0]).item() == pytest.approx(found.values[0, 2, 0, 0].item(), rel=1e-9)
        assert written[1].abs().max() < 0.1 * written[0].abs().max(), "the other neuron writes elsewhere"

    rejects(truth, neuron_outputs, "post[..., neuron, None] * vectors[neuron]", "post[..., neuron, None] * vectors[0]")
    rejects(truth, neuron_outputs, "total += torch.einsum", "total -= torch.einsum")
    rejects(truth, neuron_outputs, "[0], token) / unit_scale(model, cache)", "[0], token)")


@pytest.mark.parametrize(("pool", "pos"), [("none", -1), ("patches", 3)])
def test_one_token_is_chosen_of_a_model_that_gives_out_every_one(images: Tensor, pool: str, pos: int) -> None:
    model = build(pool=pool, ln_pool=True).double()
    at = pos if pool == "none" else pos - 1  # behind the class token
    vectors = model(images)[:, at]
    parts = head_outputs(model, images, pos=pos)
    torch.testing.assert_close(parts.values.sum((0, 1)) + parts.tensors["rest"], vectors, **EXACT)
    effects = second_order(model, images, [0, 1], pos=pos).values[0, 2]
    torch.testing.assert_close(effects, neuron_outputs(model, images, 0, [2], pos=pos).values[0, :, :2], **EXACT)
    whole = mean_ablation(model, [(images, vectors[:, :2].argmax(-1))], [0, 1], pos=pos)
    assert whole.facts["intact"] == 1
    assert segment(model, images, 0, pos=pos).values.isfinite().all()


def test_what_second_order_does_not_fit_is_said(images: Tensor) -> None:
    with pytest.raises(NotApplicable, match="no neurons"):
        second_order(random_dual(mlp=False), images, "a cat")
    with pytest.raises(NotApplicable, match="res_post"):
        second_order(random_dual(kind="res_post"), images, "a cat")
    every = build(pool="none", ln_pool=True).double()
    for study in (
        lambda: second_order(every, images, 0),
        lambda: neuron_outputs(every, images, 0, [0]),
        lambda: head_outputs(every, images),
        lambda: mean_ablation(every, images, [0, 1]),
        lambda: segment(every, images, 0),
    ):
        with pytest.raises(NotApplicable, match="every token by itself"):
            study()
    with pytest.raises(InputError, match="No layer 5"):
        neuron_outputs(random_dual(), images, 5, [0])
    with pytest.raises(InputError, match="0 to 19"):
        neuron_outputs(random_dual(), images, 0, [20])


@pytest.mark.parametrize(
    "study",
    [
        lambda model, images: attribute(model, images, 0, by="source"),
        lambda model, images: segment(model, images, 0),
        lambda model, images: second_order(model, images, 0),
        lambda model, images: neuron_outputs(model, images, 0, [0]),
        lambda model, images: induction(model, images, pairs=1),
    ],
)
def test_heads_that_are_normed_behind_their_values_are_no_sum_over_what_they_read(study: Any, images: Tensor) -> None:
    with pytest.raises(NotApplicable, match="norms its heads' outputs"):
        study(build(inner_norm=True).double(), images)
