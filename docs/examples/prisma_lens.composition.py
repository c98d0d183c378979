"""What heads of layer 0 write that heads of layer 1 read as keys."""

from prisma_lens import composition

import prisma_core as prisma

model = prisma.rewrite(prisma.load("toy:scenes-cls"), prisma.fold_layer_norm)
figure = composition(model, "K").sel(layer="L0", later_layer="L1").plot()
