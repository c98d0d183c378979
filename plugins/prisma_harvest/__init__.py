"""Activations at scale: harvests to disk, back from it, and top examples.

```python
acts = harvest(model, "photos", ("resid_post", 5), pos="patches", out="harvests")   # resumable, one pass
acts = open_harvest("harvests")
for rows in acts.rows(("resid_post", 5), 4096, shuffle=True): ...                   # [4096 d]
acts.example(3, ("resid_post", 5)), acts.tokens_of(("resid_post", 5)), list(acts.examples())
top_examples(acts, ("resid_post", 5), k=9, directions=probe)                        # [direction rank]
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prisma_core import hookimpl
from prisma_harvest.checking import verify
from prisma_harvest.manifest import Manifest, weights_hash
from prisma_harvest.opening import cat, open_harvest
from prisma_harvest.passes import Pass
from prisma_harvest.reading import Harvest
from prisma_harvest.sources import open_data
from prisma_harvest.top import top_examples
from prisma_harvest.writing import harvest

if TYPE_CHECKING:
    from typer import Typer


@hookimpl
def prisma_commands(app: Typer) -> None:
    from prisma_harvest.command import harvest_app

    app.add_typer(harvest_app, name="harvest")


__all__ = [
    "harvest",
    "open_harvest",
    "Harvest",
    "cat",
    "verify",
    "top_examples",
    "Pass",
    "open_data",
    "Manifest",
    "weights_hash",
]
