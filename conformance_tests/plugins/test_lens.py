"""prisma_lens on random models in float64: lenses and attributions that a wrong step would break."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from prisma_lens import LENS_NAMES, attribute, logit_lens, names_for
from torch import Tensor
from windows import stages

from prisma_core import HookedViT, ModelSpec, NotApplicable, Result, TokenLayout, UnknownName
from prisma_core.spec import (
    AttentionSpec,
    DualSpec,
    Interpolation,
    MlpSpec,
    NormSpec,
    PoolSpec,
    TextSpec,
)
from prisma_core.transformer import HookedDual, HookedText

ANY_SIZE = Interpolation()
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def vit(pool: str | PoolSpec = "token", *, kind: str = "pre", n_parallel: int = 1, **facts: object) -> HookedViT:
    """Return a two-layer model in float64 whose every number is random."""
    torch.manual_seed(7)
    pooling = pool if isinstance(pool, PoolSpec) else PoolSpec(kind=pool)
    norm = NormSpec(eps=1e-2)
    given = {
        "ln1": NormSpec(eps=1e-3),
        "d_mlp": 10,
        "scale": 0.4,
        "attn_scale": True,
        "mlp_scale": True,
        "n_classes": 5,
    }
    given |= {"cls": 1} if pooling.kind == "token" else {"cls": 0, "ln_final": None, "ln_pool": norm}
    spec = ModelSpec.plain(
        heads=3, norm=norm, registers=1, pool=pooling, kind=kind, n_parallel=n_parallel, **given | facts
    )
    model = HookedViT(spec).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4 + 0.1)
    return model


def image(seed: int, n: int = 1) -> Tensor:
    return torch.randn(n, 3, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


BOTH_NORMS = {"ln_final": NormSpec(eps=1e-3), "ln_pool": NormSpec(eps=1e-2)}
MODELS = {
    "class token": {},
    "mean": {"pool": "avg"},
    "mean with prefix": {"pool": PoolSpec(kind="avg", with_prefix=True)},
    "mean between two norms": {"pool": "avg", **BOTH_NORMS},
    "class token, two rms norms": {
        "ln_final": NormSpec(kind="rms", eps=1e-3), "ln_pool": NormSpec(kind="rms", eps=1e-2)
    },
    "ln_pre": {"ln_pre": NormSpec(eps=1e-3)},
    "parallel": {"kind": "parallel"},
}  # fmt: skip


def build(name: str) -> HookedViT:
    facts = dict(MODELS[name])
    return vit(facts.pop("pool", "token"), **facts)


# -------------------------------------------------------------------- lens


def test_lens_of_the_class_token_at_the_end_is_the_models_output() -> None:
    model = vit()
    logits, cache = model.run_with_cache(image(0, 3), names=LENS_NAMES)
    lens = logit_lens(model, cache)
    assert lens.stages == ("0_pre", "1_pre", "final_post")
    assert lens.logits.shape == (3, 3, 8, 5)
    torch.testing.assert_close(lens.logits[-1, :, 0], logits, **EXACT)
    assert (lens.logits[0, :, 0] - logits).abs().max() > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_lens_of_a_token_is_the_output_of_an_image_of_that_token(name: str) -> None:
    model = build(name)
    _, cache = model.run_with_cache(image(0, 2), names=LENS_NAMES)
    lens = logit_lens(model, cache)
    for stage, stream in enumerate([cache["resid_pre", 0], cache["resid_pre", 1], cache["resid_post", 1]]):
        for token in range(stream.shape[1]):
            alone = stream[:, token : token + 1].expand_as(stream).contiguous()
            torch.testing.assert_close(lens.logits[stage, :, token], model.unembed(alone), **EXACT)


def test_lens_says_why_there_is_none() -> None:
    headless = vit(n_classes=None)
    _, cache = headless.run_with_cache(image(0), names=LENS_NAMES)
    with pytest.raises(NotApplicable, match="no classification head"):
        logit_lens(headless, cache)
    model = vit()
    _, cache = model.run_with_cache(image(0), names="resid_pre")
    with pytest.raises(UnknownName, match="resid_post"):
        logit_lens(model, cache)


def test_lens_through_attention_pooling_gives_a_token_all_attention() -> None:
    pool = PoolSpec(kind="attention", attn=AttentionSpec(n_heads=2, n_kv_heads=2, d_head=6, scale=0.3))
    model = vit(pool)
    _, cache = model.run_with_cache(image(0, 2), names=LENS_NAMES)
    alone = cache["resid_pre", 1][:, 4:5].expand(-1, 7, -1).contiguous()
    torch.testing.assert_close(logit_lens(model, cache).logits[1, :, 4], model.unembed(alone), **EXACT)


# -------------------------------------------------------------------- attribution


def total(found: Result) -> Tensor:
    """Everything that sums to the logit: ``[batch class]``."""
    values = found.values.flatten(0, -3).sum(0)
    return values + found.tensors["constant"] + found.tensors.get("rest", 0)


@pytest.mark.parametrize("name", MODELS)
def test_attributions_by_layer_and_by_head_sum_to_the_logits(name: str) -> None:
    model = build(name)
    logits, cache = model.run_with_cache(image(1, 2))
    for by in ("layer", "head", "neuron", "source"):
        torch.testing.assert_close(total(attribute(model, cache, [4, 0], by=by)), logits[:, [4, 0]], **EXACT)


def test_a_heads_attribution_is_what_the_logit_loses_without_it_under_a_frozen_norm() -> None:
    model = vit()
    x = image(1)
    logits, cache = model.run_with_cache(x)
    heads = attribute(model, cache, list(range(5)), by="head").values
    assert heads.shape == (2, 3, 1, 5)
    scale = cache["ln_final.hook_scale"]
    z = cache["z", 1].clone()
    z[:, :, 2] = 0
    attn_out = model.blocks[1].ls1(model.blocks[1].attn.out(z.flatten(2)))
    stream = cache["resid_post", 1] - cache["attn_out", 1] + attn_out
    normed = (stream - stream.mean(-1, keepdim=True)) / scale * model.ln_final.weight + model.ln_final.bias
    torch.testing.assert_close(logits - model.head(normed[:, 0]), heads[1, 2], **EXACT)


def test_heads_behind_a_norm_are_refused_but_layers_are_not() -> None:
    model = vit(kind="res_post")
    logits, cache = model.run_with_cache(image(1), names=names_for(model))
    torch.testing.assert_close(total(attribute(model, cache, [2])), logits[:, [2]], **EXACT)
    with pytest.raises(NotApplicable, match="res_post"):
        attribute(model, cache, [2], by="head")


# -------------------------------------------------------------------- texts, and pairs of towers


def pair(kind: str = "pre", **facts: object) -> HookedDual:
    """Return a dual encoder with a mean of patches and the largest token, every number random."""
    norms = {"ln1": NormSpec(eps=1e-3), "ln2": NormSpec(eps=1e-2), "ln_final": NormSpec(eps=1e-3)}
    given = {"kind": kind, "n_ctx": 6, "n_classes": 5, "scale": 0.3, "d_mlp": 6, **norms}
    text = TextSpec.plain(d_model=8, **given | facts)
    model = HookedDual(DualSpec(vision=vit("avg").spec, text=text, logit_bias=True)).double().eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4 + 0.1)
    return model


def words(n: int = 4) -> Tensor:
    return torch.randint(20, (n, 6), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("by", ["layer", "head", "neuron", "source"])
def test_components_of_either_tower_sum_to_the_logits_of_all_pairs(by: str) -> None:
    model = pair()
    logits, cache = model.run_with_cache(image(0, 3), words())
    torch.testing.assert_close(total(attribute(model, cache, words(), by=by)), logits, **EXACT)
    of_texts = attribute(model, cache, image(0, 3), by=by, tower="text")
    torch.testing.assert_close(total(of_texts).T, logits, **EXACT)
    assert of_texts.labels["class"] == ("image 0", "image 1", "image 2")


def test_a_heads_part_of_the_similarity_is_what_is_lost_without_it_under_frozen_lengths() -> None:
    model = pair()
    _, cache = model.run_with_cache(image(0), words())
    part = cache.tower("text")
    result = part.stack_head_results(return_labels=True)
    stream = cache["text.resid_post", 1] - result[0][result[1].index("L1H0")]
    norm, end = model.text.ln_final, words().argmax(-1)
    normed = (stream - stream.mean(-1, keepdim=True)) / part["ln_final.hook_scale"] * norm.weight + norm.bias
    without = model.text.head(normed[torch.arange(4), end])
    lost = (cache["text.logits"] - without) @ cache["hook_image_embed"][0] * model.logit_scale.exp()
    values = attribute(model, cache, image(0), by="head", tower="text").values[1, 0, :, 0]
    torch.testing.assert_close(values, lost / cache["text.logits"].norm(dim=-1), **EXACT)


def test_zero_shot_classes_are_directions_in_the_vision_towers_output() -> None:
    model = pair()
    classes = model.encode_text(words())
    output, cache = model.vision.run_with_cache(image(0, 2))
    for by in ("layer", "head", "head source"):
        torch.testing.assert_close(total(attribute(model.vision, cache, classes, by=by)), output @ classes.T, **EXACT)


def test_heads_of_a_causal_text_bring_nothing_from_behind_its_end() -> None:
    model = pair()
    found = attribute(model, words(), image(0, 2), by="head source", tower="text").values.flatten(0, 1)
    assert found.shape == (4, 6, 4, 2)
    for text, end in enumerate(words().argmax(-1).tolist()):
        assert found[:, : end + 1, text].all()
        assert not found[:, end + 1 :, text].any()


def test_lens_of_a_text() -> None:
    model = pair()
    _, cache = model.run_with_cache(image(0), words())
    lens = logit_lens(model.text, cache.tower("text"))
    assert lens.logits.shape == (3, 4, 6, 5)
    read = lens.logits[-1, torch.arange(4), words().argmax(-1)]
    torch.testing.assert_close(read, cache["text.hook_logits"], **EXACT)
    seen = logit_lens(model.vision, cache.tower("vision"))
    assert seen.logits.shape == (3, 1, 7, 5)
    texts = HookedText(pair(head=MlpSpec(d_mlp=7, act="gelu")).spec.text).double()
    output, cache = texts.run_with_cache(words())
    lens = logit_lens(texts, cache)
    torch.testing.assert_close(lens.logits[-1, torch.arange(4), words().argmax(-1)], output, **EXACT)


def test_texts_that_norm_their_stream_have_no_lens_and_no_attribution() -> None:
    model = pair("post", ln_final=None)
    _, cache = model.run_with_cache(image(0), words())
    with pytest.raises(NotApplicable, match="norm the stream itself"):
        logit_lens(model.text, cache.tower("text"))
    with pytest.raises(NotApplicable, match="norms the stream itself"):
        attribute(model, cache, image(0), tower="text")
    assert attribute(model, cache, words()).values.shape == (6, 1, 4)


def test_attribution_of_a_head_for_each_of_two_tokens_sums_to_the_logits() -> None:
    model = vit(n_heads_out=2, layout=TokenLayout(cls=1, distillation=1, registers=1, rows=2, columns=3))
    logits, cache = model.run_with_cache(image(0, 2))
    for by in ("layer", "head", "neuron", "source"):
        torch.testing.assert_close(total(attribute(model, cache, [1, 4], by=by)), logits[:, [1, 4]], **EXACT)


def test_models_without_canonical_form_have_no_lens_and_no_attribution() -> None:
    model, x = stages(2), torch.randn(1, 6, 5)
    _, cache = model.run_with_cache(x)
    for study in (logit_lens, partial(attribute, target=0), partial(attribute, target=0, by="head")):
        with pytest.raises(NotApplicable, match="need a canonical form"):
            study(model, cache)
