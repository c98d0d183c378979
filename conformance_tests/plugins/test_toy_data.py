"""Toy data: drawn from chances alone, labelled by what is visible."""

from __future__ import annotations

import math

import pytest
import torch
from prisma_toy import dsprites, puzzles, sample_scene, scenes
from prisma_toy.shapes import KINDS, coverage
from prisma_toy.tasks import TASKS, task

from prisma_core import UnknownName


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_is_a_function_of_split_seed_and_step(name: str):
    one = task(name)
    batch = one.batch(6, "train", 3, 5)
    again = one.batch(6, "train", 3, 5)
    assert torch.equal(batch.image, again.image)
    assert torch.equal(batch.target, again.target)
    for other in (("held-out", 3, 5), ("train", 4, 5), ("train", 3, 6)):
        assert not torch.equal(batch.image, one.batch(6, *other).image), other


@pytest.mark.parametrize("name", TASKS)
def test_images_are_as_the_task_states(name: str):
    one = task(name)
    batch = one.batch(12, "train", 0, 0)
    assert batch.image.shape == (12, *one.shape)
    assert 0 <= batch.image.min() < batch.image.max() <= 1
    assert one.size % one.patch == 0
    n_patches = (one.size // one.patch) ** 2
    if batch.tokens is not None:
        assert batch.target.shape == (12, 12)
        assert (batch.target.diagonal() == 1).all(), "its own caption fits every image"
    elif batch.hidden is not None:
        assert batch.hidden.shape == (12, n_patches)
        assert len(set(batch.hidden.sum(1).tolist())) == 1
        assert 0 < batch.hidden.float().mean() < 1
    else:
        assert batch.target.shape == (12, len(one.labels))


@pytest.mark.parametrize("name", [name for name, one in TASKS.items() if one.labels])
def test_labels_are_distributions_and_every_class_is_drawn(name: str):
    one = task(name)
    batch = one.batch(120, "train", 0, 0)
    torch.testing.assert_close(batch.target.sum(1), torch.ones(120))
    if batch.patches is not None:
        assert batch.patches.shape == (120, (one.size // one.patch) ** 2, len(one.labels))
        torch.testing.assert_close(batch.patches.sum(2), torch.ones(batch.patches.shape[:2]))
    if len(one.labels) <= 16:
        assert set(batch.target.argmax(1).tolist()) == set(range(len(one.labels)))


def test_drawing_leaves_the_global_chance_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for one in TASKS.values():
        one.batch(2, "train", 0, 0)
    sample_scene(0)
    assert torch.equal(before, torch.get_rng_state())


def test_an_unknown_task_is_an_error_that_suggests():
    with pytest.raises(UnknownName, match="Did you mean scenes"):
        task("scene")
    assert task("dsprites").name == "dsprites-shape"
    assert task("circle").name == "circle-position"


AREAS = {
    "circle": math.pi * 0.9**2,
    "ellipse": math.pi * 0.55,
    "square": 1.6**2,
    "diamond": 2 * 0.72,
    "cross": 2 * 1.8 * 0.6 - 0.6**2,
    "star": 5 * 0.45 * math.sin(math.pi / 5),
    "triangle": 1.7**2 * math.tan(math.pi / 6),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_keeps_its_area_however_it_is_turned_and_placed(kind: str):
    index, n = torch.tensor([KINDS.index(kind)]), 4
    angle = torch.tensor([0.0, 0.4, 1.3, 2.9])
    x, y = torch.tensor([0.5, 0.43, 0.55, 0.5]), torch.tensor([0.5, 0.52, 0.47, 0.61])
    radius = torch.full((n,), 0.3)
    covered = coverage(index.expand(n), x, y, radius, angle, 128)
    areas = covered.mean((1, 2)) / 0.3**2
    torch.testing.assert_close(areas, areas.mean().expand(n), rtol=0.02, atol=0)
    if kind in AREAS:
        torch.testing.assert_close(areas.mean(), torch.tensor(AREAS[kind]), rtol=0.02, atol=0)


def test_edges_are_antialiased_and_angles_turn_clockwise():
    def one(kind: str, angle: float) -> torch.Tensor:
        at = [torch.tensor([value]) for value in (0.5, 0.5, 0.4, angle)]
        return coverage(torch.tensor([KINDS.index(kind)]), *at, size=64)[0]

    covered = one("circle", 0.0)
    assert ((covered > 0) & (covered < 1)).sum() > 20
    crescent = one("crescent", 0.0)  # its bow is to the right
    assert crescent[:, 32:].sum() > 2 * crescent[:, :32].sum()
    turned = one("crescent", math.pi / 2)  # down
    assert turned[32:].sum() > 2 * turned[:32].sum()


def test_a_scene_says_what_is_visible():
    drawn = scenes.draw(64, 64, torch.Generator().manual_seed(0), two=1.0)
    assert ((drawn.target > 0).sum(1) == 2).all()
    assert ((drawn.classes > 0).sum(1) == 2).all()
    single = scenes.draw(300, 64, torch.Generator().manual_seed(0))
    assert (single.target.max(1).values == 1).all()
    empty = single.target[:, 0] == 1
    assert 10 < empty.sum() < 60
    assert single.visible[empty].amax() == 0
    assert (single.visible[~empty].sum((1, 2, 3)) > 20).all()
    assert ((single.classes > 0).sum(1) > 1).sum() > 30, "some show several copies"
    assert (drawn.visible.sum(1) <= 1 + 1e-5).all(), "what lies behind is not counted"


def test_the_shape_is_where_the_truth_says_and_of_its_colour():
    classes = torch.zeros(8, 4, dtype=torch.long)
    classes[:, 0] = 1 + scenes.LABELS[1:].index("🟣 purple circle")
    drawn = scenes.draw_classes(classes, 64, torch.Generator().manual_seed(2))
    inside = drawn.visible[:, 0] > 0.99
    for image, where in zip(drawn.image, inside, strict=True):
        red, green, blue = image[:, where].mean(1)
        assert red > 1.4 * green
        assert blue > 1.4 * green
        outside = image[:, ~where].mean(1)
        assert outside.max() - outside.min() < 0.15, "ground has little colour"


def test_a_sample_scene_is_larger_and_knows_its_truth():
    scene = sample_scene(4, n_shapes=3)
    assert scene.image.size == (384, 384)
    assert len(set(scene.labels)) == 3
    grid = scene.patch_classes(8)
    assert grid.shape == (8, 8)
    assert {0, *scene.classes} == set(grid.unique().tolist())
    assert sample_scene(4, n_shapes=3).image.tobytes() == scene.image.tobytes()
    assert sample_scene(5, n_shapes=3).image.tobytes() != scene.image.tobytes()


def test_sprites_follow_each_factor():
    base = torch.tensor([2, 2, 3, 10, 20])

    def of(**changes: int) -> torch.Tensor:
        factors = base.clone()
        for name, value in changes.items():
            factors[list(dsprites.FACTORS).index(name)] = value
        return dsprites.draw(factors[None])[0, 0]

    image = of()
    assert set(image.unique().tolist()) == {0.0, 1.0}
    assert of(scale=5).sum() > of(scale=2).sum() > of(scale=0).sum()
    ticks = torch.arange(64.0)
    assert (of(x=30).sum(0) * ticks).sum() / of(x=30).sum() > 30 > (image.sum(0) * ticks).sum() / image.sum()
    assert (of(y=0).sum(1) * ticks).sum() / of(y=0).sum() < 25
    for name in ("shape", "orientation"):
        assert not torch.equal(image, of(**{name: 0}))
    corners = torch.tensor([[0, 5, 5, x, y] for x in (0, 31) for y in (0, 31)])
    assert not dsprites.draw(corners)[..., [0, -1], :].any(), "no sprite is cut off"


def test_an_induction_label_follows_the_only_earlier_copy():
    _, target, sequence = puzzles.induction(300, torch.Generator().manual_seed(0))
    for glyphs, label in zip(sequence.tolist(), target.tolist(), strict=True):
        *before, last = glyphs
        assert before.count(last) == 1
        assert glyphs[before.index(last) + 1] == label
        assert before.index(last) + 1 < len(glyphs) - 1


def test_a_circle_is_labelled_by_cell_and_size():
    image, cell, size = puzzles.circles(200, torch.Generator().manual_seed(0))
    ticks = (torch.arange(32) + 0.5) / 32
    solid = (image[:, 0] > 0.5).float()
    weight = solid.sum((1, 2))
    small = size <= 1
    for ink, row_column, mass in zip(solid[small], cell[small], weight[small], strict=True):
        y, x = (ink.sum(1) * ticks).sum() / mass, (ink.sum(0) * ticks).sum() / mass
        if 0.25 < x < 0.75 and 0.25 < y < 0.75:  # not cut off by the border
            assert int(y * 4) * 4 + int(x * 4) == row_column
    inner = [weight[size == k].mean() for k in range(puzzles.CIRCLE_SIZES)]
    assert inner == sorted(inner)
