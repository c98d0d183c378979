"""Which tokens the class token's answer depends on."""

from prisma_lens import relevance
from prisma_toy import sample_scene

import prisma_core as prisma

model = prisma.load("toy:scenes-cls")
image = model.preprocess(sample_scene(seed=0).image)
found = relevance(model, image, int(model(image).argmax()))  # [batch pos source]
figure = found.sel(batch=0, pos="cls").plot(image=image)
