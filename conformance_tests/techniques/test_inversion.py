"""Textual inversion: a word that was deleted is learned again from images, and twins of each step are caught."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from planted import marked
from planted_dual import WORDS, planted_dual
from prisma_patch import activation_patch, learn_word, read_word, use_word
from prisma_toy import normalise
from prisma_toy.captions import SHAPES, THINGS, draw
from torch import Tensor
from twins import rejects

import prisma_core as prisma
from prisma_core import HookedDual, InputError, NotApplicable, Result

BRIGHT = torch.cat([marked(size, seed) for seed, size in enumerate((0.5, 0.8, 1.0, 1.4))])
DARK = torch.cat([marked(-size, seed) for seed, size in enumerate((0.5, 0.8, 1.0, 1.4), 10)])
OTHERS = [shape for shape in SHAPES if shape != "heart"]


def without(text: str) -> HookedDual:
    """The planted dual encoder whose vocabulary has lost a text."""
    model = planted_dual()
    with torch.no_grad():
        model.text.embed.W_E[list(WORDS).index(text)] = 0
    return model


def planted_truth(learn: Any = learn_word, use: Any = use_word, read: Any = read_word) -> None:
    model, whole, names = without("a bright mark"), planted_dual(), list(WORDS)[:4]
    learned = learn(model, BRIGHT, "a tree", "{}", start="a cat")
    planted = torch.tensor(WORDS["a bright mark"], dtype=torch.float64)
    assert torch.cosine_similarity(learned.values, planted, dim=0) > 0.9
    assert learned.tensors["loss"][-1] < learned.tensors["loss"][0]
    with use(model, learned):
        chances = model.classify(torch.cat([BRIGHT, DARK]), ["a dark mark", "a cat", "a tree"], template="{}")
    assert chances.argmax(1).tolist() == [2] * 4 + [0] * 4
    found = read(whole, learned, names)
    assert found.names("layer") == ("hook_embed", "L0")
    assert (found.sel(word="a bright mark", pos=0).values > 0.9).all()
    assert (found.sel(word="a dark mark", pos=0).values < 0).all()
    assert names[int(found.tensors["output"].argmax())] == "a bright mark"
    assert 0.5 < found.tensors["size"][0, 0] < 3


LEARN = {
    "away from the images": ("loss = -fits.mean() if", "loss = fits.mean() if"),
    "of the text in front": ("_spoken(own, token, vector)", "_spoken(own, token - 1, vector)"),
    "with no step": ("solver.step()", "pass"),
}


@pytest.mark.parametrize("name", LEARN)
def test_the_deleted_text_is_learned_again(name: str) -> None:
    rejects(lambda learn: planted_truth(learn=learn), learn_word, *LEARN[name])


def test_the_learned_word_is_heard_where_its_token_stands() -> None:
    rejects(lambda use: planted_truth(use=use), use_word, "keepdim=True), vector.to(x), x)", "keepdim=True), x, x)")


def test_the_word_is_read_as_the_deleted_one() -> None:
    rejects(
        lambda read: planted_truth(read=read),
        read_word,
        "_centred(ours[0], theirs)",
        "_centred(ours[0], theirs.roll(1, 0))",
    )


# -------------------------------------------------------------------- the toy, without its word for hearts


@cache
def hearts() -> tuple[Tensor, list[str], Tensor, list[str]]:
    """Images of hearts with their texts, ``{}`` for the shape, and as many of other shapes."""
    drawn = draw(600, torch.Generator().manual_seed(3), shapes=(1,))
    names = [THINGS[each] for each in drawn.things[:, 0].tolist()]
    image, texts = normalise(drawn.image), [f"a {name.split()[0]} {{}}" for name in names]
    mine = [at for at, name in enumerate(names) if name.endswith("heart")]
    rest = [at for at in range(600) if at not in mine][: len(mine)]
    return image[mine], [texts[at] for at in mine], image[rest], [texts[at] for at in rest]


def deaf() -> HookedDual:
    model = prisma.load("toy:clip-scenes")
    assert isinstance(model, HookedDual)
    with torch.no_grad():
        heart, unknown = model.tokens(["heart", "wug"])[:, 0]
        model.text.W_E[heart] = model.text.W_E[unknown]
    return model


@torch.no_grad()
def called(model: HookedDual, image: Tensor, texts: list[str], word: str) -> float:
    """The share of images whose shape is said to be a word."""
    rows = (model.classify(each[None], [word, *OTHERS], template=text) for each, text in zip(image, texts, strict=True))
    return float(torch.cat(list(rows)).argmax(1).eq(0).float().mean())


def test_a_shape_without_a_word_gets_one_from_twelve_images_and_it_acts_like_the_real_one() -> None:
    image, texts, other, their_texts = hearts()
    few, fresh = slice(0, 12), slice(12, 72)

    def truth(learn: Any = learn_word, read: Any = read_word) -> None:
        model, whole = deaf(), prisma.load("toy:clip-scenes")
        assert called(model, image[fresh], texts[fresh], "heart") < 0.2, "its word is gone"
        learned = learn(model, image[few], "wug", texts[few], against=OTHERS)
        with use_word(model, learned):
            assert called(model, image[fresh], texts[fresh], "wug") > 0.9
            assert called(model, other[:60], their_texts[:60], "wug") < 0.2
        found = read(whole, learned, ["heart", *OTHERS], template="a red {}")
        at = found.facts["at"]
        assert found.names("layer") == ("hook_embed", "L0", "L1", "L2")
        assert (found.values[1:, 0, at] > 0.8).all(), "from the first block on it does what the real word does"
        assert (found.values[:, 1:, at] < found.values[:, :1, at]).all()
        assert (found.values[:, 1:, at].mean(1) < 0.1).all(), "what all shapes share is not counted"
        assert not found.values[:, :, :at].any(), "the tokens in front know nothing of it"
        assert found.tensors["output"].argmax() == 0

    rejects(lambda read: truth(read=read), read_word, "ours - mean, theirs - mean", "ours, theirs")
    rejects(truth, learn_word, "own.vision(images)", "own.vision(images.roll(1, 0).flip(2))")
    with pytest.raises(AssertionError):  # learned from images of other shapes
        truth(lambda model, shown, *rest, **options: learn_word(model, other[few], *rest, **options))


def test_other_techniques_run_inside_the_scope() -> None:
    image, texts, other, _ = hearts()
    model = deaf()
    learned = learn_word(model, image[:8], "wug", texts[:8], against=OTHERS, steps=40)
    tokens = model.tokens(["a red wug", "a red circle"])
    before = model.encode_text("a red wug")
    with use_word(model, learned):
        inside = activation_patch(
            model, (image[:1], tokens), (other[:1], tokens), (0, 1), at="vision.*hook_z", over="layer"
        )
        assert (model.encode_text("a red wug") - before).abs().max() > 0.1
        assert torch.equal(model.encode_text("a red circle"), model.encode_text("a red circle"))
    outside = activation_patch(
        model, (image[:1], tokens), (other[:1], tokens), (0, 1), at="vision.*hook_z", over="layer"
    )
    assert (inside.values - outside.values).abs().max() > 1e-3
    assert torch.equal(model.encode_text("a red wug"), before)


def test_learning_leaves_the_model_as_it_was() -> None:
    model = deaf()
    before = {name: x.clone() for name, x in model.named_parameters()}
    learn_word(model, hearts()[0][:2], "wug", "a {}", steps=2)
    assert all(torch.equal(x, before[name]) and x.requires_grad for name, x in model.named_parameters())
    assert all(x.grad is None for x in model.parameters())


def test_a_learned_word_is_saved_and_loaded(tmp_path: Any) -> None:
    model = deaf()
    learned = learn_word(model, hearts()[0][:2], "wug", "a {}", steps=2)
    again = Result.load(learned.save(tmp_path / "wug.safetensors"))
    with use_word(model, learned):
        expected = model.encode_text("a wug")
    with use_word(model, again):
        torch.testing.assert_close(model.encode_text("a wug"), expected)


def test_bad_input_is_said() -> None:
    model, image = deaf(), hearts()[0][:3]
    with pytest.raises(NotApplicable, match="dual encoder"):
        learn_word(prisma.load("toy:scenes-cls"), image, "wug")
    with pytest.raises(InputError, match="'red circle'"):
        learn_word(model, image, "red circle", "a {}")
    with pytest.raises(InputError, match="3 images"):
        learn_word(model, image, "wug", ["a {}", "a red {}"])
    with pytest.raises(InputError, match=r"\{\}"):
        learn_word(model, image, "wug", "a heart")
    with pytest.raises(InputError, match="other words than 'star'"):
        learn_word(model, image, "star", "a {}", against=["star"])
    with pytest.raises(InputError, match="'blue star'"):
        learn_word(model, image, "wug", "a {}", start="blue star", steps=1)
    learned = learn_word(model, image, "wug", "a {}", steps=1)
    with pytest.raises(InputError, match="at least 2"):
        read_word(model, learned, ["star"])
    with pytest.raises(InputError, match="hook_pooled"):
        read_word(model, learned, ["star", "heart"], at="hook_pooled")
    with pytest.raises(InputError, match="learn_word"):
        use_word(model, read_word(model, learned, ["star", "heart"]))
