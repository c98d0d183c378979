"""Text towers and dual encoders: masks, pooling, two towers in one cache, texts in."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from prisma_conformance.randomise import randomise
from torch import Tensor

import prisma_core as prisma
from prisma_core import InputError
from prisma_core.inputs import Preprocess
from prisma_core.maps.places import HookMap, Place
from prisma_core.maps.weights import WeightMap
from prisma_core.spec import (
    DualSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
    TextPoolSpec,
    TextSpec,
)
from prisma_core.transformer import HookedDual, HookedText, build

LN = NormSpec(eps=1e-3)


FACTS: dict[str, Any] = {"norm": LN, "scale": 0.4, "d_mlp": 20, "act": "quick_gelu", "n_classes": 10}


def text_spec(**facts: Any) -> TextSpec:
    return TextSpec.plain(**FACTS | {"n_vocab": 50, "n_ctx": 9} | facts)


def drawn(spec: TextSpec | DualSpec, seed: int = 0):
    return randomise(build(spec).double(), torch.Generator().manual_seed(seed)).eval()


@pytest.fixture(scope="module")
def dual() -> HookedDual:
    vision = ModelSpec.plain(d_model=16, layers=3, image=16, ln_pre=LN, **FACTS)
    return drawn(DualSpec(vision=vision, text=text_spec(), logit_bias=True))


def inputs_of(model: HookedDual | HookedText, batch: int = 2) -> list[Tensor]:
    given = model.sample_inputs(batch, generator=torch.Generator().manual_seed(3))
    return [x.double() if x.is_floating_point() else x for x in given]


@torch.no_grad()
def test_a_causal_tower_does_not_look_ahead() -> None:
    model = drawn(text_spec(pool=TextPoolSpec(kind="none"), n_classes=None))
    (tokens,) = inputs_of(model)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).all(-1).any()
    both = drawn(text_spec(pool=TextPoolSpec(kind="none"), causal=False))
    assert not torch.isclose(both(tokens), both(changed)).all(-1).any()


@torch.no_grad()
def test_the_explicit_kernel_masks_as_the_fused_one_does() -> None:
    model = drawn(text_spec(pad_id=7))
    (tokens,) = inputs_of(model)
    tokens[:, -3:] = 7
    fused = model(tokens)
    explicit, cache = model.run_with_cache(tokens, names=["pattern", "attn_scores"])
    assert torch.allclose(fused, explicit, atol=1e-12)
    pattern = cache["pattern", 0]
    assert not pattern[..., -3:].any()
    assert not pattern.triu(1).any()
    assert torch.isneginf(cache["attn_scores", 1][..., -1]).all()


@torch.no_grad()
def test_padding_is_not_read() -> None:
    model = drawn(text_spec(pad_id=7, causal=False, pool=TextPoolSpec(kind="first")))
    (tokens,) = inputs_of(model)
    tokens[:, -3:] = 7
    assert torch.allclose(model(tokens), model(tokens[:, :-3]), atol=1e-12)


@pytest.mark.parametrize(
    ("pool", "at"),
    [
        (TextPoolSpec(kind="argmax"), 2),
        (TextPoolSpec(kind="eos", eos_id=5), 1),
        (TextPoolSpec(kind="first"), 0),
        (TextPoolSpec(kind="last"), 3),
    ],
)
@torch.no_grad()
def test_pooling_takes_the_position_it_names(pool: TextPoolSpec, at: int) -> None:
    model = drawn(text_spec(pool=pool))
    tokens = torch.tensor([[3, 5, 49, 5]])
    _, cache = model.run_with_cache(tokens, names=["hook_ln_final", "hook_pooled"])
    assert torch.equal(cache["hook_pooled"], cache["hook_ln_final"][:, at])


@torch.no_grad()
def test_two_towers_in_one_cache(dual: HookedDual) -> None:
    image, tokens = inputs_of(dual)
    logits, cache = dual.run_with_cache(image, tokens)
    assert logits.shape == (2, 3)
    assert torch.equal(cache["vision.blocks.2.attn.hook_z"], dual.vision.run_with_cache(image)[1]["z", 2])
    assert torch.equal(cache["text.blocks.1.attn.hook_z"], dual.text.run_with_cache(tokens)[1]["z", 1])
    assert dual.resolve(("resid_post", -1)) == ["vision.blocks.2.hook_resid_post", "text.blocks.1.hook_resid_post"]
    assert dual.resolve("text.z") == ["text.blocks.0.attn.hook_z", "text.blocks.1.attn.hook_z"]
    alike = dual.encode_image(image, normalize=True) @ dual.encode_text(tokens, normalize=True).T
    assert torch.allclose(logits, alike * dual.logit_scale.exp() + dual.logit_bias, atol=1e-12)
    edited = dual.run_with_hooks(image, tokens, hooks={"vision.blocks.0.hook_resid_post": lambda x, at: x * 0.5})
    assert not torch.isclose(edited, logits).any()


@torch.no_grad()
def test_features_are_raw_unless_unit_vectors_are_asked_for(dual: HookedDual) -> None:
    image, tokens = inputs_of(dual)
    for encode, tower, given in ((dual.encode_image, dual.vision, image), (dual.encode_text, dual.text, tokens)):
        assert torch.equal(encode(given), tower(given))
        assert not torch.allclose(encode(given).norm(dim=-1), torch.ones(len(given)).double())
        assert torch.equal(encode(given, normalize=True), torch.nn.functional.normalize(tower(given), dim=-1))


@torch.no_grad()
def test_a_tower_by_itself_leaves_hooks_on_the_other_alone(dual: HookedDual) -> None:
    image, tokens = inputs_of(dual)
    seen: list[str] = []
    with dual.hooks({"*": lambda x, at: seen.append(at.name)}), dual.caching(["resid_post", "hook_image_embed"]):
        dual.encode_image(image, normalize=True)
    assert {name.split(".")[0] for name in seen} == {"vision", "hook_image_embed"}
    late = {("resid_post", -1): lambda x, at: None}  # of both towers
    with (
        pytest.raises(prisma.HookError, match=r"text\.blocks\.1\.hook_resid_post was not reached in this pass\. Ask"),
        dual.hooks(late),
    ):
        dual.text(tokens, stop_at_layer=1)
    with dual.vision.hooks(late):
        dual(image, tokens)


@torch.no_grad()
def test_zero_shot_with_texts(dual: HookedDual) -> None:
    image, _ = inputs_of(dual)
    dual.tokenizer = lambda texts: torch.tensor([[len(t) % 50, 49, *[0] * 5] for t in texts])
    try:
        chances = dual.classify(image, ["cat", "giraffe", "ox"])
        assert chances.shape == (2, 3)
        assert torch.allclose(chances.sum(-1), torch.ones(2).double())
        assert torch.allclose(
            chances,
            dual(image, dual.tokens(["a photo of a cat.", "a photo of a giraffe.", "a photo of a ox."])).softmax(-1),
        )
    finally:
        dual.tokenizer = None
    with pytest.raises(prisma.InputError, match="has no tokenizer"):
        dual.encode_text("a cat")


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (torch.zeros(2, 10, dtype=torch.long), "at most 9 tokens, got 10"),
        (torch.zeros(2, 3), "whole numbers"),
        (torch.full((1, 3), 50), "from 0 to 49, got 50"),
        (["a cat"], "got .'a cat'"),
    ],
)
def test_tokens_that_are_none(dual: HookedDual, tokens: object, said: str) -> None:
    with pytest.raises(prisma.InputError, match=said):
        dual.text(tokens)


@torch.no_grad()
def test_saved_and_loaded(dual: HookedDual, tmp_path) -> None:
    inputs = inputs_of(dual)
    prisma.save(dual, tmp_path)
    back = prisma.load(f"file:{tmp_path}")
    assert isinstance(back, HookedDual)
    assert back.spec == dual.spec
    assert torch.allclose(back(*inputs), dual(*inputs), atol=1e-12)


# -------------------------------------------------------------------- what some texts have more


@torch.no_grad()
def test_a_token_behind_the_text_is_read_last() -> None:
    pool = TextPoolSpec(kind="last")
    model = drawn(text_spec(suffix=True, pad_id=7, pool=pool))
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 7, 7]])
    _, cache = model.run_with_cache(tokens)
    assert cache["hook_embed"].shape[1] == 9
    assert cache["hook_full_embed"].shape[1] == 10
    assert torch.equal(cache["hook_pooled"], cache["hook_ln_final"][:, 9])
    pattern = cache["pattern", 1]
    assert not pattern[..., 6:9].any(), "padding is hidden"
    assert pattern[:, :, 9, 9].all(), "the token behind it is not"
    late = drawn(text_spec(suffix=True, pad_id=7, pad_lag=1, pool=pool))
    pattern = late.run_with_cache(tokens, names=["pattern"])[1]["pattern", 1]
    assert pattern[:, :, 9, 6].all()
    assert not pattern[..., 7:].any(), "all is hidden one place too late"


@torch.no_grad()
def test_positions_may_count_the_text_alone() -> None:
    model = drawn(text_spec(pad_id=7, pos_by_text=True, causal=False, pool=TextPoolSpec(kind="first")))
    assert model.embed.pos_embed.shape[0] == 10
    tokens = torch.tensor([[3, 7, 4, 5, 7]])
    _, cache = model.run_with_cache(tokens, names=["hook_pos_embed"])
    assert torch.equal(cache["hook_pos_embed"][0], model.embed.pos_embed[[1, 0, 2, 3, 0]])
    with pytest.raises(ValueError, match="need a padding"):
        text_spec(pos_by_text=True)


@torch.no_grad()
def test_the_mean_leaves_padding_out_and_an_mlp_may_project_it() -> None:
    head = MlpSpec(d_mlp=6, act="gelu")
    model = drawn(text_spec(pad_id=7, causal=False, pool=TextPoolSpec(kind="avg"), head=head))
    tokens = torch.tensor([[3, 4, 5, 7, 7]])
    out, cache = model.run_with_cache(tokens)
    assert torch.allclose(cache["hook_pooled"], cache["hook_ln_final"][:, :3].mean(1), atol=1e-12)
    assert torch.allclose(out, model(tokens[:, :3]), atol=1e-12)
    post = torch.nn.functional.gelu(cache["head_mlp.hook_pre"])
    assert torch.allclose(post @ model.head_mlp.W_out + model.head_mlp.b_out, out, atol=1e-12)
    with pytest.raises(prisma.NotApplicable, match="head is an MLP"):
        _ = model.W_U
    with pytest.raises(ValueError, match="needs a padding"):
        text_spec(pool=TextPoolSpec(kind="avg"))


@torch.no_grad()
def test_a_post_norm_block_norms_the_stream_itself() -> None:
    model = drawn(text_spec(kind="post", ln2=NormSpec(eps=0.1), ln_final=None))
    inputs = inputs_of(model)
    _, cache = model.run_with_cache(*inputs)
    mid, end = cache["resid_mid", 0], cache["resid_post", 0]
    assert torch.allclose(mid, cache["resid_pre", 0] + cache["attn_out", 0], atol=1e-12)
    assert torch.allclose(end, model.blocks[0].ln1.fused(mid) + cache["mlp_out", 0], atol=1e-12)
    assert torch.allclose(cache["resid_pre", 1], model.blocks[0].ln2.fused(end), atol=1e-12)
    halved = model.run_with_hooks(*inputs, hooks={("resid_post", 1): lambda x, at: x * 0.5})
    assert not torch.isclose(halved, model(*inputs)).any(), "eps is large, so a norm does not undo a scale"
    with pytest.raises(ValueError, match="those of texts"):
        ModelSpec.plain(kind="post")


# -------------------------------------------------------------------- tables of parts


def test_tables_of_parts_join_into_one() -> None:
    part = WeightMap.parse(
        """
        w           ->  a.weight   : (h d) m -> h d m
        w | zeros   ->  b.weight   : {twice}
        ignore c.{*}  :   a constant
        """,
        {"twice": lambda w: 2 * w},
        h=2,
    )
    other = WeightMap.parse("w  ->  a.weight  : (h d) m -> h d m", h=3)
    whole = part.without("b.{*}").prefixed("one.", "left.") | other.prefixed("two.", "right.")
    tensors = {"one.w": torch.randn(4, 5), "two.w": torch.randn(6, 5), "one.c.x": torch.ones(1)}
    shapes = {"left.a.weight": torch.Size([2, 2, 5]), "right.a.weight": torch.Size([3, 2, 5])}
    made = whole.forward(tensors, shapes)
    assert torch.equal(made["left.a.weight"].flatten(0, 1), tensors["one.w"])
    assert torch.equal(made["right.a.weight"].flatten(0, 1), tensors["two.w"])
    back = whole.backward(made, tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    del tensors["two.w"]
    doubled = part.prefixed("one.", "left.").forward(
        tensors, {"left.a.weight": shapes["left.a.weight"], "left.b.weight": torch.Size([4, 5])}
    )
    assert torch.equal(doubled["left.b.weight"], 2 * tensors["one.w"])


def test_hook_maps_of_parts_join_into_one() -> None:
    part = HookMap.parse("conv -> hook_embed : b (h d) -> b h d\n@ softmax : in -> hook_logits", h=2)
    whole = part.prefixed("visual.", "vision.") | part.without("hook_logits").prefixed("text.", "text.")
    rows = {row.hook: row for row in whole.bound(["vision.hook_embed", "vision.hook_logits", "text.hook_logits"])}
    assert set(rows) == {"vision.hook_embed", "vision.hook_logits"}
    assert rows["vision.hook_embed"].place == Place("visual.conv")
    assert rows["vision.hook_logits"].place == Place("visual", "softmax", side="in")
    assert rows["vision.hook_embed"].read(torch.zeros(3, 8), whole.sizes).shape == (3, 2, 4)


def test_a_tower_has_the_preprocessing_and_tokenizer_of_the_whole(dual: HookedDual) -> None:
    dual.preprocess = Preprocess(size=(16, 16))
    dual.tokenizer = lambda texts: torch.zeros(len(texts), 9, dtype=torch.long)
    try:
        assert dual.vision.preprocess is dual.preprocess
        assert dual.text.tokens(["a", "b"]).shape == (2, 9)
    finally:
        dual.preprocess = dual.tokenizer = None


def letters(texts: Sequence[str]) -> Tensor:
    """Return a letter a token, cut and filled up to nine; 49 is the end of the text."""
    rows = [[*(ord(letter) % 48 for letter in text[:8]), 49] for text in texts]
    return torch.tensor([row + [48] * (9 - len(row)) for row in rows])


@pytest.fixture
def reader(dual: HookedDual, monkeypatch: pytest.MonkeyPatch) -> HookedDual:
    monkeypatch.setattr(dual.text, "tokenizer", letters)
    return dual


@torch.no_grad()
def test_one_label_is_a_text_and_not_its_letters(reader: HookedDual) -> None:
    image, _ = inputs_of(reader)
    assert reader.classify(image, "cat", template="{}").shape == (2, 1)
    assert torch.equal(
        reader.classify(image, ["cat", "ox"], template="{}"), reader(image, letters(["cat", "ox"])).softmax(-1)
    )


@pytest.mark.parametrize(
    ("labels", "template"), [(["cat"], "a photo"), (["cat"], ["{}", "a {}"]), ([], "{}"), ([1, 2], "{}"), (None, "{}")]
)
def test_labels_and_templates_that_say_nothing_are_refused(reader: HookedDual, labels: Any, template: Any) -> None:
    with pytest.raises(InputError, match="Expected"):
        reader.classify(inputs_of(reader)[0], labels, template=template)


def test_images_alone_are_refused_with_the_way_to_one_tower(reader: HookedDual) -> None:
    image, _ = inputs_of(reader)
    for run in (reader, reader.run_with_cache, reader.run_with_hooks):
        with pytest.raises(InputError, match=r"got no tokens.*encode_image.*vision\.run_with_cache"):
            run(image)


def test_a_text_that_is_cut_is_said_to_be(reader: HookedDual) -> None:
    with pytest.warns(UserWarning, match=r"1 of 2 texts are longer than the 9 tokens") as seen:
        reader.tokens(["cat", "cat " * 5])
    assert len(seen) == 1
    with warnings.catch_warnings(action="error"):
        reader.tokens(["a letter"])  # fills the nine, with its end


def test_what_is_no_text_is_refused(reader: HookedDual) -> None:
    for wrong in ([1, 2], [], ["cat", None], 3, None):
        with pytest.raises(InputError, match="Expected a text"):
            reader.tokens(wrong)  # type: ignore[arg-type]


def test_a_model_without_a_tokenizer_says_where_there_is_one(reader: HookedDual) -> None:
    tokenizer, reader.tokenizer = reader.tokenizer, None
    with pytest.raises(InputError, match=r"model\.tokenizer = open_clip\.get_tokenizer"):
        reader.tokens("cat")
    reader.reference = "toy:dual"
    with pytest.raises(InputError, match=r"model\.tokenizer = prisma\.load\('toy:dual'\)\.tokenizer"):
        reader.tokens("cat")
    reader.tokenizer = tokenizer
    assert torch.equal(reader.tokens("cat"), letters(["cat"]))


def test_decompositions_of_a_pair_say_whose_to_take(dual: HookedDual) -> None:
    image, tokens = inputs_of(dual)
    _, cache = dual.run_with_cache(image, tokens)
    with pytest.raises(prisma.NotApplicable, match=r"cache\.tower\('vision'\) or cache\.tower\('text'\)"):
        cache.decompose_resid()
    for name in ("vision", "text"):
        assert len(cache.tower(name).accumulated_resid()) > 1
