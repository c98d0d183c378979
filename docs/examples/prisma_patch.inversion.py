"""What a word that was learned for hearts is like, layer by layer."""

from prisma_patch import learn_word, read_word
from prisma_toy import draw_captions, normalise
from prisma_toy.captions import THINGS

import prisma_core as prisma

clip = prisma.load("toy:clip-scenes")
scenes = draw_captions(400, seed=3)
lone = [at for at, (first, second) in enumerate(scenes.things.tolist()) if second < 0 and "heart" in THINGS[first]][:8]
texts = ["a " + THINGS[scenes.things[at, 0]].replace("heart", "{}") for at in lone]
learned = learn_word(clip, normalise(scenes.image[lone]), "wug", texts, against=["circle", "star"], steps=30)
words = ["circle", "square", "triangle", "star", "heart", "cross"]
found = read_word(clip, learned, words, template="a red {}")  # [layer word pos]
figure = found.sel(pos=found.facts["at"]).plot()
