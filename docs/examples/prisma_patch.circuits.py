"""The strongest edges of the circuit that tells two classes apart."""

from prisma_patch import edge_scores
from prisma_toy import sample_scene

import prisma_core as prisma

model = prisma.load("toy:scenes-3l")
image, other = (model.preprocess(sample_scene(seed).image) for seed in (0, 3))
pair = tuple(model(image)[0].topk(2).indices.tolist())
_, circuit = edge_scores(model, image, other, pair, steps=3)
figure = circuit.top(16).plot()
