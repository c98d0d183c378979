"""The logit lens: what the head, a list of words, a probe or a tuned lens reads of every token after every layer.

Equation:
    lens[l, p] = readout(head(norm(pool({x_l[p]})))), x_l the residual stream before block l, each token taken alone, as
    if it were all that the head reads. With a tuned lens x_l + A_l x_l + b_l stands for x_l. A readout takes the output
    along directions: classes, texts (of unit length, times the temperature), or vectors. A probe reads x_l itself.
Cost:
    One pass; a product with the head for every token and layer, ``chunk`` tokens at a time. Memory of the values
    ``[layer batch pos class]``, or with ``topk`` of ``[layer batch pos k]``.
Misleads:
    Early layers do not write in the head's basis: what the lens reads there may be noise (a tuned lens helps). A token
    alone under the final norm is not what the head reads of a model that pools the mean.
Source:
    nostalgebraist 2020 (logit lens); Belrose et al. 2023 (tuned lens); Joseph 2024 (of patches).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prisma_core import ActivationCache, HookedModel, HookedText, HookedViT, InputError, NotApplicable, Result
from prisma_core.plugin import Count, checked
from prisma_lens.covectors import check_probe
from prisma_lens.readouts import (
    Target,
    TowerName,
    cache_of,
    readout,
    refuse_with_probe,
    token_labels,
    token_outputs,
    tower_of,
)
from prisma_lens.tuned import TunedLens

LENS_NAMES = ("*.hook_resid_pre", "*.hook_resid_post")
"""The hook points that a cache must hold for ``logit_lens``."""


class Lens(Result):
    """Readings of every token after every layer: ``[layer batch pos class]``."""

    @property
    def logits(self) -> Tensor:
        """The values."""
        return self.values

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the layers: ``0_pre``, ``1_pre``, ..., ``final_post``."""
        return self.names("layer")


@checked
@torch.no_grad()
def logit_lens(
    model: HookedModel,
    given: ActivationCache | Tensor | Any,
    target: Target | Result | None = None,
    *,
    against: Target | None = None,
    tuned: TunedLens | None = None,
    topk: Count | None = None,
    tower: TowerName = "vision",
    labels: Sequence[str] | None = None,
    chunk: Count = 4096,
) -> Lens:
    """Return what is read of every token, of an image or of a text, taken alone: ``[layer batch pos class]``.

    For a model that reads its class token, the class token's reading after the last block is the model's own output;
    for one that pools by the mean, the mean is of one token; for attention pooling, all attention goes to it.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> logit_lens(model, torch.zeros(1, 3, 96, 96), topk=2).shape
    {'layer': 4, 'batch': 1, 'pos': 145, 'rank': 2}

    Args:
        model: a classifier, a dual encoder, or a tower of one.
        given: images (texts, for a text tower), or a cache of them that holds ``LENS_NAMES`` for the tokens wanted.
        target: what is read (see ``readout``): classes, texts, directions in the output; the ``Result`` of ``probe``,
            whose layers are then its hook points; None for the whole output.
        against: what is subtracted, as in ``readout``.
        tuned: translators of this model's stream (see ``fit_tuned_lens``).
        topk: only the highest readings: ``[layer batch pos rank]``, and in ``tensors["classes"]`` which they are.
        tower: of a dual encoder, whose stream.
        labels: names of the directions.
        chunk: how many tokens are read at once.

    Raises:
        NotApplicable: the model has no head, one head for each of several tokens, or blocks that norm the stream.
        UnknownName: the cache lacks a stream, or there is no such class.
        InputError: the cache is another model's, or the target does not fit or is missing.
    """
    own = tower_of(model, tower)
    if target is None and (against is not None or labels is not None):
        raise InputError("Expected a target beside against= and labels=: what is subtracted from, what has the names.")
    if isinstance(target, Result):
        refuse_with_probe(against=against, labels=labels, tuned=tuned)
        cache, stages, read, names = _of_probe(model, given, target, tower)
    else:
        if target is None and model is not own:
            other = "texts" if tower == "vision" else "images"
            raise NotApplicable(f"A dual encoder has no classes to look for: give target=, {other} or directions.")
        if target is None and own.spec.n_classes is None:
            raise NotApplicable(
                "This model has no classification head, so there are no logits to look through: give target=, "
                f"directions in its output [class {own.spec.d_model}] or the Result of probe."
            )
        cache = cache_of(model, given, lambda each: each.resolve(LENS_NAMES), tower)
        reading = None if target is None else readout(model, target, against, tower=tower, labels=labels)
        names = (own.labels or ()) if reading is None else reading.labels
        if tuned is not None:
            tuned.check(own)
        stages = _stages(cache, tuned)

        def read(stream: Tensor, stage: str) -> Tensor:
            outputs = token_outputs(own, stream)
            return outputs if reading is None else reading(outputs)

    parts: dict[str, tuple[Tensor, Tensor | None]] = {}
    for stage, stream in stages:
        parts[stage] = _read(stream, lambda x, at=stage: read(x, at), topk, chunk)
    values = torch.stack([value for value, _ in parts.values()])
    ranked = [at for _, at in parts.values() if at is not None]
    axes = ("layer", "batch", "pos", "class") if topk is None else ("layer", "batch", "pos", "rank")
    if not cache.has_batch_dim:
        axes = ("layer", *axes[2:])
    about = {"layer": tuple(parts), **token_labels(cache, values.shape[-2])}
    if topk is None and names:
        about["class"] = tuple(names)
    return Lens(
        values,
        axes,
        about,
        technique="logit_lens" if tuned is None else "tuned_lens",
        unit="logit",
        tensors={"classes": torch.stack(ranked)} if ranked else {},
        facts={"labels": list(names)} if topk is not None else {},
    )


@checked
def token_logits(model: HookedViT | HookedText, stream: Tensor) -> Tensor:
    """Return the logits ``[... class]`` of every token of a residual stream ``[... d_model]``, each taken alone.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> _, cache = model.run_with_cache(torch.zeros(1, 3, 96, 96), names=("resid_post", -1))
    >>> token_logits(model, cache["resid_post", -1]).shape
    torch.Size([1, 145, 12])

    Raises:
        NotApplicable: the model has no head, or one head for each of several tokens.
        InputError: the stream is of another width.
    """
    if model.spec.n_classes is None:
        raise NotApplicable("This model has no classification head, so there are no logits to look through.")
    if stream.shape[-1:] != (model.spec.d_model,):
        raise InputError(f"Expected a stream [... {model.spec.d_model}], got {list(stream.shape)}.")
    return token_outputs(model, stream)


def _stages(cache: Any, tuned: TunedLens | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the streams one by one, so that translated copies do not stand beside each other."""
    streams, labels = cache.accumulated_resid(return_labels=True)
    for at, (stage, stream) in enumerate(zip(labels, streams, strict=True)):
        yield stage, stream if tuned is None or at >= len(tuned) else tuned.translate(stream, at)


def _of_probe(
    model: HookedModel, given: Any, probe: Result, tower: TowerName
) -> tuple[Any, Iterator[tuple[str, Tensor]], Callable[[Tensor, str], Tensor], tuple[str, ...]]:
    """Return the cache, the streams by label, what reads one, and the names of the probe's classes."""
    check_probe(probe)
    places = dict(zip(probe.names("place"), probe.facts["names"], strict=True))
    cache = cache_of(model, given, lambda each: list(places.values()), tower)

    def read(stream: Tensor, stage: str) -> Tensor:
        weight, bias = (probe.tensors[f"{places[stage]}/{part}"].to(stream) for part in ("weight", "bias"))
        return stream @ weight.T + bias

    return cache, ((stage, cache[name]) for stage, name in places.items()), read, tuple(probe.facts["rows"])


def _read(
    stream: Tensor, read: Callable[[Tensor], Tensor], topk: Count | None, chunk: int
) -> tuple[Tensor, Tensor | None]:
    """Read a stream ``[... d_model]`` some tokens at a time, and keep all readings or the highest."""
    values: list[Tensor] = []
    places: list[Tensor] = []
    for part in stream.flatten(0, -2).split(chunk):
        logits = read(part)
        if topk is not None:
            logits, at = logits.topk(min(topk, logits.shape[-1]))
            places.append(at)
        values.append(logits)
    shape = stream.shape[:-1]
    return torch.cat(values).unflatten(0, shape), torch.cat(places).unflatten(0, shape) if places else None
