"""The lens of one class with attention that sees only what came before."""

from prisma_lens import logit_lens
from prisma_patch import causal
from prisma_toy import sample_scene

import prisma_core as prisma

model = prisma.load("toy:scenes-3l")
image = model.preprocess(sample_scene(seed=0).image)
best = int(model(image).argmax())
with causal(model):
    figure = logit_lens(model, image).sel(**{"class": best}).plot(image=image)
