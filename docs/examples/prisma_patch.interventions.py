"""The class's logit without each head."""

import torch
from prisma_patch import ablate
from prisma_toy import sample_scene

import prisma_core as prisma

model = prisma.load("toy:scenes-3l")
image, other = (model.preprocess(sample_scene(seed).image) for seed in (0, 3))
pair = tuple(model(image)[0].topk(2).indices.tolist())
rows = []
with torch.no_grad():
    for layer in range(model.spec.n_layers):
        for head in range(model.spec.n_heads):
            with ablate(model, ("z", layer), heads=head):
                rows.append(model(image)[0, pair[0]] - model(image)[0, pair[1]])
values = torch.stack(rows).unflatten(0, (model.spec.n_layers, model.spec.n_heads))
figure = prisma.Result(values, ("layer", "head"), technique="ablate", unit="difference of logits").plot()
