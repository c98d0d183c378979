"""How far a lens is from the last layer's answer, plain and tuned."""

from prisma_lens import fit_tuned_lens, lens_kl
from prisma_toy import draw_scenes, normalise

import prisma_core as prisma

model = prisma.load("toy:scenes-3l")
batches = normalise(draw_scenes(24, seed=1).image).split(4)
tuned = fit_tuned_lens(model, batches[:4], epochs=3, lr=3e-3)
figure = lens_kl(model, batches[4:], tuned).plot(kind="curves")
