"""The largest scores of eight neurons over 32 images."""

from prisma_harvest import Pass, top_examples
from prisma_toy import sample_scene

import prisma_core as prisma

model = prisma.load("toy:scenes-3l")
images = [sample_scene(seed).image for seed in range(32)]
best = top_examples(Pass(model, images, ("mlp.hook_post", 2)), ("mlp.hook_post", 2), k=6)  # [feature rank]
figure = best.sel(feature=range(8)).plot()
