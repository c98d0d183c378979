"""Which heads look from a patch to its copy, more than without the copy."""

from prisma_lens import induction
from prisma_toy import sample_scene

import prisma_core as prisma

model = prisma.load("toy:scenes-3l")
image = model.preprocess(sample_scene(seed=0).image)
figure = induction(model, image, pairs=8).sel(kind="copy").plot()
