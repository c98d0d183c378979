"""Attribution by layer, head, neuron and source: exact sums on every kind of model, and planted truths."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from models import VARIANTS, build
from planted import ANSWER, CLS, READS, RELAY, marked, planted
from planted_dual import WORDS, planted_dual
from prisma_lens import attribute, names_for, probe, second_order
from torch import Tensor
from twins import rejects

from prisma_core import HookedViT, InputError, NotApplicable, UnknownName

EXACT = {"rtol": 1e-9, "atol": 1e-9}
BYS = ("layer", "head", "neuron", "source", "head source")
BRIGHT, DARK = marked(1.0), marked(-1.0)


def total(found: Any) -> Tensor:
    """Everything that a Result says adds up to the logit: ``[batch class]``."""
    keep = [found.axes.index(axis) for axis in ("batch", "class")]
    values = found.values.movedim(keep, (-2, -1)).flatten(0, -3).sum(0)
    rest = found.tensors.get("rest", torch.zeros(()).to(values))
    return values + (rest.sum(1) if rest.ndim == 3 else rest) + found.tensors["constant"]


LACKING = {  # what some kinds of model have no attribution by
    "res_post": (("head", "source", "head source", "neuron"), "res_post"),
    "inner norms": (("source", "head source"), "norms its heads"),
    "attention only, grouped": (("neuron",), "no MLPs"),
}


@pytest.mark.parametrize("by", BYS)
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "all tokens"])
def test_everything_sums_to_the_logits(in_float64: None, image: Tensor, name: str, by: str) -> None:
    model = build(**VARIANTS[name])
    lacking, why = LACKING.get(name, ((), ""))
    if by in lacking:
        with pytest.raises(NotApplicable, match=why):
            attribute(model, image, [1, 4], by=by)
        return
    found = attribute(model, image, [1, 4], by=by)
    torch.testing.assert_close(total(found), model(image)[:, [1, 4]], **EXACT)
    assert found.values.abs().max() > 1e-3


@pytest.mark.parametrize("pool", ["attention", "token_and_avg"])
@pytest.mark.parametrize("by", BYS)
def test_pooling_by_attention_and_by_two_vectors_sums_too(in_float64: None, image: Tensor, pool: str, by: str) -> None:
    model = build(pool=pool, registers=1)
    torch.testing.assert_close(total(attribute(model, image, [1, 4], by=by)), model(image)[:, [1, 4]], **EXACT)


def test_a_model_that_reads_every_token_keeps_them_apart(in_float64: None, image: Tensor) -> None:
    model = build(pool="none", ln_pool=True)
    found = attribute(model, image, [1, 4])
    assert found.axes == ("component", "batch", "pos", "class")
    torch.testing.assert_close(found.values.sum(0) + found.tensors["constant"], model(image)[..., [1, 4]], **EXACT)
    with pytest.raises(NotApplicable, match=r"every token by itself.*pos="):
        attribute(model, image, 1, by="source")


def test_a_model_that_gives_out_patches_has_terms_of_patches_alone(in_float64: None, image: Tensor) -> None:
    model = build(pool="patches", ln_pool=True, registers=1)
    terms = attribute(model, image, [1, 4], by="head")
    assert terms.names("pos")[:2] == ("r0c0", "r0c1")
    summed = terms.values.sum((0, 1)) + terms.tensors["rest"] + terms.tensors["constant"]
    torch.testing.assert_close(summed, model(image)[..., [1, 4]], **EXACT)


@pytest.mark.parametrize("by", BYS)
@pytest.mark.parametrize(("pool", "pos", "at"), [("none", "cls", 0), ("none", 3, 3), ("patches", 3, 1)])
def test_one_token_is_chosen_of_a_model_that_gives_out_every_one(
    in_float64: None, image: Tensor, pool: str, pos: int | str, at: int, by: str
) -> None:
    def truth(study: Any) -> None:
        model = build(pool=pool, ln_pool=True, registers=1)
        terms = study(model, image, [1, 4], by=by, pos=pos)
        torch.testing.assert_close(total(terms), model(image)[:, at, [1, 4]], **EXACT)

    rejects(truth, attribute, "token, names = token_read(own, cache, pos)", "token, names = 2")


def test_a_token_that_cannot_be_read_is_said(vit: HookedViT, image: Tensor) -> None:
    with pytest.raises(InputError, match=r"one vector.*leave pos='cls' out"):
        attribute(vit, image, 1, pos="cls")
    with pytest.raises(InputError, match="from 2 on; got 'cls'"):
        attribute(build(pool="patches", registers=1), image, 1, pos="cls")
    with pytest.raises(InputError, match="one token"):
        attribute(build(pool="none"), image, 1, pos="patches")
    with pytest.raises(InputError, match="No position"):
        attribute(build(pool="none"), image, 1, pos=40)


@pytest.mark.parametrize("facts", [{"mlp": None, "ln2": None}, {"n_parallel": 2}])
@pytest.mark.parametrize("changed", [0, 1])
def test_layers_that_differ_in_their_number_of_parts_are_no_table(
    in_float64: None, image: Tensor, facts: dict[str, Any], changed: int
) -> None:
    spec = build().spec
    blocks = list(spec.blocks)
    blocks[changed] = blocks[changed].model_copy(update=facts)
    model = HookedViT(spec.model_copy(update={"blocks": tuple(blocks)})).eval()
    assert attribute(model, image, 1).values.isfinite().all()
    with pytest.raises(NotApplicable, match="differ in their number of neurons"):
        attribute(model, image, 1, by="neuron")
    with pytest.raises(NotApplicable, match=r"differ in their number of neurons|has no MLP"):
        second_order(model, image, 1)


@pytest.mark.parametrize("by", ["layer", "head", "neuron"])
def test_tokens_sum_to_the_component(vit: HookedViT, image: Tensor, by: str) -> None:
    for model in (vit, build(pool="avg", with_prefix=True)):
        by_token = attribute(model, image, [1, 4], by=by, per_token=True)
        whole = attribute(model, image, [1, 4], by=by)
        torch.testing.assert_close(by_token.values.sum(by_token.axes.index("pos")), whole.values, **EXACT)
        assert by_token.labels["pos"][0] == "cls"


def test_sources_sum_to_heads(vit: HookedViT, image: Tensor) -> None:
    heads = attribute(vit, image, "dog", by="head").values
    sources = attribute(vit, image, "dog", by="head source")
    torch.testing.assert_close(sources.values.sum(2), heads, **EXACT)
    torch.testing.assert_close(attribute(vit, image, "dog", by="source").values, sources.values.sum(1), **EXACT)


@pytest.mark.parametrize(
    ("by", "right", "wrong"),
    [
        ("layer", '"cbpd,bpd->cbp", stack.to(g), g)', '"cbpd,bpd->cbp", stack.to(g), g.roll(1, 0))'),
        ("head", 'torch.einsum("bphe,bphe->hbp", z, along)', 'torch.einsum("bphe,bphe->hbp", z.roll(1, 2), along)'),
        ("neuron", "g @ branch.scaled(branch.module.W_out).to(g).T", "g @ branch.module.W_out.to(g).T"),
        ("head source", "pattern[:, :, at].to(g)", "pattern.mT[:, :, at].to(g)"),
    ],
    ids=BYS[:3] + BYS[4:],
)  # fmt: skip
def test_the_sums_reject_a_broken_twin(
    vit: HookedViT, image: Tensor, by: str, right: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prisma_lens.covectors.check_total", lambda *args: None)  # which would refuse the twin itself

    def truth(study: Any) -> None:
        torch.testing.assert_close(total(study(vit, image, [1, 4], by=by)), vit(image)[:, [1, 4]], **EXACT)

    rejects(truth, attribute, right, wrong)


# -------------------------------------------------------------------- planted truths


def test_the_head_that_writes_the_answer_and_where_it_has_it_from() -> None:
    def truth(study: Any) -> None:
        model, images = planted(), torch.cat([BRIGHT, DARK])
        heads = study(model, images, "a bright mark", against="a dark mark", by="head")
        assert heads.sel(batch=0).top(1)[0][0][:2] == ("L1", "H2")
        assert heads.sel(layer=READS[0], head=READS[1], batch=1).values.item() < 0
        sources = study(model, images, "a bright mark", against="a dark mark", by="head source")
        assert sources.sel(batch=0).top(1)[0][0][:3] == ("L1", "H2", sources.names("source")[RELAY])

    right = 'torch.einsum("bhke,bkhe->hkb", arrived, v.to(g))'
    rejects(truth, attribute, right, f"{right}.roll(1, 1)")  # as if there were no class token


def test_the_neuron_that_writes_the_answer() -> None:
    model = planted()
    with torch.no_grad():
        mlp = model.blocks[1].mlp
        mlp.W_in[CLS, 3] += 0.5
        mlp.W_out[3, ANSWER] += 2.0
    found = attribute(model, BRIGHT, "a bright mark", against="a dark mark", by="neuron")
    assert found.top(1)[0][0][:2] == ("L1", "N3")
    _, cache = model.run_with_cache(BRIGHT)
    direction = model.head.weight[1] - model.head.weight[2]
    by_hand = cache["post", 1][0, 0, 3] * (model.blocks[1].mlp.W_out[3] @ direction)
    torch.testing.assert_close(found.sel(layer=1, neuron=3).values.flatten(), by_hand[None].detach(), **EXACT)


def test_a_heads_number_is_what_the_logit_loses_without_it_under_frozen_norms(vit: HookedViT, image: Tensor) -> None:
    """Against the model itself: the head taken out of the last block, the norm's scale held."""
    logits, cache = vit.run_with_cache(image, names=["*hook_scale"])

    def out(z: Tensor, at: Any) -> None:
        z[:, :, 2] = 0

    frozen = {"ln_final.hook_scale": lambda x, at: cache["ln_final.hook_scale"]}
    held = {("mlp_out", 1): lambda x, at: clean["mlp_out", 1]}
    _, clean = vit.run_with_cache(image, names=[("mlp_out", 1)])
    without = vit.run_with_hooks(image, hooks={**frozen, **held, ("z", 1): out})
    found = attribute(vit, image, list(range(7)), by="head").sel(layer="L1", head="H2").values
    torch.testing.assert_close(logits - without, found, **EXACT)


# -------------------------------------------------------------------- dual encoders


@pytest.mark.parametrize("by", BYS)
def test_words_and_images_are_targets_of_a_dual_encoder(by: str) -> None:
    clip = planted_dual(ln_final=True, logit_bias=True)
    images, words = torch.cat([BRIGHT, DARK]), list(WORDS)
    logits = clip(images, clip.tokens(words))
    found = attribute(clip, images, words, by=by)
    torch.testing.assert_close(total(found), logits, **EXACT)
    assert found.labels["class"] == tuple(words)
    of_text = attribute(clip, words, images, by=by, tower="text")
    torch.testing.assert_close(total(of_text).T, logits, **EXACT)
    less = attribute(clip, images, words[:1], against=words[1], by=by)
    torch.testing.assert_close(total(less)[:, 0], logits[:, 0] - logits[:, 1], **EXACT)


def test_the_head_that_sees_the_word() -> None:
    def truth(study: Any) -> None:
        clip = planted_dual()
        found = study(clip, torch.cat([BRIGHT, DARK]), ["a bright mark", "a cat"], by="head")
        assert found.sel(batch=0).top(1)[0][0] == ("L1", "H2", "a bright mark")
        assert found.sel(layer="L1", head="H2", batch=1).values[0] < 0

    rejects(truth, attribute, "cache = cache_of(model, given,", "cache = cache_of(model, given.flip(0),")


def test_a_cache_of_both_towers_does(in_float64: None) -> None:
    clip = planted_dual()
    names = [*(f"vision.{name}" for name in names_for(clip, "head")), "text.resid_pre"]
    _, cache = clip.run_with_cache(BRIGHT, clip.tokens(["a cat"]), names=names)
    torch.testing.assert_close(
        attribute(clip, cache, "a cat", by="head").values, attribute(clip, BRIGHT, "a cat", by="head").values
    )


# -------------------------------------------------------------------- probes


@pytest.mark.parametrize("tokens", ["cls", "mean"])
@pytest.mark.parametrize("by", BYS)
def test_what_a_probe_reads_is_split_too(by: str, tokens: str) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    model = planted()
    data = [
        (torch.cat([marked(0.4, 2 * seed, 8), marked(-0.4, 2 * seed + 1, 8)]), torch.tensor([1] * 8 + [0] * 8))
        for seed in range(2)
    ]
    fitted = probe(model, data, ["resid_post"], tokens=tokens, labels=("dark", "bright"), control=False)
    images = torch.cat([BRIGHT, DARK])
    _, cache = model.run_with_cache(images)
    for place, name in zip(("L0", "L1"), fitted.facts["names"], strict=True):
        found = attribute(model, images, fitted, by=by, place=place)
        x = cache[name][:, 0] if tokens == "cls" else cache[name].mean(1)
        read = x @ fitted.tensors[f"{name}/weight"].double().T + fitted.tensors[f"{name}/bias"]
        torch.testing.assert_close(total(found), read, **EXACT)
        assert found.names("class") == ("bright",)
        if by != "layer":
            assert found.shape["layer"] == int(place[1]) + 1
    if tokens == "cls" and by == "head":
        assert attribute(model, images, fitted, by=by).sel(batch=0).top(1)[0][0][:2] == ("L1", "H2")


def test_probes_that_cannot_be_split_are_refused() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    model = planted()
    data = [(torch.cat([marked(0.4, 1, 8), marked(-0.4, 2, 8)]), torch.tensor([1] * 8 + [0] * 8))]
    with pytest.raises(InputError, match="hook_attn_out"):
        attribute(model, BRIGHT, probe(model, data, ["attn_out"], control=False))
    with pytest.raises(InputError, match="'attribute'"):
        attribute(model, BRIGHT, attribute(model, BRIGHT, 1))
    first = probe(model, data, [("resid_pre", 0)], control=False)
    assert attribute(model, BRIGHT, first).names("component") == ("embed", "pos_embed")
    with pytest.raises(NotApplicable, match="first block"):
        attribute(model, BRIGHT, first, by="head")
    patches = [(data[0][0], torch.arange(9).repeat(16, 1) % 2)]
    with pytest.raises(NotApplicable, match="every patch by itself"):
        attribute(model, BRIGHT, probe(model, patches, ["resid_pre"], tokens="patches", control=False))


# -------------------------------------------------------------------- errors, memory


@pytest.mark.parametrize("by", BYS)
def test_nothing_speaks_for_a_class_against_itself(vit: HookedViT, image: Tensor, by: str) -> None:
    found = attribute(vit, image, [1, 2], against=[1, 3], by=by)
    assert found.values[..., 0].eq(0).all()
    torch.testing.assert_close(total(found), vit(image)[:, [1, 2]] - vit(image)[:, [1, 3]], **EXACT)


def test_what_does_not_fit_is_said(vit: HookedViT, image: Tensor) -> None:
    _, cache = build(seed=3, scale=True, registers=2).run_with_cache(image)
    with pytest.raises(InputError, match="another model"):
        attribute(vit, cache, 1)
    with pytest.raises(InputError, match="head source"):
        attribute(vit, image, 1, by="heads")
    with pytest.raises(UnknownName, match="ibex"):
        attribute(vit, image, "ibeks")
    with pytest.raises(InputError, match="each of 3, got 2"):
        attribute(vit, image, [1, 2, 3], against=[4, 5])
    with pytest.raises(NotApplicable, match="no head"):
        attribute(build(n_classes=None), image, 1)
    with pytest.raises(UnknownName, match="hook_z"):
        attribute(vit, vit.run_with_cache(image, names=names_for(vit, "layer"))[1], 1, by="head")


MEMORY = """
import resource, sys, torch
from prisma_core import HookedViT, ModelSpec
from prisma_lens import attribute
pool = sys.argv[1]
spec = ModelSpec.plain(d_model=384, layers=6, heads=6, patch=16, image=(224, 224), n_classes=10, pool=pool)
model = HookedViT(spec).eval()
images = torch.randn(8, 3, 224, 224)
with torch.no_grad():
    model(images)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = attribute(model, images, 3, by="neuron", per_token=True)
neurons = found.values.numel() * 4
stack = found.values.numel() // 8 // 197 * 8 * 197 * spec.d_model * 4
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(grown, neurons, stack)
"""


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_memory_is_that_of_the_values_never_of_the_stack_of_neurons(pool: str) -> None:
    told = subprocess.run([sys.executable, "-c", MEMORY, pool], capture_output=True, text=True, check=True)
    grown, values, stack = map(int, told.stdout.split())
    assert grown < 5 * values
    assert 5 * values < stack / 50
