"""How much attention can flow from each token to the class token."""

from prisma_lens import attention_flow
from prisma_toy import draw_sprites, normalise

import prisma_core as prisma

model = prisma.load("toy:dsprites-attn-2l")
image = normalise(draw_sprites(1, seed=0).image)
figure = attention_flow(model, image, pos=0).plot(image=image)
