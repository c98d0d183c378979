"""What features of layer 1 do to one number of the stream of layer 2, to first order."""

import torch
from prisma_sae import CoderFacts, SparseCoder, feature_attribution, load
from prisma_toy import sample_scene

import prisma_core as prisma

model = prisma.load("toy:scenes-3l")
image = model.preprocess(sample_scene(seed=0).image)
d = model.spec.d_model
facts = CoderFacts(kind="standard", d_in=d, d_sae=d, d_out=d, hook="blocks.2.hook_resid_post")
stream = SparseCoder(facts, {"W_enc": torch.eye(d), "b_enc": torch.zeros(d), "W_dec": torch.eye(d)})
effects = feature_attribution(model, image, [load("scenes-3l"), stream], targets=[3])  # [target source batch]
largest = effects.values[0, :, 0].abs().topk(12).indices.tolist()
figure = effects.sel(target=0, source=largest, batch=0).plot(kind="bars")
