"""Every head's output taken from another image: what it does to the difference of two logits."""

from prisma_patch import activation_patch
from prisma_toy import sample_scene

import prisma_core as prisma

model = prisma.load("toy:scenes-3l")
image, other = (model.preprocess(sample_scene(seed).image) for seed in (0, 3))
pair = tuple(model(image)[0].topk(2).indices.tolist())
figure = activation_patch(model, image, other, pair, at="z", over="layer head").sel(batch=0).plot()
