"""All tokens of all layers at once, to first order."""

from prisma_patch import attribution_patch
from prisma_toy import sample_scene

import prisma_core as prisma

model = prisma.load("toy:scenes-3l")
image, other = (model.preprocess(sample_scene(seed).image) for seed in (0, 3))
pair = tuple(model(image)[0].topk(2).indices.tolist())
effect = attribution_patch(model, image, other, pair, at="resid_pre", over="layer pos").sel(batch=0)
figure = effect.plot(kind="patches", image=image)
