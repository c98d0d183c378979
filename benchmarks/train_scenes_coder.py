"""Train the sparse coder of ``toy:scenes-3l`` that comes with ``prisma_sae``, and name its features.

python benchmarks/train_scenes_coder.py OUT     # about four minutes on one core
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from prisma_sae import TrainConfig, evaluate, name_features, save, train
from prisma_sae.binding import model_digest
from prisma_toy.tasks import task
from torch import Tensor

import prisma_core as prisma

REFERENCE, HOOK, SHUFFLED, STEPS = "toy:scenes-3l", "blocks.1.hook_resid_post", 64, 3000
CONFIG = TrainConfig(kind="topk", d_sae=256, k=8, lr=2e-3)


@torch.no_grad()
def patches(model: prisma.HookedViT, split: str, step: int) -> tuple[Tensor, Tensor]:
    """Return the stream at patches of scenes, and the class that each shows most of: ``[patch d]``, ``[patch]``."""
    drawn = task("scenes").batch(SHUFFLED, split, 0, step)
    assert drawn.patches is not None
    mean, std = (torch.tensor(each)[:, None, None] for each in (model.preprocess.mean, model.preprocess.std))
    _, cache = model.run_with_cache((drawn.image - mean) / std, names=HOOK, pos="patches", output=False)
    return cache[HOOK].flatten(0, 1), drawn.patches.flatten(0, 1).argmax(-1)


def rows(model: prisma.HookedViT) -> Iterator[Tensor]:
    """Yield shuffled rows, each batch of scenes cut into nine."""
    for step in range(STEPS // 9 + 1):
        x, _ = patches(model, "train", step)
        yield from x[torch.randperm(len(x), generator=torch.Generator().manual_seed(step))].chunk(9)


def main(out: str) -> None:
    """Train, name, measure, save."""
    model = prisma.load(REFERENCE)
    about = {"model": REFERENCE, "weights": model_digest(model), "hook": HOOK, "tokens": "patches"}
    coder = train(rows(model), CONFIG, steps=STEPS, about=about)
    x, shown = (torch.cat(each) for each in zip(*(patches(model, "train", 10**6 + i) for i in range(16)), strict=True))
    names = task("scenes").labels
    one_hot = torch.nn.functional.one_hot(shown, len(names))
    labels = name_features(coder.encode(x), one_hot, names, threshold=0.6, least=100)
    held_out = [task("scenes").batch(SHUFFLED, "held-out", 0, step) for step in range(16)]
    mean, std = (torch.tensor(each)[:, None, None] for each in (model.preprocess.mean, model.preprocess.std))
    batches = [((each.image - mean) / std, each.target.argmax(1)) for each in held_out]
    result = evaluate(model, coder, batches)
    figures = dict(zip(result.names("measure"), (round(float(v), 4) for v in result.values), strict=True))
    save(coder.with_facts(labels=labels, figures=figures), out)
    sys.stdout.write(f"{len(labels)} of {coder.facts.d_sae} features have names\n{result}\n")


if __name__ == "__main__":
    main(sys.argv[1])
