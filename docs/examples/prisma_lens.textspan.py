"""How much of a head's variance the three best texts of a pool explain."""

from prisma_lens import name_heads
from prisma_toy import draw_captions, normalise

import prisma_core as prisma

clip = prisma.load("toy:clip-scenes")
scenes = draw_captions(96, seed=5)
images = normalise(scenes.image)
pool = ["red", "green", "blue", "yellow", "a circle", "a square", "a star", "a heart", "left of", "above"]
figure = name_heads(clip, images, pool, k=3).plot()
