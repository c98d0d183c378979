"""Grad-CAM over the image."""

from prisma_lens import grad_cam
from prisma_toy import sample_scene

import prisma_core as prisma

model = prisma.load("toy:scenes-3l")
image = model.preprocess(sample_scene(seed=0).image)
figure = grad_cam(model, image, int(model(image).argmax())).sel(batch=0).plot(image=image)
