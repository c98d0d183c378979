"""Where a text is in the image: what heads bring from each patch."""

from prisma_lens import segment
from prisma_toy import draw_captions, normalise

import prisma_core as prisma

clip = prisma.load("toy:clip-scenes")
scenes = draw_captions(8, seed=5)
images = normalise(scenes.image)
thing = scenes.captions[0]
figure = segment(clip, images[:1], thing, against="a photo").sel(batch=0).plot(image=images[:1])
