"""What heads of layer 0 do through the values that layer 1 reads."""

import torch
from prisma_patch import path_patch
from prisma_toy import sample_scene

import prisma_core as prisma

model = prisma.load("toy:scenes-3l")
image, other = (model.preprocess(sample_scene(seed).image) for seed in (0, 3))
pair = tuple(model(image)[0].topk(2).indices.tolist())
through = [
    path_patch(model, image, other, pair, sender=("z", 0), heads=head, receivers=("v_input", 1)).values.flatten()[0]
    for head in range(model.spec.n_heads)
]
heads = tuple(f"L0H{head}" for head in range(model.spec.n_heads))
figure = prisma.Result(torch.stack(through), ("head",), {"head": heads}, "path_patch", "change of the metric").plot()
