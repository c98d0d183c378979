"""Which factor of a sprite lives in which head: what moves when the head is swapped."""

from prisma_patch import factors_by_place
from prisma_toy import draw_sprites, normalise

import prisma_core as prisma

model = prisma.load("toy:dsprites-attn-2l")
sprites = draw_sprites(200, seed=0)
factors = {name: sprites.factors[:, at].float() for name, at in {"scale": 1, "x": 3, "y": 4}.items()}
found = factors_by_place(model, normalise(sprites.image), factors)
figure = found.sel(measure="intervention").plot(kind="heat")
