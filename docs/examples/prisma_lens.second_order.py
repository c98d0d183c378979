"""What neurons of layer 0 add to a text through the attention of later layers."""

from prisma_lens import second_order
from prisma_toy import draw_captions, normalise

import prisma_core as prisma

clip = prisma.load("toy:clip-scenes")
scenes = draw_captions(2, seed=5)
images = normalise(scenes.image)
effects = second_order(clip, images[:1], scenes.captions[0])  # [layer neuron batch class]
figure = effects.sel(layer="L0", neuron=range(24), batch=0).plot(kind="bars")
