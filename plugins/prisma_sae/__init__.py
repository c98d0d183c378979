"""Sparse coders: read what is published, splice them into models, measure, train, attribute.

```python
coder = load("scenes-3l")                                 # of the catalogue; read(path) takes any known format
with splice(model, coder):                                # features are hook points of the model
    logits, cache = model.run_with_cache(image, names="sae.features")
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prisma_core import hookimpl
from prisma_sae.attribution import feature_attribution
from prisma_sae.coder import CoderFacts, SparseCoder
from prisma_sae.evaluate import evaluate, monosemanticity
from prisma_sae.formats import FORMATS, read
from prisma_sae.formats.sae_lens import save
from prisma_sae.naming import name_features
from prisma_sae.published import catalogue, load, open_coder
from prisma_sae.rows import activation_rows
from prisma_sae.splice import splice
from prisma_sae.training import TrainConfig, train

if TYPE_CHECKING:
    from typer import Typer


@hookimpl
def prisma_commands(app: Typer) -> None:
    from prisma_sae.command import sae

    app.add_typer(sae, name="sae")


__all__ = [
    "load",
    "open_coder",
    "catalogue",
    "read",
    "save",
    "FORMATS",
    "splice",
    "evaluate",
    "monosemanticity",
    "feature_attribution",
    "name_features",
    "train",
    "activation_rows",
    "TrainConfig",
    "SparseCoder",
    "CoderFacts",
]
