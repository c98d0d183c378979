"""Measures of a coder in its model: sparsity, reconstruction, dead and dense features, loss recovered, monosemanticity.

Equation:
    Explained variance: 1 - mean_p(|x - y|^2 / |x - mean x|^2), the mean of ratios that is published, with the mean of
    all tokens; and 1 - sum |x - y|^2 / sum |x - mean x|^2, the ratio of means. Loss recovered: (zero - spliced) /
    (zero - clean), of cross-entropies. Monosemanticity of a feature: the mean cosine of pairs of images, weighted by
    the product of its activations on them, each scaled to 0..1.
Cost:
    A pass to the coder's place for the mean, one with the coder, and for the loss two more. Memory for the activations
    of one batch, and images x features for the monosemanticity.
Misleads:
    The mean of ratios is far below the ratio of means where few tokens have most of the variance; published ones took
    the mean of each batch, which is near that of all tokens where batches are large. Published losses of
    CLIP's coders lack the logit scale, which makes all of them look alike: ``loss recovered`` has it, ``loss recovered,
    no scale`` has not. L0 depends on the tokens.
Source:
    ViT-Prisma and SAELens (explained variance, loss recovered); Pach et al. 2025 (monosemanticity).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prisma_core import HookedDual, HookedModel, InputError, Result
from prisma_core.plugin import Count, Share, check_call, checked, shown
from prisma_sae.binding import check, find, layout_at, placed, places_at
from prisma_sae.coder import SparseCoder
from prisma_sae.splice import splice

Progress = Callable[[int], None]
Batches = Iterable[Tensor | tuple[Tensor, Tensor]]


@checked
@torch.no_grad()
def evaluate(
    model: HookedModel,
    coder: SparseCoder,
    images: Tensor | Batches,
    labels: Tensor | None = None,
    *,
    texts: Tensor | None = None,
    hook: str | None = None,
    batch: Count = 32,
    dense: Share = 0.1,
    embeddings: Tensor | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Return the measures of a coder, by name: ``[measure]``.

    ``tensors`` hold each feature's ``frequency`` over tokens and its ``monosemanticity``.

    >>> import prisma_core as prisma, torch
    >>> from prisma_sae import load
    >>> model = prisma.load("toy:scenes-3l")
    >>> evaluate(model, load("scenes-3l"), torch.rand(2, 3, 96, 96)).names("measure")
    ('l0', 'explained_variance', 'explained_variance_total', 'cosine', 'dead', 'dense', 'monosemanticity')

    Args:
        model: the model that it was trained on.
        coder: the coder.
        images: what the model takes; or batches of it, alone or each with its labels. They are read twice: an iterator,
            which can be read once, is kept in memory.
        labels: the class of each image, for the loss; batches have theirs.
        texts: of a pair of towers, the tokens of the classes' prompts ``[class pos]``, for the loss.
        hook: where the coder belongs, if it does not say so.
        batch: images of a pass.
        dense: the share of tokens from which a feature counts as dense.
        embeddings: of each image ``[image d]``, for the monosemanticity; default what the model itself pools.
        force: measure a coder where it was not trained.
        progress: called with the number of images after each batch.

    Raises:
        InputError: the coder does not belong here, there is no image, labels or texts do not fit, or what the coder
            makes is not finite.
    """
    name, coder = next(iter(placed(model, {hook: coder} if hook else coder).items()))
    if not force:
        check(model, coder, name, None)
    if texts is not None and not isinstance(model, HookedDual):
        raise InputError(f"texts= are of a pair of towers, and this model is none: leave it out, got {shown(texts)}.")
    if progress is not None:
        check_call(progress, 1, "progress=", "progress(images so far)")
    without_loss = False
    reads = find(model, str(coder.facts.hook)) if coder.is_transcoder else name
    if isinstance(model, HookedDual):
        if name.startswith("text."):
            place = name.removeprefix("text.")
            raise InputError(
                f"{name} is of texts, and these are images: evaluate(model.text, coder.with_facts(hook={place!r}), "
                "tokens) measures it on texts."
            )
        if texts is None:
            model, name, reads = model.vision, name.removeprefix("vision."), reads.removeprefix("vision.")
            without_loss = True
    run = _Run(model, coder, name, reads, texts, embeddings is None)
    images = list(images) if not isinstance(images, Tensor) and iter(images) is images else images
    for inputs, targets in _batches(images, labels, batch):
        if targets is not None and without_loss:
            raise InputError("The loss of a pair of towers needs texts= too, the tokens of the classes' prompts.")
        run.average(inputs, targets)
    if not run.sums.rows:
        raise InputError("There is no image to measure the coder on.")
    seen = 0
    for inputs, targets in _batches(images, labels, batch):
        run.add(inputs, targets)
        seen += len(inputs)
        if progress is not None:
            progress(seen)
    return run.result(dense, embeddings)


@checked
def monosemanticity(activations: Tensor, embeddings: Tensor) -> Tensor:
    """Return each feature's monosemanticity ``[feature]``; NaN where fewer than two images have it on.

    >>> import torch
    >>> monosemanticity(torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    tensor([nan])

    Args:
        activations: of each image, ``[image feature]``.
        embeddings: of each image, ``[image d]``; of any model.

    Raises:
        InputError: they do not fit together.
    """
    if activations.ndim != 2 or embeddings.ndim != 2 or not 0 < len(activations) == len(embeddings):
        raise InputError(
            f"Expected activations [image feature] and embeddings [image d] of the same images, got "
            f"{shown(activations)} and {shown(embeddings)}."
        )
    for name, each in (("activations", activations), ("embeddings", embeddings)):
        if not bool(torch.isfinite(each).all()):
            raise InputError(f"Expected numbers as {name}, got some that are NaN or infinite.")
    a, e = activations.double(), torch.nn.functional.normalize(embeddings.double(), dim=-1)
    low, high = a.min(0).values, a.max(0).values
    a = (a - low) / (high - low).clamp_min(torch.finfo(a.dtype).tiny)
    squares = a.square().T
    pairs = a.sum(0).square() - squares.sum(-1)  # the sum over n != m of a_n a_m
    alike = (a.T @ e).square().sum(-1) - squares @ e.square().sum(-1)  # the same, each times the cosine
    score = torch.where(pairs > 1e-12, alike / pairs, torch.nan)
    return score.to(activations.dtype) if activations.is_floating_point() else score.float()


@dataclass
class _Sums:
    """Sums over rows, from which the measures follow."""

    rows: int = 0
    total: Tensor | float = 0.0
    l0: float = 0.0
    ratios: float = 0.0
    residual: float = 0.0
    spread: float = 0.0
    size: float = 0.0
    cosine: float = 0.0
    on: Tensor | float = 0.0
    cls_l0: float = 0.0
    cls_rows: int = 0
    losses: dict[str, float] = field(default_factory=dict[str, float])
    labelled: int = 0


class _Run:
    def __init__(
        self, model: HookedModel, coder: SparseCoder, name: str, reads: str, texts: Tensor | None, embed: bool
    ):
        self.model, self.coder, self.name, self.reads, self.texts = model, coder, name, reads, texts
        self.places, self.source = (places_at(model, each, coder.facts.tokens) for each in (name, reads))
        layout = layout_at(model, name)
        self.cls = layout.cls if layout is not None and coder.facts.tokens in (None, "all") else 0
        self.embed = "*hook_image_embed" if isinstance(model, HookedDual) else "*hook_pooled"
        self.embeds = embed and bool([each for each in model.hook_points() if each.endswith(self.embed[1:])])
        self.sums = _Sums()
        self.labelled: bool | None = None
        self.images: list[Tensor] = []
        self.embeddings: list[Tensor] = []

    def average(self, inputs: Tensor, labels: Tensor | None) -> None:
        """Take a batch into the mean of the activation."""
        if (labels is not None) != (self.labelled if self.labelled is not None else labels is not None):
            raise InputError("Some batches have labels and others have none: give all of them labels, or none.")
        self.labelled = labels is not None
        _, cache = self.model.run_with_cache(*self._arguments(inputs), names=self.name, output=False)
        x = self.places.read(cache[self.name]).flatten(0, -2).double()
        if not bool(torch.isfinite(x).all()):
            raise InputError(
                f"{self.name} is NaN or infinite in this model, on these images: there is nothing to measure."
            )
        self.sums.rows, self.sums.total = self.sums.rows + len(x), self.sums.total + x.sum(0)

    def _arguments(self, inputs: Tensor) -> tuple[Tensor, ...]:
        return (inputs,) if self.texts is None else (inputs, self.texts)

    def add(self, inputs: Tensor, labels: Tensor | None) -> None:
        """Measure a batch."""
        names = [self.name, self.reads, *([self.embed] if self.embeds else [])]
        arguments = self._arguments(inputs)
        output, cache = self.model.run_with_cache(*arguments, names=names)
        target, source = self.places.read(cache[self.name]), self.source.read(cache[self.reads])
        features = self.coder.encode(source)
        self._rows(target.flatten(0, -2), self.coder.decode(features, source).to(target).flatten(0, -2))
        on = features != 0
        counts = on.sum(-1).double()
        sums = self.sums
        sums.l0 += float(counts.sum())
        sums.on = sums.on + on.flatten(0, -2).sum(0).double()
        if self.cls and counts.ndim == 2:
            sums.cls_l0 += float(counts[:, : self.cls].sum())
            sums.cls_rows += counts[:, : self.cls].numel()
        self.images.append(features.flatten(1, -2).mean(1) if features.ndim > 2 else features)
        if self.embeds:
            self.embeddings.append(cache[next(each for each in cache if each.endswith(self.embed[1:]))].flatten(1))
        if labels is not None:
            self._loss(arguments, labels, output)

    def _rows(self, x: Tensor, y: Tensor) -> None:
        x, y, sums = x.double(), y.double(), self.sums
        if not bool(torch.isfinite(y).all()):
            raise InputError(f"What this coder makes of {self.name} is NaN or infinite: it has a damaged tensor.")
        residual, spread = (x - y).square().sum(-1), (x - sums.total / sums.rows).square().sum(-1)
        sums.ratios += float((residual / spread).sum())
        sums.residual += float(residual.sum())
        sums.spread, sums.size = sums.spread + float(spread.sum()), sums.size + float(x.square().sum())
        sums.cosine += float(torch.cosine_similarity(x, y, dim=-1).sum())

    def _loss(self, arguments: tuple[Tensor, ...], labels: Tensor, clean: Tensor) -> None:
        with splice(self.model, {self.name: self.coder}, force=True):
            spliced = self.model(*arguments)
        zero = self.model.run_with_hooks(*arguments, hooks={self.name: self._zero})
        scale = getattr(self.model, "logit_scale", None)
        for kind, logits in (("clean", clean), ("spliced", spliced), ("zero", zero)):
            fits = logits.ndim == 2 and len(logits) == len(labels)
            if not fits or int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
                raise InputError(
                    f"Expected a class from 0, below {logits.shape[-1]}, for each of {len(logits)} images, got labels "
                    f"{list(labels.shape)} from {int(labels.min())} up to {int(labels.max())}."
                )
            plain = logits if scale is None else logits / scale.exp()
            for suffix, each in (("", logits), (", no scale", plain)):
                loss = torch.nn.functional.cross_entropy(each.double(), labels.to(each.device), reduction="sum")
                self.sums.losses[kind + suffix] = self.sums.losses.get(kind + suffix, 0.0) + float(loss)
        self.sums.labelled += len(labels)

    def _zero(self, x: Tensor, at: object) -> Tensor:
        return self.places.write(x, torch.zeros_like(self.places.read(x)))

    def result(self, dense: float, embeddings: Tensor | None) -> Result:
        """Return the measures of all batches."""
        sums, n = self.sums, self.sums.rows
        varies = sums.spread > 1e-24 * sums.size  # else there is one token, or all are alike
        frequency = torch.as_tensor(sums.on) / n
        measures = {
            "l0": sums.l0 / n,
            **({"l0_cls": sums.cls_l0 / sums.cls_rows} if sums.cls_rows else {}),
            "explained_variance": 1 - sums.ratios / n if varies else float("nan"),
            "explained_variance_total": 1 - sums.residual / sums.spread if varies else float("nan"),
            "cosine": sums.cosine / n,
            "dead": float((frequency == 0).double().mean()),
            "dense": float((frequency >= dense).double().mean()),
        }
        for suffix in ("", ", no scale") if sums.labelled else ():
            clean, spliced, zero = (sums.losses[kind + suffix] / sums.labelled for kind in ("clean", "spliced", "zero"))
            short = suffix.replace(", no scale", "_no_scale")
            recovered = (zero - spliced) / (zero - clean) if zero != clean else float("nan")
            measures |= {f"loss{short}": clean, f"loss_spliced{short}": spliced, f"loss_zero{short}": zero}
            measures[f"loss_recovered{short}"] = recovered
        tensors = {"frequency": frequency.float()}
        pooled = embeddings if embeddings is not None else torch.cat(self.embeddings) if self.embeddings else None
        activations = torch.cat(self.images)
        if pooled is not None and (pooled.ndim != 2 or len(pooled) != len(activations)):
            raise InputError(f"Expected embeddings [image d] of {len(activations)} images, got {shown(pooled)}.")
        if pooled is not None and len(activations) > 1:
            tensors["monosemanticity"] = monosemanticity(activations, pooled)
            measures["monosemanticity"] = float(tensors["monosemanticity"].nanmean())
        return Result(
            torch.tensor(list(measures.values()), dtype=torch.float64),
            ("measure",),
            {"measure": tuple(measures)},
            technique="evaluate",
            unit="",
            tensors=tensors,
            facts={
                "hook": self.name,
                "images": len(activations),
                "tokens": n,
                "dense": dense,
                "figures": dict(self.coder.facts.figures),
            },
        )


def beside(result: Result, figures: Mapping[str, float]) -> list[tuple[str, float, float | None]]:
    """Return each measure with the figure that was published, where there is one."""
    names = result.names("measure")
    return [(name, float(value), figures.get(name)) for name, value in zip(names, result.values.tolist(), strict=True)]


def _batches(images: Tensor | Batches, labels: Tensor | None, batch: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    if isinstance(images, Tensor):
        if not images.ndim:
            raise InputError(f"Expected images, batch first, got {shown(images)}.")
        if labels is not None and labels.shape != images.shape[:1]:
            raise InputError(f"Expected a label for each of {len(images)} images, got {shown(labels)}.")
        parts = (slice(start, start + batch) for start in range(0, len(images), batch))
        images = [images[part] if labels is None else (images[part], labels[part]) for part in parts]
    elif labels is not None:
        raise InputError("labels= go with a tensor of images; batches have theirs: [(images, labels), ...].")
    for each in images:
        pair = tuple(each) if isinstance(each, tuple | list) else (each, None)
        if len(pair) != 2 or not (pair[1] is None or (isinstance(pair[1], Tensor) and pair[1].ndim == 1)):
            raise InputError(f"Expected batches of images, or (images, labels [image]), got {shown(each)}.")
        if pair[1] is not None and (pair[1].is_floating_point() or pair[1].dtype == torch.bool):
            raise InputError(f"Expected labels as numbers of classes, whole ones, got {shown(pair[1])}.")
        if not isinstance(pair[0], Tensor) or len(pair[0]):
            yield pair
