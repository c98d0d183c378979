"""Accuracy of a probe at each layer, and of its control."""

from prisma_lens import probe
from prisma_toy import draw_scenes, normalise

import prisma_core as prisma

model = prisma.load("toy:scenes-3l")
scenes = draw_scenes(96, seed=1)
accuracy = probe(model, [(normalise(scenes.image), scenes.classes[:, 0])], names="resid_post", tokens="mean")
figure = accuracy.plot(kind="curves")
