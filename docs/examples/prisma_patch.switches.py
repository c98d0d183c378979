"""Heads by how far each alone moves the prediction to the other class; the switch is the smallest set."""

from prisma_patch import switch
from prisma_toy import sample_scene

import prisma_core as prisma

model = prisma.load("toy:scenes-3l")
image, other = (model.preprocess(sample_scene(seed).image) for seed in (0, 3))
pair = tuple(model(image)[0].topk(2).indices.tolist())
found = switch(model, image, other, pair[0], int(model(other).argmax()))
figure = found.effects.sel(batch=0).plot()
