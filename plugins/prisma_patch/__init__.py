"""Interventions: patching, ablation, steering, knock-out, as plain functions over a hooked model.

activation_patch(model, image, other, ("cat", "dog"), at="z", over="layer head")   # Result [layer head batch]
with ablate(model, ("z", 3), heads=1, method="mean", reference=images): model(image)
with knock_out(model, queries="cls", keys="patches", layers=5): model(image)
"""

from prisma_lens.metrics import Metric, as_metric, logit, logit_difference

from prisma_patch.circuits import circuit_faithfulness, edge_effects, edge_scores, find_circuit, run_circuit
from prisma_patch.dynamics import change_points, over_checkpoints
from prisma_patch.graph import Circuit
from prisma_patch.interventions import ablate, freeze, steer, together
from prisma_patch.linear import attribution_patch
from prisma_patch.masks import causal, knock_out, local
from prisma_patch.patching import activation_patch, patch_heads
from prisma_patch.paths import path_patch
from prisma_patch.sweep import Variant, sweep
from prisma_patch.switch import Switch, switch

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
]
