"""A gallery of units: static pages with the top images of each neuron, head, direction or sparse feature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, Literal

from prisma_harvest import Pass, top_examples
from prisma_sae import SparseCoder
from torch import Tensor

from prisma_core import HookedModel, InputError, Result
from prisma_core.plugin import Count, LayerQuery, check_keywords, checked, keyword_names
from prisma_view.gallery_files import unit_page, write
from prisma_view.gallery_images import lit
from prisma_view.gallery_units import Units, about
from prisma_view.pages import framed, saved


@dataclass(frozen=True)
class UnitPage:
    """One unit of a gallery as a page of its own, with its images inside."""

    html: str
    number: int

    def save(self, path: str | Path) -> Path:
        """Write the page: one file that needs no network."""
        return saved(path, self.html)

    def _repr_html_(self) -> str:
        return framed(self.html, f"Unit {self.number}", 44)

    def __repr__(self) -> str:
        return f"UnitPage(unit {self.number}, {len(self.html) / 1e3:.0f} kB): save('unit.html')"


@dataclass(frozen=True)
class Gallery:
    """A written gallery.

    Attributes:
        path: its ``index.html``, which opens in a browser without a server.
        units: how many units it shows.
        why: the reason, by the name of each part that is left out.
    """

    path: Path
    units: int
    why: dict[str, str]

    @property
    def bytes(self) -> int:
        """The size of the whole folder."""
        return sum(file.stat().st_size for file in self.path.parent.rglob("*") if file.is_file())

    @checked
    def unit(self, number: int) -> UnitPage:
        """Return one unit: its top images with their patches lit, scores, effects and words. A notebook shows it.

        Raises:
            UnknownName: there is no such unit.
        """
        return UnitPage(unit_page(self.path, number), number)

    def __repr__(self) -> str:
        return f"Gallery({self.units} units, {self.bytes / 1e6:.1f} MB, {str(self.path)!r})"

    def _repr_html_(self) -> str:
        return f'<a href="{escape(self.path.as_posix())}">{escape(repr(self))}</a>'


@checked
def gallery(
    model: HookedModel,
    images: Any,
    name: str | LayerQuery | None = None,
    *,
    out: str | Path,
    coder: SparseCoder | None = None,
    over: Literal["feature", "head"] = "feature",
    directions: Tensor | None = None,
    labels: Sequence[str] | None = None,
    k: Count = 12,
    pos: Any = None,
    top: Result | None = None,
    words: Sequence[str] = (),
    title: str = "",
    batch: Count = 32,
    progress: bool | None = None,
    **options: Any,
) -> Gallery:
    """Write a folder of pages with the top images of each unit, their patches lit, and what each unit writes.

    >>> import prisma_core as prisma
    >>> from prisma_toy import sample_scene
    >>> model = prisma.load("toy:scenes-3l")
    >>> images = [sample_scene(seed).image for seed in range(8)]
    >>> gallery(model, images, ("z", 2), over="head", k=4, out="heads").units
    4

    Args:
        model: any hooked model of images or videos. Of a pair of towers the vision tower is shown.
        images: a folder, tar shards, a list or a data set (see ``prisma_harvest.open_data``), in a fixed order.
        name: the hook point of the units; a coder knows its own.
        out: the folder to write.
        coder: a sparse coder, whose features are shown.
        over: ``"feature"``: every number of the last axes; ``"head"``: each head, by the norm of its output.
        directions: show these instead, ``[direction d]``.
        labels: names of the units; by default those of the coder.
        k: how many images a unit.
        pos: the tokens that are searched: ``"patches"``, ``"cls"``, positions, or None for all; a coder knows its own.
        top: the result of ``prisma_harvest.top_examples`` on the same images, which saves the search.
        words: texts for a dual encoder, of which each unit's nearest are shown.
        title: of the pages; by default the model's reference and the hook point.
        batch: images at once.
        progress: show a bar; None shows one on a terminal.
        options: further ones of ``prisma_harvest.Pass``, such as ``limit=`` or ``preprocess=None`` for tensors.

    Raises:
        InputError: no hook point, images that cannot be read again by number, words for a model that reads none, or a
            ``top`` of other units or images.
        UnknownName: the name is none or several hook points.
    """
    units = Units.of(model, name, coder, over, directions, pos)
    check_keywords("gallery", options, keyword_names(Pass))
    run = Pass(model, images, [units.name], pos=units.pos, batch=batch, **options)
    if run.source.get is None:
        raise InputError("A stream cannot be read again for its top images: give a list, a folder or a data set.")
    if top is None:
        top = top_examples(run, units.name, k, labels=labels, progress=progress, **units.search())
    elif top.values.ndim != 2 or not {"example", "token", "histogram"} <= top.tensors.keys():
        raise InputError(f"Expected top= of prisma_harvest.top_examples, got a result of {top.technique!r}.")
    else:
        ranked = {each: top.tensors[each][:, :k] for each in ("example", "token")}
        top = replace(top, values=top.values[:, :k], tensors={**top.tensors, **ranked})
    names = tuple(labels) if labels is not None else top.labels.get(top.axes[0]) or units.labels(len(top.values))
    names = tuple("" if each == str(unit) else each for unit, each in enumerate(names))  # a number is shown anyway
    shown = lit(run, units, top, progress)
    facts = about(model, run, units, shown.pixels, shown.mean, words)
    place = f"{getattr(model, 'reference', None) or type(model).__name__}, {units.name}"
    path = write(Path(out), title or place, units.kind, names, top, shown, facts)
    return Gallery(path, len(top.values), facts.why)
