"""A vision transformer whose circuit is known, since its weights are written by hand.

Images of 3 x 3 patches, three classes. The head reads the class token alone. Layer 0, head 1 copies the *mark* of the
first patch (row 0, column 0) to the patch in the middle; layer 1, head 2 copies it from there to the class token, where
the head reads it: class 1 if the mark is bright, class 2 if it is dark. Every other head and every MLP writes small
random numbers, so nothing is exactly zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prisma_core import HookedViT, ModelSpec

HEADS, D_HEAD, WIDTH, LAYERS = 3, 8, 24, 2
MARK, COPY, ANSWER, CLS, FIRST, MIDDLE = range(6)  # directions of the stream
SOURCE, RELAY = 1, 5  # tokens: the first patch, the patch in the middle
COPIES, READS = (0, 1), (1, 2)  # (layer, head)


def planted(noise: float = 0.01, seed: int = 0) -> HookedViT:
    """Return the model, in float64."""
    facts = {"scale": 1.0, "d_mlp": 5, "n_classes": 3}
    spec = ModelSpec.plain(d_model=WIDTH, layers=LAYERS, heads=HEADS, patch=2, image=6, norm=None, **facts)
    model = HookedViT(spec).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(noise * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        model.embed.proj.weight[MARK] += 1 / 12  # the mean of the patch's pixels
        pos = model.embed.pos_embed
        pos[0, CLS], pos[SOURCE, FIRST], pos[RELAY, MIDDLE] = (pos.new_tensor(10.0) for _ in range(3))
        for (layer, head), reader, source, read, write in (
            (COPIES, MIDDLE, FIRST, MARK, COPY),
            (READS, CLS, MIDDLE, COPY, ANSWER),
        ):
            block_attn = model.blocks[layer].attn
            block_attn.W_Q[head, reader, 0] += 1.0
            block_attn.W_K[head, source, 0] += 1.0
            block_attn.W_V[head, read, 1] += 1.0
            block_attn.W_O[head, 1, write] += 4.0
        model.head.weight[1, ANSWER] += 3.0
        model.head.weight[2, ANSWER] -= 3.0
    model.labels = ("nothing", "a bright mark", "a dark mark")
    return model


def marked(brightness: float, seed: int = 0, batch: int = 1) -> Tensor:
    """Return images ``[batch 3 6 6]`` of noise with a mark of this brightness in the first patch."""
    image = 0.1 * torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    image[:, :, :2, :2] += brightness
    return image
