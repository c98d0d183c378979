"""Interventions: patching, circuits, ablation, steering, knock-out, as plain functions over a hooked model.

```python
activation_patch(model, image, other, ("cat", "dog"), at="z", over="layer head")   # Result [layer head batch]
with ablate(model, ("z", 1), heads=1, method="mean", reference=images): model(image)
with knock_out(model, queries="cls", keys="patches", layers=5): model(image)
```
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from prisma_core import hookimpl

if TYPE_CHECKING:
    import typer
    from prisma_lens.metrics import Metric, as_metric, logit, logit_difference

    from prisma_patch.circuits import circuit_faithfulness, edge_effects, edge_scores, find_circuit, run_circuit
    from prisma_patch.dynamics import change_points, over_checkpoints
    from prisma_patch.factors import factors_by_place
    from prisma_patch.graph import Circuit
    from prisma_patch.interventions import ablate, freeze, steer, together
    from prisma_patch.inversion import learn_word, read_word, use_word
    from prisma_patch.linear import attribution_patch
    from prisma_patch.masks import causal, knock_out, local
    from prisma_patch.passes import Variant
    from prisma_patch.patching import activation_patch, patch_heads
    from prisma_patch.paths import path_patch
    from prisma_patch.sweeps import sweep
    from prisma_patch.switches import Switch, switch

__all__ = [
    "activation_patch",
    "patch_heads",
    "attribution_patch",
    "path_patch",
    "switch",
    "Switch",
    "edge_scores",
    "find_circuit",
    "Circuit",
    "run_circuit",
    "circuit_faithfulness",
    "edge_effects",
    "over_checkpoints",
    "change_points",
    "factors_by_place",
    "learn_word",
    "use_word",
    "read_word",
    "ablate",
    "knock_out",
    "causal",
    "local",
    "steer",
    "freeze",
    "together",
    "logit",
    "logit_difference",
    "as_metric",
    "Metric",
    "sweep",
    "Variant",
    "prisma_commands",
]

_HOMES = {
    "prisma_lens.metrics": "Metric as_metric logit logit_difference",
    "prisma_patch.circuits": "circuit_faithfulness edge_effects edge_scores find_circuit run_circuit",
    "prisma_patch.dynamics": "change_points over_checkpoints",
    "prisma_patch.factors": "factors_by_place",
    "prisma_patch.graph": "Circuit",
    "prisma_patch.interventions": "ablate freeze steer together",
    "prisma_patch.inversion": "learn_word read_word use_word",
    "prisma_patch.linear": "attribution_patch",
    "prisma_patch.masks": "causal knock_out local",
    "prisma_patch.passes": "Variant",
    "prisma_patch.patching": "activation_patch patch_heads",
    "prisma_patch.paths": "path_patch",
    "prisma_patch.sweeps": "sweep",
    "prisma_patch.switches": "Switch switch",
}


def __getattr__(name: str) -> Any:
    """Import a technique when it is used: every ``prisma`` command and every load imports this package."""
    for module, names in _HOMES.items():
        if name in names.split():
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@hookimpl
def prisma_commands(app: typer.Typer) -> None:
    from prisma_patch.command import patch

    app.command(rich_help_panel="Commands")(patch)
