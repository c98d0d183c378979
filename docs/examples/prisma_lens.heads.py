"""Which heads attend to neighbours, edges, the class token."""

from prisma_lens import head_scores
from prisma_toy import sample_scene

import prisma_core as prisma

model = prisma.load("toy:scenes-3l")
image = model.preprocess(sample_scene(seed=0).image)
figure = head_scores(model, image).plot()
