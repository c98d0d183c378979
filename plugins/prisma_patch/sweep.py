"""The engine of sweeps: many runs of a model that differ in one replaced activation each.

Variants of one layer are run together, several to a pass, each with its own copy of the batch, and start at the last
clean residual stream before that layer where the model can start there.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from prisma_lens.metrics import Metric
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from prisma_core import HookContext, HookedModel, HookedViT, InputError, LoadError
from prisma_core.plugin import layer_of, read_checkpoint

Inputs = tuple[Tensor, ...]
Part = tuple[Any, ...]


@dataclass(frozen=True)
class Variant:
    """One replacement: at a hook point, a part of the activation by the same part of another.

    Attributes:
        name: the hook point's full name.
        part: an index for each axis.
        source: the activation to take the part from, ``[batch ...]`` or ``[1 ...]``; None puts in zeros.
    """

    name: str
    part: Part
    source: Tensor | None

    def apply(self, rows: Tensor) -> None:
        """Edit one copy of the batch in place.

        Raises:
            InputError: the activation has no such part, or the other one has another shape.
        """
        try:
            rows[self.part]
        except (IndexError, TypeError) as error:  # torch's ways to say it
            raise InputError(
                f"{self.name} is {list(rows.shape)} and has no such places ({error}): pos is a position, several, a "
                "slice or a subset of the layout such as 'cls'."
            ) from error
        if self.source is None:
            rows[self.part] = 0
            return
        if self.source.shape[1:] != rows.shape[1:] or self.source.shape[0] not in (1, rows.shape[0]):
            raise InputError(
                f"{self.name} is {list(rows.shape)} in the clean run and {list(self.source.shape)} in the other: "
                "give images of the same size, and as many of them or one."
            )
        rows[self.part] = self.source.to(rows).expand_as(rows)[self.part]


def sweep(
    model: HookedModel,
    inputs: Inputs,
    variants: Sequence[Variant],
    metric: Metric,
    *,
    batch_size: int = 64,
    progress: bool | None = None,
    resume: str | Path | None = None,
) -> Tensor:
    """Return the metric under each variant: ``[variant batch ...]``.

    Args:
        model: the model to run.
        inputs: the clean inputs.
        variants: the replacements, in any order.
        metric: of the output, ``[batch]`` or ``[batch ...]``.
        batch_size: how many images to run at once.
        progress: show a bar; None shows one on a terminal.
        resume: a ``.safetensors`` file that keeps the effects so far; a sweep that was stopped goes on from it.

    Raises:
        InputError: the two runs do not fit together, or an activation has no such part.
        LoadError: the file to resume from is of another sweep.
    """
    n = inputs[0].shape[0]
    step = max(1, batch_size // n)
    order = sorted(range(len(variants)), key=lambda at: (_layer(variants[at].name), at))
    streams = _streams(model, inputs)
    effects: dict[int, Tensor] = {}
    kept = None
    if resume is not None:
        with torch.no_grad():
            kept = _Kept(Path(resume), variants, inputs, metric(model(*inputs)))
        effects = kept.read()
    batches = list(_batches([at for at in order if at not in effects], variants, step, by_layer=bool(streams)))
    shown = sys.stderr.isatty() and len(batches) > 20 if progress is None else progress
    with torch.no_grad():
        for members in track(batches, description="Sweeping", transient=True, disable=not shown):
            part = [variants[at] for at in members]
            layer = _layer(part[0].name) if streams else -1
            start: Inputs = (streams[layer],) if layer in streams else inputs
            how: dict[str, Any] = {"start_at_layer": layer} if layer in streams else {}
            hooks = {name: _editor(part, name, n) for name in {variant.name for variant in part}}
            repeated = [each.repeat(len(part), *[1] * (each.ndim - 1)) for each in start]
            output = model.run_with_hooks(*repeated, hooks=hooks, **how)
            effects |= dict(zip(members, (metric(rows) for rows in output.split(n)), strict=True))
            if kept is not None:
                kept.write(effects)
    return torch.stack([effects[at] for at in range(len(variants))])


def _layer(name: str) -> int:
    layer = layer_of(name)
    return -1 if layer is None else layer


def _batches(order: Sequence[int], variants: Sequence[Variant], step: int, *, by_layer: bool) -> Iterator[list[int]]:
    for _, group in groupby(order, key=lambda at: _layer(variants[at].name) if by_layer else 0):
        members = list(group)
        yield from (members[start : start + step] for start in range(0, len(members), step))


def _streams(model: HookedModel, inputs: Inputs) -> dict[int, Tensor]:
    """Return the clean stream before each block, or none where a pass cannot start there.

    A pass that starts inside does not know the size of the image, which rotary positions depend on.
    """
    if not isinstance(model, HookedViT):
        return {}
    if model.spec.rope is not None and tuple(inputs[0].shape[-2:]) != tuple(model.spec.image_size):
        return {}
    with torch.no_grad():
        _, cache = model.run_with_cache(*inputs, names="*.hook_resid_pre", output=False)
    return {layer: cache["resid_pre", layer] for layer in range(model.spec.n_layers)}


def _editor(variants: Sequence[Variant], name: str, n: int) -> Callable[[Tensor, HookContext], None]:
    mine = [(index, variant) for index, variant in enumerate(variants) if variant.name == name]

    def edit(x: Tensor, at: HookContext) -> None:
        for index, variant in mine:
            variant.apply(x[index * n : (index + 1) * n])

    return edit


class _Kept:
    """The effects of a sweep so far, in a file that belongs to this sweep alone.

    Its mark depends on the places, the inputs, what is put in, and the metric of the clean run, which another model or
    another metric would change.
    """

    def __init__(self, path: Path, variants: Sequence[Variant], inputs: Inputs, clean: Tensor):
        if path.suffix != ".safetensors":
            raise InputError(f"Expected a path that ends in .safetensors to resume from, got {path}.")
        text = json.dumps([[variant.name, repr(variant.part)] for variant in variants])
        digest = hashlib.sha256(text.encode())
        sources = {variant.name: variant.source for variant in variants if variant.source is not None}
        for each in (*inputs, clean, *sources.values()):
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
        fresh = self.path.with_name(f".{self.path.name}.new")
        fresh.parent.mkdir(parents=True, exist_ok=True)
        save_file({f"{self.mark}.{at}": effect.contiguous().clone() for at, effect in effects.items()}, fresh)
        fresh.replace(self.path)
