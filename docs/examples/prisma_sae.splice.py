"""Where the strongest feature that is not the ground fires."""

import prisma_sae
import prisma_view
from prisma_toy import sample_scene

import prisma_core as prisma

model = prisma.load("toy:scenes-3l")
coder = prisma_sae.load("scenes-3l")
image = model.preprocess(sample_scene(seed=0).image)
with prisma_sae.splice(model, coder):
    _, cache = model.run_with_cache(image, names="sae.features")
features = cache["blocks.1.hook_resid_post.sae.hook_features"][0].detach()  # [patch feature]
named = [feature for feature, name in coder.facts.labels.items() if "empty" not in name]
strongest = max(named, key=lambda feature: float(features[:, feature].sum()))
figure = prisma_view.patches(features[:, strongest], model.layout, image, title=coder.facts.labels[strongest])
