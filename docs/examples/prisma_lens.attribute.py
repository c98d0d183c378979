"""What each head says for the class, against the second best."""

from prisma_lens import attribute
from prisma_toy import sample_scene

import prisma_core as prisma

model = prisma.load("toy:scenes-3l")
image = model.preprocess(sample_scene(seed=0).image)
best, second = model(image)[0].topk(2).indices.tolist()
figure = attribute(model, image, best, against=second, by="head").plot()
