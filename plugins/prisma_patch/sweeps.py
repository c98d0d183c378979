"""The engine of sweeps: many runs of a model that differ in one replaced activation each.

Variants that can share a pass are run together, each with its own copy of the batch; ``passes`` says from where, and
which tokens are computed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, TypeVar

import torch
from prisma_lens.inputs import as_inputs
from prisma_lens.metrics import Metric, MetricLike, as_metric
from pydantic import Field
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from prisma_core import HookedModel, InputError, LoadError
from prisma_core.plugin import Count, checked, read_checkpoint, replacing
from prisma_patch.passes import Inputs, Passes, Variant, passes_of

Item = TypeVar("Item")


@checked
def sweep(
    model: HookedModel,
    inputs: Tensor | Inputs,
    variants: Annotated[Sequence[Variant], Field(min_length=1)],
    metric: MetricLike,
    *,
    batch_size: Count = 64,
    progress: bool | None = None,
    resume: str | Path | None = None,
) -> Tensor:
    """Return the metric under each variant: ``[variant batch ...]``.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> clean, other = torch.rand(2, 1, 3, 96, 96)
    >>> z = model.run_with_cache(other)[1]["z", 0]
    >>> heads = [Variant("blocks.0.attn.hook_z", (slice(None), slice(None), head), z) for head in range(4)]
    >>> sweep(model, clean, heads, "ladybird").shape
    torch.Size([4, 1])

    Args:
        model: the model to run.
        inputs: the clean inputs.
        variants: the replacements, in any order.
        metric: a function of the output, a class, or two (see ``as_metric``).
        batch_size: how many images to run at once.
        progress: show a bar; None shows one on a terminal.
        resume: a ``.safetensors`` file that keeps the effects so far; a sweep that was stopped goes on from it.

    Raises:
        InputError: the two runs do not fit together, or an activation has no such part.
        LoadError: the file to resume from is of another sweep.
    """
    with torch.no_grad():
        passes = passes_of(model, as_inputs(model, inputs))
    return run(passes, variants, as_metric(model, metric), batch_size=batch_size, progress=progress, resume=resume)


def run(
    passes: Passes,
    variants: Sequence[Variant],
    metric: Metric,
    *,
    batch_size: Count = 64,
    progress: bool | None = None,
    resume: str | Path | None = None,
) -> Tensor:
    """Return the metric under each variant (see ``sweep``), with passes that stand already."""
    groups = [passes.group(variant.name) for variant in variants]
    effects: dict[int, Tensor] = {}
    store = None
    with torch.no_grad():
        if resume is not None:
            store = _Kept(Path(resume), variants, passes.inputs, passes.clean(), metric)
            effects = store.read()
        order = sorted((at for at in range(len(variants)) if at not in effects), key=lambda at: (groups[at], at))
        batches = list(_batches(order, groups, max(1, batch_size // passes.inputs[0].shape[0])))
        shown = sys.stderr.isatty() and len(batches) > 20 if progress is None else progress
        for members in bar(batches, "Sweeping", shown):
            outputs = passes.outputs([variants[at] for at in members])
            effects |= dict(zip(members, map(metric, outputs), strict=True))
            if store is not None:
                store.write(effects)
    return torch.stack([effects[at] for at in range(len(variants))])


def bar(items: Sequence[Item], what: str, shown: bool) -> Iterable[Item]:
    """Return items with a progress bar on stderr, if it is to be shown."""
    return track(items, description=what, transient=True, console=Console(stderr=True), disable=not shown)


def _batches(order: Sequence[int], groups: Sequence[int], step: int) -> Iterator[list[int]]:
    for _, group in groupby(order, key=lambda at: groups[at]):
        members = list(group)
        yield from (members[start : start + step] for start in range(0, len(members), step))


class _Kept:
    """The effects of a sweep so far, in a file that belongs to this sweep alone.

    Its mark depends on the places, the inputs, what is put in, the output of the clean run, which another model would
    change, and the metric of it and of noise, which another metric would change.
    """

    def __init__(self, path: Path, variants: Sequence[Variant], inputs: Inputs, clean: Tensor, metric: Metric):
        if path.suffix != ".safetensors":
            raise InputError(f"Expected a path that ends in .safetensors to resume from, got {path}.")
        text = json.dumps([[variant.name, repr(variant.part)] for variant in variants])
        digest = hashlib.sha256(text.encode())
        sources = {variant.name: variant.source for variant in variants if variant.source is not None}
        generator = torch.Generator().manual_seed(0)
        noise = [torch.randn(clean.shape, generator=generator).to(clean) for _ in range(8)]  # a distance is 0 at clean
        for each in (*inputs, clean, *map(metric, (clean, *noise)), *sources.values()):
            digest.update(each.detach().cpu().double().contiguous().numpy().tobytes())
        self.path, self.mark = path, digest.hexdigest()[:16]

    def read(self) -> dict[int, Tensor]:
        if not self.path.is_file():
            return {}
        tensors = read_checkpoint(self.path)
        if any(not name.startswith(f"{self.mark}.") for name in tensors):
            raise LoadError(f"{self.path} holds the effects of another sweep: choose another file, or remove it.")
        return {int(name.rpartition(".")[2]): tensor for name, tensor in tensors.items()}

    def write(self, effects: dict[int, Tensor]) -> None:
        with replacing(self.path) as fresh:
            save_file({f"{self.mark}.{at}": effect.contiguous().clone() for at, effect in effects.items()}, fresh)
