"""The data of captions, motions and sums: what is drawn is what is said of it."""

from __future__ import annotations

import doctest
import importlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from prisma_toy import (
    Words,
    captions,
    counting,
    draw_captions,
    draw_digits,
    draw_hidden,
    draw_motions,
    draw_scenes,
    draw_sprites,
    draw_sums,
    hide,
    motions,
    patch_classes,
    sample_scene,
)
from prisma_toy.masking import from_patches, to_patches

from prisma_core import InputError, UnknownName
from prisma_core.host import installed

# -------------------------------------------------------------------- all of them


@pytest.mark.parametrize("module", ["data", "words", "captions"])
def test_the_examples_in_docstrings_are_true(module: str):
    result = doctest.testmod(importlib.import_module(f"prisma_toy.{module}"))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("draw", [draw_scenes, draw_captions, draw_motions, draw_sums, draw_sprites])
def test_a_seed_decides_everything_and_none_is_an_error(draw):
    def pixels(seed: int) -> torch.Tensor:
        drawn = draw(3, seed)
        return drawn.video if isinstance(drawn, motions.Motions) else drawn.image

    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(pixels(4), pixels(4))
    assert not torch.equal(pixels(4), pixels(5))
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(InputError, match="n= to be at least 1; got 0"):
        draw(0)


def test_digits_are_real_images_with_their_digits():
    image, digit = draw_digits(5, seed=1)
    assert image.shape == (5, 1, 8, 8)
    assert digit.shape == (5,)
    assert torch.equal(image * 16, (image * 16).round()), "held-out ones are as they were scanned"


def centre_of(covered: torch.Tensor) -> torch.Tensor:
    """The middle of what is covered, x and y in 0..1: ``[... height width] -> [... 2]``."""
    ticks = (torch.arange(covered.shape[-1]) + 0.5) / covered.shape[-1]
    x, y = (covered * ticks).sum((-1, -2)), (covered * ticks[:, None]).sum((-1, -2))
    return torch.stack([x, y], -1) / covered.sum((-1, -2))[..., None]


# -------------------------------------------------------------------- captions


def test_a_caption_says_where_the_shapes_are():
    drawn = captions.draw(400, torch.Generator().manual_seed(0), shapes=(2,), photo=0.0)
    first, second = centre_of(drawn.visible).unbind(1)
    swapped = 0
    for said, (one, two), a, b in zip(drawn.captions, drawn.things.tolist(), first, second, strict=True):
        names = [captions.THINGS[one], captions.THINGS[two]]
        said = said.replace("an ", "a ")
        if said.index(names[0]) > said.index(names[1]):
            a, b, swapped = b, a, swapped + 1
        (dx, dy), relation = (b - a).tolist(), next(each for each in captions.RELATIONS if each in said)
        towards = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}
        assert towards[relation] > 0.3, said
        assert towards[relation] == max(towards.values()), said
    assert 120 < swapped < 280, "either of the two is named first"


def test_a_thing_has_the_colour_that_is_said():
    drawn = captions.draw(200, torch.Generator().manual_seed(1), shapes=(1,))
    for image, covered, (thing, none), said in zip(
        drawn.image, drawn.visible, drawn.things.tolist(), drawn.captions, strict=True
    ):
        assert none == -1
        assert captions.THINGS[thing] in said
        mean = image[:, covered[0] > 0.9].mean(1)
        distance = {name: (mean - torch.tensor(rgb)).abs().sum() for name, rgb in captions.COLOURS.items()}
        assert min(distance, key=lambda name: float(distance[name])) == captions.THINGS[thing].split()[0]


def test_unseen_combinations_are_never_drawn_in_training_and_always_on_request():
    def things(unseen: bool) -> tuple[set[str], set[str]]:
        drawn = captions.draw(1200, torch.Generator().manual_seed(2), unseen=unseen)
        names = [{captions.THINGS[thing] for thing in column.tolist() if thing >= 0} for column in drawn.things.T]
        return names[0], names[1]

    seen_first, seen_second = things(unseen=False)
    assert not (seen_first | seen_second) & set(captions.UNSEEN)
    assert len(seen_first) == 30
    first, second = things(unseen=True)
    assert first == set(captions.UNSEEN)
    assert not second & set(captions.UNSEEN)
    words = [set(column) for column in zip(*(name.split() for name in captions.UNSEEN), strict=True)]
    assert words == [set(captions.COLOURS), set(captions.SHAPES)], "each colour and each shape once"
    trained = {word for name in seen_first for word in name.split()}
    assert trained == {*captions.COLOURS, *captions.SHAPES}, "every word is learned from other things"


def test_captions_fit_what_says_the_same_and_nothing_else():
    red, star = captions.THINGS.index("red circle"), captions.THINGS.index("blue star")
    things = torch.tensor([[red, star], [star, red], [red, star], [star, red], [red, -1], [red, -1]])
    relation = torch.tensor([0, 1, 1, 2, -1, -1])
    drawn = captions.Captioned(torch.empty(0), things, relation, (), torch.empty(0))
    same = {(0, 1), (1, 0), (4, 5), (5, 4)} | {(index, index) for index in range(6)}
    assert {tuple(pair) for pair in drawn.fits.nonzero().tolist()} == same


def test_pairs_come_in_all_four_relations():
    drawn = captions.draw(64, torch.Generator().manual_seed(3), shapes=(2,))
    things, relation = drawn.things.view(16, 4, 2), drawn.relation.view(16, 4)
    assert (things == things[:, :1]).all()
    assert (things[..., 0] != things[..., 1]).all()
    assert (relation == torch.arange(4)).all()


def test_lone_things_alike_come_in_fours_of_one_colour_and_four_shapes():
    drawn = captions.draw(400, torch.Generator().manual_seed(3), shapes=(1,), alike=True)
    things = drawn.things[:, 0].view(100, 4)
    colour, shape = things // len(captions.SHAPES), things % len(captions.SHAPES)
    assert (colour == colour[:, :1]).all()
    assert all(len(set(row)) == 4 for row in shape.tolist())
    named = {captions.THINGS[thing] for thing in things.flatten().tolist()}
    assert named == set(captions.THINGS) - set(captions.UNSEEN)
    assert captions.draw(6, torch.Generator().manual_seed(3), alike=True).image.shape == (6, 3, 64, 64)


def test_patches_show_the_things_that_cover_them():
    drawn = captions.draw(80, torch.Generator().manual_seed(5))
    shown = drawn.patch_things(8)
    assert shown.shape == (80, 64, len(captions.THINGS))
    assert set(shown.unique().tolist()) == {0, 1}
    for image in range(80):
        there = {thing for thing in drawn.things[image].tolist() if thing >= 0}
        assert set(shown[image].nonzero()[:, 1].tolist()) <= there
        for slot, thing in enumerate(drawn.things[image].tolist()):
            if thing < 0:
                continue
            patches = [
                8 * row + column
                for row in range(8)
                for column in range(8)
                if drawn.visible[image, slot, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].mean() >= 0.5
            ]
            assert shown[image, :, thing].nonzero()[:, 0].tolist() == patches
    assert shown.any((1, 2)).all()


def test_an_unknown_thing_is_an_error_that_suggests():
    assert captions.caption("orange star") == "an orange star"
    with pytest.raises(UnknownName, match="Did you mean red circle"):
        captions.caption("red circl")
    with pytest.raises(UnknownName, match="left of"):
        captions.caption("red circle", "left", "blue star")


# -------------------------------------------------------------------- words


WORDS = captions.WORDS


def test_every_caption_is_the_same_after_a_trip_through_tokens():
    said = captions.draw(300, torch.Generator().manual_seed(4)).captions
    tokens = WORDS(said)
    assert tokens.shape == (300, WORDS.length)
    assert WORDS.decode(tokens) == list(said)
    assert (tokens.argmax(1) == torch.tensor([len(each.split()) for each in said])).all(), "the end is the largest id"
    assert tokens.max() == len(WORDS) - 1
    assert not (tokens == 1).any(), "no word of a caption is unknown"


def test_capitals_and_punctuation_do_not_count_and_unknown_words_are_listed():
    assert torch.equal(WORDS(["A RED circle."]), WORDS("a red circle"))
    assert WORDS.unknown(["a crimson circle", "a photo of a red cat"]) == ["cat", "crimson"]
    assert WORDS.unknown("a red circle") == []
    tokens = WORDS(["a crimson circle"])
    assert WORDS.decode(tokens) == ["a <unknown> circle"]
    assert WORDS.decode(tokens[0]) == "a <unknown> circle"


def test_what_is_too_long_is_cut_before_its_end():
    tokens = WORDS(["red " * 40])
    assert tokens.shape == (1, WORDS.length)
    assert tokens[0, -1] == len(WORDS) - 1
    assert WORDS.decode(tokens)[0].split() == ["red"] * (WORDS.length - 1)
    with pytest.raises(InputError, match=str(len(WORDS))):
        WORDS.decode([0, len(WORDS)])


def test_words_are_saved_as_words(tmp_path: Path):
    source = installed().source_of(WORDS)
    assert source is not None
    source.save_processor(Words(("one", "zwei"), length=4), tmp_path)
    again = source.load_processor(tmp_path)
    assert (again.words, again.length) == (("one", "zwei"), 4)
    assert "zwei" in (tmp_path / "words.json").read_text()


# -------------------------------------------------------------------- motions


def test_a_shape_moves_the_way_that_is_said():
    drawn = draw_motions(400, seed=1)
    assert drawn.video.shape == (400, 8, 1, 32, 32)
    step = centre_of(drawn.visible)[:, -1] - centre_of(drawn.visible)[:, 0]
    angle = torch.atan2(step[:, 1], step[:, 0])  # y runs down
    nearest = (angle / (2 * torch.pi / 8)).round().long() % 8
    assert torch.equal(nearest, drawn.direction)
    assert set(drawn.direction.tolist()) == set(range(8))
    assert motions.DIRECTIONS[2] == "down"
    down = step[drawn.direction == 2]
    assert (down[:, 1] > 0.15).all()
    assert (down[:, 0].abs() < 0.05).all()


def test_no_shape_leaves_the_image_and_the_middle_of_its_way_tells_nothing():
    drawn = draw_motions(3000, seed=2)
    area = drawn.visible.sum((2, 3))
    assert (area.amin(1) > 0.93 * area.amax(1)).all(), "a shape cut off at a border would be smaller"
    middle = drawn.centre.mean(1)
    for direction in range(8):
        part = middle[drawn.direction == direction]
        assert (part.mean(0) - 0.5).abs().max() < 0.03


# -------------------------------------------------------------------- sums


def test_there_are_as_many_fruit_as_is_said():
    drawn = draw_sums(300, seed=1)
    fruit = drawn.visible[:, :-1].sum((2, 3)) > 10
    assert torch.equal(fruit.view(300, 2, 4).sum(2), drawn.numbers)
    assert torch.equal(drawn.total, drawn.numbers.sum(1))
    x = centre_of(drawn.visible)[..., 0]
    assert (x[:, :4][fruit[:, :4]] < 0.46).all()
    assert (x[:, 4:8][fruit[:, 4:]] > 0.54).all()
    assert ((x[:, 8] - 0.5).abs() < 0.01).all(), "the plus stands between"
    assert drawn.visible.sum(1).max() < 1.3, "fruit do not lie on one another"


def test_sums_are_said_in_words():
    drawn = counting.render(torch.tensor([[2, 2], [1, 3]]), torch.tensor([[0, 0], [2, 1]]), torch.Generator())
    assert drawn.captions == ("2 apples and 2 apples", "1 plum and 3 lemons")
    assert drawn.questions[0] == "2 apples and 2 apples: how many?"


def test_splits_share_no_sum_and_every_total_is_trained_on():
    drawn = {split: draw_sums(600, seed=3, split=split) for split in ("train", "held-out", "all")}
    sums = {split: Counter(map(tuple, each.numbers.tolist())) for split, each in drawn.items()}
    assert set(sums["held-out"]) == set(counting.HELD_OUT_SUMS)
    assert (2, 2) in sums["held-out"]
    assert set(sums["train"]) == set(counting.SUMS) - set(counting.HELD_OUT_SUMS)
    assert set(sums["all"]) == set(counting.SUMS)
    assert {sum(each) for each in sums["train"]} == set(counting.TOTALS)
    assert min(sums["train"].values()) > 25
    with pytest.raises(InputError, match="held-out"):
        draw_sums(1, split="test")  # pyright: ignore


def test_patches_are_labelled_by_what_covers_them():
    kinds = torch.tensor([[0, 1], [3, 3]])
    drawn = counting.render(torch.tensor([[4, 4], [1, 1]]), kinds, torch.Generator().manual_seed(1))
    grid = patch_classes(drawn, 16)
    assert grid.shape == (2, 16, 16)
    left, right = grid[0, :, :7], grid[0, :, 9:]
    assert set(left.unique().tolist()) == {0, 1}
    assert set(right.unique().tolist()) == {0, 2}
    assert set(grid[1].unique().tolist()) <= {0, 4, 5}
    assert counting.PATCH_LABELS[4] == "lime"
    shown = (grid[0] > 0).sum(), (grid[1] > 0).sum()
    assert shown[0] > 2.5 * shown[1]


def test_patch_classes_of_scenes_are_those_of_their_grid():
    drawn, scene = draw_scenes(5, seed=2), sample_scene(3)
    assert torch.equal(patch_classes(drawn, 12), drawn.share(12).argmax(1))
    assert patch_classes(scene, 8).shape == (8, 8)
    assert set(patch_classes(scene, 8).unique().tolist()) == {0, *scene.classes}


# -------------------------------------------------------------------- hidden patches


def test_hidden_patches_are_grey_and_the_others_as_they_were():
    image = draw_scenes(4, seed=1, size=48).image
    hidden = draw_hidden(4, 64, 0.5, torch.Generator().manual_seed(0))
    assert (hidden.sum(1) == 32).all()
    patches, kept = to_patches(hide(image, hidden, 6), 6), to_patches(image, 6)
    assert (patches[hidden] == 0.5).all()
    assert torch.equal(patches[~hidden], kept[~hidden])
    assert torch.equal(from_patches(kept, 6, 48), image)
