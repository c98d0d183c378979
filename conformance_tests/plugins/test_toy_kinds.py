"""What a toy is made of: the options that change the model, and the kinds of model that tasks make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from prisma_toy import captions, normalise
from prisma_toy.card import MODEL, finish
from prisma_toy.config import Config
from prisma_toy.measure import held_out, patch_logits
from prisma_toy.tasks import TASKS, task
from prisma_toy.training import Trainer, start

import prisma_core as prisma
from prisma_core import HookedDual, HookedViT, InputError

SMALL: dict[str, Any] = {"layers": 2, "d_model": 16, "heads": 2, "batch": 8, "seed": 3}


def train(folder: Path, steps: int = 4, **options: Any) -> Trainer:
    trainer = start({**SMALL, "steps": steps, **options}, folder, resume=False)
    for _ in trainer.run():
        pass
    return trainer


@torch.no_grad()
def moved_by(model: HookedViT, image: torch.Tensor, token: int) -> float:
    """How far the logits move when one token of the last stream is replaced by another image's."""
    last = model(image, stop_at_layer=2)
    changed = last.clone()
    changed[:, token] = changed[:, token].roll(1, 0) + 1
    return float((model(changed, start_at_layer=2) - model(last, start_at_layer=2)).abs().max())


def test_pool_decides_which_tokens_are_read(tmp_path: Path):
    image = normalise(task("circle").batch(4, "held-out", 0, 0).image)
    by_token = train(tmp_path / "token", data="circle", pool="token").model
    by_mean = train(tmp_path / "mean", data="circle", pool="avg").model
    assert isinstance(by_token, HookedViT)
    assert isinstance(by_mean, HookedViT)
    assert moved_by(by_token, image, 0) > 1e-3
    assert moved_by(by_token, image, 5) == 0
    assert moved_by(by_mean, image, 0) > 1e-5
    assert moved_by(by_mean, image, 5) > 1e-5


def test_registers_are_tokens_of_their_own_that_train_and_are_saved(tmp_path: Path):
    trainer = train(tmp_path / "run", data="circle", pool="token", registers=3)
    fresh = Trainer(trainer.config, tmp_path / "fresh").model
    model = trainer.model
    assert isinstance(model, HookedViT)
    assert model.layout.registers == 3
    assert model.embed.prefix.shape == (4, 16)
    assert not (model.embed.prefix == fresh.embed.prefix).all(1).any(), "every prefix token is trained"
    image = normalise(task("circle").batch(2, "held-out", 0, 0).image)
    _, cache = model.run_with_cache(image)
    assert cache["pattern", 1].shape[-1] == 1 + 3 + 64
    finish(trainer, n=20)
    again = prisma.load(f"file:{tmp_path / 'run' / MODEL}")
    assert again.layout.registers == 3
    torch.testing.assert_close(again(image), model(image))
    assert "3 registers" in (tmp_path / "run" / MODEL / "card.md").read_text()


def test_registers_are_seen_by_attention(tmp_path: Path):
    trainer = train(tmp_path / "run", data="circle", pool="token", registers=3)
    image = normalise(task("circle").batch(2, "held-out", 0, 0).image)
    before = trainer.model(image)
    with torch.no_grad():
        trainer.model.embed.prefix[2] += torch.arange(16) / 8  # a constant would fall to the norm
    assert (trainer.model(image) - before).abs().max() > 1e-4


@pytest.mark.parametrize("given", [{"pool": "max"}, {"registers": -1}, {"registers": 65}])
def test_bad_options_of_tokens_are_refused(tmp_path: Path, given: dict[str, Any]):
    with pytest.raises(InputError, match=f"--{next(iter(given))}"):
        start(given, tmp_path / "run", resume=False)


def test_digits_are_split_once_and_scored_on_all_that_are_held_out(tmp_path: Path):
    from prisma_toy import digits

    (train_images, train_digits), (rest, rest_digits) = digits.split(training=True), digits.split(training=False)
    assert (len(train_images), len(rest)) == (1437, 360)
    assert not {image.numpy().tobytes() for image in train_images} & {image.numpy().tobytes() for image in rest}
    assert set(train_digits.tolist()) == set(rest_digits.tolist()) == set(range(10))
    trainer = train(tmp_path / "run", data="digits", pool="token")
    score = held_out(trainer.model, trainer.task, n=5)
    assert score.n == 360
    with torch.no_grad():
        right = trainer.model(normalise(rest)).argmax(1) == rest_digits
    assert score.right == right.sum()


def test_digits_are_moved_in_training_alone():
    from prisma_toy import digits

    def seen(training: bool) -> float:
        images, _ = digits.draw(200, torch.Generator().manual_seed(0), training)
        known = {image.numpy().tobytes() for image in digits.split(training)[0]}
        return sum(image.numpy().tobytes() in known for image in images) / 200

    assert seen(training=False) == 1
    assert seen(training=True) < 0.05


@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [
        ("digits", HookedViT, (8, 10)),
        ("motion", HookedViT, (8, 8)),
        ("counting", HookedViT, (8, 7)),
        ("mae-scenes", HookedViT, (8, 64, 108)),
        ("clip-scenes", HookedDual, (8, 8)),
    ],
)
def test_every_kind_trains_with_the_same_loop_and_loads(tmp_path: Path, name: str, kind: type, shape: tuple[int, ...]):
    trainer = train(tmp_path / "run", data=name, steps=12, lr=0.01)
    fresh = Trainer(trainer.config, tmp_path / "fresh").model
    still = [
        name
        for (name, before), after in zip(fresh.named_parameters(), trainer.model.parameters(), strict=True)
        if torch.equal(before, after) and "qkv" not in name  # a bias of keys changes no softmax
    ]
    assert not still
    finish(trainer, n=8)
    again = prisma.load(f"file:{tmp_path / 'run' / MODEL}")
    assert isinstance(again, kind)
    batch = TASKS[name].batch(8, "held-out", 0, 0)
    given = [normalise(batch.image), *([] if batch.tokens is None else [batch.tokens])]
    logits, cache = again.run_with_cache(*given)
    assert logits.shape == shape
    torch.testing.assert_close(logits, trainer.model(*given))
    prefix = "vision." if kind is HookedDual else ""
    assert f"{prefix}blocks.1.attn.hook_pattern" in cache
    measured = trainer.task.objective.score(trainer.model, batch)
    assert measured.shape == (8,)
    assert ((measured >= 0) & (measured <= 1)).all()


@pytest.mark.parametrize("name", ["clip-scenes", "mae-scenes", "motion", "counting"])
def test_the_loss_of_every_kind_leads_to_its_measure(name: str):
    one, config = task(name), Config(data=name, **SMALL)
    model, batch = one.objective.model(one, config), one.batch(8, "train", 0, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    before, measure = one.objective.loss(model, batch, config)[0].item(), one.objective.score(model, batch).mean()
    for _ in range(60):
        optimizer.zero_grad()
        one.objective.loss(model, batch, config)[0].backward()
        optimizer.step()
    assert one.objective.loss(model, batch, config)[0].item() < before / 2
    assert one.objective.score(model, batch).mean() > measure + 0.2


def test_patches_are_asked_for_the_names_of_what_they_show():
    one, config = task("clip-scenes"), Config(data="clip-scenes", **SMALL)
    model, batch = one.objective.model(one, config), one.batch(8, "train", 0, 0)
    assert batch.patches is not None
    plain, weighted = (
        one.objective.loss(model, batch, config.model_copy(update={"patch_loss": weight}))[0] for weight in (0.0, 0.5)
    )
    votes = patch_logits(model.vision, normalise(batch.image))[:, 1:]
    names = [captions.caption(thing) for thing in captions.THINGS if thing not in captions.UNSEEN]
    logits = model.compare(votes.flatten(0, 1), model.text(captions.WORDS(names))).log_softmax(1)
    shown = batch.patches.flatten(0, 1)
    by_hand = -(logits * shown).sum() / shown.sum()
    torch.testing.assert_close(weighted - plain, 0.5 * by_hand)
    asked = shown.nonzero()[:, 1].unique().tolist()
    said = " ".join(captions.WORDS.decode(batch.tokens))
    assert all(names[each].split(" ", 1)[1] in said for each in asked)


def test_a_masked_autoencoder_takes_no_pooling(tmp_path: Path):
    with pytest.raises(InputError, match="--pool token"):
        start({**SMALL, "data": "mae-scenes", "pool": "token"}, tmp_path / "run", resume=False)
