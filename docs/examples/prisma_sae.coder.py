"""What a coder misses at each patch, as a share of the activation."""

import prisma_sae
import prisma_view
from prisma_toy import sample_scene

import prisma_core as prisma

model = prisma.load("toy:scenes-3l")
coder = prisma_sae.load("scenes-3l")
image = model.preprocess(sample_scene(seed=0).image)
_, cache = model.run_with_cache(image, names=coder.facts.hook, pos="patches")
x = cache[coder.facts.hook][0].detach()  # [patch d]
missed = (coder.decode(coder.encode(x)) - x).norm(dim=-1) / x.norm(dim=-1)
figure = prisma_view.patches(missed, model.layout, image, unit="share that is missed", title="error of the coder")
