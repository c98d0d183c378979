"""Top examples: the images, or patches, on which each neuron, head or direction is largest, over any amount of data.

Equation:
    score(unit, image, token) = x_unit, the norm of a head's output, x . direction, or encode(x)_unit; the k largest
    over all images (``per="image"``: of each image its largest token alone), equal ones in the order of the data. With
    them, over all tokens: the histogram of scores, their mean, and how many are positive.
Cost:
    One read of a harvest, or one pass of a model. Memory: k entries and 67 counts a unit, whatever the data.
Misleads:
    The top is the tail: what a unit responds to mostly stands in the middle of its histogram. Images that top a random
    direction look alike too (compare with ``directions=torch.randn(...)``). A patch holds what its token has gathered
    from others by that layer, so its own pixels may show nothing.
Source:
    Bau et al. 2017 (network dissection); Bolukbasi et al. 2021 (illusions of top examples).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from prisma_core import InputError, Result
from prisma_core.plugin import Count, checked
from prisma_harvest.manifest import Point
from prisma_harvest.passes import Pass
from prisma_harvest.progress import counting
from prisma_harvest.reading import Harvest, Name
from prisma_harvest.resuming import Kept, mark
from prisma_harvest.scoring import Encode, Units, largest

EDGES = 2.0 ** (torch.arange(33) / 2 - 6)  # half octaves from 2^-6 to 2^10
EDGES = torch.cat([-EDGES.flip(0), EDGES]).float()
_SCORES = 2**21  # at once
LINE = ("source", "path", "label", "sha256")  # what is kept of an example's line
SCHEMA = 1  # of what a saved result holds


@checked
def top_examples(
    source: Harvest | Pass,
    name: Name,
    k: Count = 16,
    *,
    over: Literal["feature", "head"] = "feature",
    directions: Tensor | None = None,
    encode: Encode | None = None,
    labels: Sequence[str] | None = None,
    per: Literal["image", "patch"] = "image",
    resume: str | Path | None = None,
    progress: bool | None = None,
) -> Result:
    """Return the k largest scores of each unit, with the images and tokens they are at: ``[unit rank]``.

    >>> import prisma_core as prisma
    >>> from prisma_toy import sample_scene
    >>> model = prisma.load("toy:scenes-3l")
    >>> data = [(sample_scene(seed).image, f"scene {seed}") for seed in range(16)]
    >>> best = top_examples(Pass(model, data, ("mlp.hook_post", 2)), ("mlp.hook_post", 2), k=4)
    >>> best.shape, best.tensors["example"].shape, best.facts["examples"]["0"]["label"]
    ({'feature': 256, 'rank': 4}, torch.Size([256, 4]), 'scene 0')

    Args:
        source: a harvest, or ``Pass(model, data, names)``, which runs the model and keeps nothing else.
        name: a hook point of it.
        k: how many.
        over: ``"feature"``: every number of the last axes; ``"head"``: the norm of each head's output.
        directions: score these instead, ``[direction d]``: a probe's weights, an encoded text, decoder rows.
        encode: score its output instead, ``[row d] -> [row unit]``: ``coder.encode`` of a sparse coder, a reading.
        labels: names of the units.
        per: ``"image"`` takes the largest token of each image, ``"patch"`` every token by itself.
        resume: a ``.safetensors`` file that keeps what was found so far; the same call goes on from it.
        progress: show a bar; None shows one on a terminal.

    Returns:
        ``values`` as above, largest first; in ``tensors`` ``example`` and ``token`` ``[unit rank]`` (a token counts
        those that were read), ``histogram [unit bin]`` with ``edges [bin - 1]``, ``mean`` and ``positive [unit]`` over
        all tokens; in ``facts`` the path and label of each image by its number as text, the model, the data, and where
        the tokens are. ``result.save`` keeps all of it in the form that docs/how-to-collect.md describes.

    Raises:
        InputError: the directions do not fit, there are no heads, a score is not finite, or ``resume`` was given with
            an ``encode`` that cannot be told from others.
        LoadError: the file to resume from is of another search.
    """
    if k < 1:
        raise InputError(f"Expected k of at least 1, got {k}.")
    point = source.point(name) if isinstance(source, Harvest) else _point(source, name)
    if per not in ("image", "patch"):
        raise InputError(f"Expected per='image' or 'patch', got {per!r}.")
    units = Units(over, directions, encode)
    search = _Search(point, units, k, per)
    if labels is not None and len(labels) != search.n:
        raise InputError(f"There are {search.n} units and {len(labels)} labels.")
    kept = None if resume is None else Kept(Path(resume), mark(source, point, units, k, per))
    if kept is not None:
        kept.read(search)
    n = len(source) if isinstance(source, Harvest) else source.source.n
    with counting("Searching", n, search.seen, progress) as advance:
        for first, x, lines in _groups(source, point, search):
            search.add(first, x, lines)
            advance(len(x))
            if kept is not None:
                kept.write(search)
    if kept is not None:
        kept.write(search, now=True)
    if not search.seen:
        raise InputError("There are no images to search.")
    return search.result(source, labels)


@dataclass
class _Search:
    """What was found so far."""

    point: Point
    units: Units
    k: int
    per: str

    def __post_init__(self) -> None:
        self.n = self.units.count(self.point)
        shape = (self.n, self.k)
        self.state = {
            "values": torch.full(shape, -torch.inf),
            "example": torch.full(shape, -1),
            "token": torch.full(shape, -1),
            "histogram": torch.zeros(self.n, len(EDGES) + 1, dtype=torch.long),
            "sum": torch.zeros(self.n, dtype=torch.float64),
            "positive": torch.zeros(self.n, dtype=torch.long),
        }
        self.seen = self.groups = 0
        self.lines: dict[int, dict[str, Any]] = {}

    def add(self, first: int, x: Tensor, lines: Sequence[dict[str, Any]] | None) -> None:
        """Take the activations of consecutive examples, ``[example token ...]``."""
        step = max(1, _SCORES // max(1, self.n * self.point.n_tokens))
        for start in range(0, len(x), step):
            self._scores(first + start, self.units.scores(x[start : start + step], self.point))
        self.seen, self.groups = first + len(x), self.groups + 1
        self.lines |= {first + at: line for at, line in enumerate(lines or ())}
        if len(self.lines) > 4 * self.state["example"].numel() + 10_000:
            self._forget()

    def _scores(self, first: int, scores: Tensor) -> None:
        if not torch.isfinite(scores).all():
            raise InputError(f"{self.point.name} is not finite for images {first} to {first + len(scores) - 1}.")
        _, tokens, units = scores.shape
        flat = scores.flatten(0, 1).contiguous()
        bins = torch.bucketize(flat, EDGES) + torch.arange(units) * (len(EDGES) + 1)
        counts = torch.bincount(bins.flatten(), minlength=self.state["histogram"].numel())
        self.state["histogram"] += counts.view_as(self.state["histogram"])
        self.state["sum"] += flat.double().sum(0)
        self.state["positive"] += (flat > 0).sum(0)
        if self.per == "image":
            best, token = scores.max(1)  # the first of equal ones
            places = largest(best.T, self.k)
            self._merge(best.T.gather(1, places), first + places, token.T.gather(1, places))
        else:
            places = largest(flat.T, self.k)
            self._merge(flat.T.gather(1, places), first + places // tokens, places % tokens)

    def _merge(self, values: Tensor, example: Tensor, token: Tensor) -> None:
        """Keep the largest of what there was and what comes; what was there first stays before its equals."""
        new = {"values": values, "example": example, "token": token}
        joined = {name: torch.cat([self.state[name], each], 1) for name, each in new.items()}
        order = joined["values"].sort(stable=True, dim=1, descending=True).indices[:, : self.k]
        self.state |= {name: each.gather(1, order) for name, each in joined.items()}

    def _forget(self) -> None:
        top = set(self.state["example"].unique().tolist())
        self.lines = {example: line for example, line in self.lines.items() if example in top}

    def result(self, source: Harvest | Pass, labels: Sequence[str] | None) -> Result:
        k = int((self.state["example"][0] >= 0).sum()) if self.n else 0
        top = {name: self.state[name][:, :k] for name in ("values", "example", "token")}
        shown = set(top["example"].unique().tolist())
        if isinstance(source, Harvest):
            self.lines = {line["example"]: line for line in source.examples() if line["example"] in shown}
        unit, about = self.units.axis, _about(source, self.point)
        total = self.state["histogram"].sum(1).clamp_min(1)
        return Result(
            top.pop("values"),
            (unit, "rank"),
            {} if labels is None else {unit: tuple(labels)},
            technique="top_examples",
            unit="norm of the head's output" if unit == "head" else "activation",
            tensors={
                **top,
                "histogram": self.state["histogram"],
                "edges": EDGES,
                "mean": (self.state["sum"] / total).float(),
                "positive": self.state["positive"],
            },
            facts={
                "schema_version": SCHEMA,
                "name": self.point.name,
                "per": self.per,
                "seen": self.seen,
                **about,
                "examples": {
                    str(example): {each: self.lines[example].get(each) for each in LINE} for example in sorted(shown)
                },
            },
        )


def _about(source: Harvest | Pass, point: Point) -> dict[str, Any]:
    """Return what a reader needs to know of the images and tokens."""
    manifest = source.manifest if isinstance(source, Harvest) else source.manifest("float32", 1)
    layout = manifest.layout_of(point)
    folder = isinstance(source, Pass) and source.source.kind == "folder"
    return {
        "model": manifest.model.model_dump(mode="json", include={"reference", "weights", "tower"}),
        "data": {
            **manifest.data.model_dump(mode="json", include={"kind", "name", "fingerprint"}),
            "root": str(Path(source.data).absolute()) if folder else None,  # type: ignore[union-attr]
        },
        "layout": None if layout is None else layout.model_dump(mode="json"),
        "positions": manifest.positions(point),
        "tokens": manifest.tokens(point),
    }


def _point(source: Pass, name: Name) -> Point:
    full = source.tower.resolve([name])
    points = [point for point in source.points if point.name.removeprefix(source.tower.prefix) in full]
    if len(points) != 1:
        raise InputError(f"{name!r} is {len(points)} of the hook points of this pass; expected one.")
    return points[0]


def _groups(
    source: Harvest | Pass, point: Point, search: _Search
) -> Iterator[tuple[int, Tensor, Sequence[dict[str, Any]] | None]]:
    """Yield consecutive examples behind those that were seen: the first one's number, activations, lines."""
    if isinstance(source, Harvest):
        for start in range(search.seen, len(source), source.manifest.batch):
            stop = min(start + source.manifest.batch, len(source))
            yield start, source.read(point.name, start, stop), None
        return
    for batch, activations in source.run(search.groups):
        if batch.start >= search.groups * source.batch:
            x = activations.get(point.name, torch.empty(0, *point.shape))
            yield search.seen, x, batch.lines
