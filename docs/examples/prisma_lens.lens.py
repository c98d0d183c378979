"""The lens of one class, over the image, after each layer."""

from prisma_lens import logit_lens
from prisma_toy import sample_scene

import prisma_core as prisma

model = prisma.load("toy:scenes-3l")
image = model.preprocess(sample_scene(seed=0).image)
best = int(model(image).argmax())
figure = logit_lens(model, image).sel(**{"class": best}).plot(image=image)
