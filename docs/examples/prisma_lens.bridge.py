"""captum's InputXGradient at the residual stream before layer 1, by patch."""

import prisma_view
from captum.attr import InputXGradient
from prisma_lens import captum_inputs
from prisma_toy import sample_scene

import prisma_core as prisma

model = prisma.load("toy:scenes-3l")
image = model.preprocess(sample_scene(seed=0).image)
forward, activation = captum_inputs(model, image, int(model(image).argmax()), ("resid_pre", 1))
values = InputXGradient(forward).attribute(activation).detach().sum(-1)[0]  # [pos]
figure = prisma_view.patches(values, model.layout, image, unit="logits", title="input x gradient, by captum")
