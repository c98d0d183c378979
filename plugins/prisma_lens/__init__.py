"""Reading: lenses and direct attribution, as plain functions over a model and its cache.

logits, cache = model.run_with_cache(image)
logit_lens(model, cache).logits                              # [stage batch pos class]
logit_attribution(model, cache, classes=[3]).values          # [component batch class]
similarity_attribution(clip, cache, "text", by="head").values  # [component image text]
"""

from prisma_lens.attribution import (
    Attribution,
    attribution_names,
    by_head,
    head_attribution,
    logit_attribution,
    similarity_attribution,
    similarity_directions,
    source_attribution,
)
from prisma_lens.lens import LENS_NAMES, Lens, logit_lens, token_logits

__all__ = [
    "logit_lens",
    "token_logits",
    "Lens",
    "LENS_NAMES",
    "logit_attribution",
    "head_attribution",
    "source_attribution",
    "similarity_attribution",
    "similarity_directions",
    "by_head",
    "attribution_names",
    "Attribution",
]
