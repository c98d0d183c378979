"""How good a coder is on its model."""

import prisma_sae
from prisma_toy import sample_scene

import prisma_core as prisma

model = prisma.load("toy:scenes-3l")
coder = prisma_sae.load("scenes-3l")
image = model.preprocess(sample_scene(seed=0).image)
images = model.preprocess([sample_scene(seed).image for seed in range(8)])
measures = prisma_sae.evaluate(model, coder, images)
figure = measures.sel(measure=["explained_variance", "cosine", "dead", "dense"]).plot()
