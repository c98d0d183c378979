"""One pass of a model over data: batches of activations at any number of hook points, and what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prisma_core import HookedModel, InputError, TokenLayout, UnknownName, tensors_of
from prisma_core.plugin import (
    BriefRepr,
    Count,
    Natural,
    Query,
    behaviour_of,
    checked,
    expect,
    positions_of,
    qualified_name,
    set_on_parts,
    shown,
)
from prisma_harvest.items import UNREADABLE, Item, opened
from prisma_harvest.loading import Batch, Plan, preparer, start_method
from prisma_harvest.manifest import GRID, DataFacts, Dtype, Manifest, ModelFacts, Point, weights_hash
from prisma_harvest.sources import Data, open_data

_FEW = 256  # images that are decoded sooner than processes start
OnError = Literal["stop", "skip"]
Workers = Annotated[int, Field(ge=0, le=1024)]
Pos = str | int | slice | Sequence[int] | Tensor | None


@dataclass(frozen=True)
class Tower:
    """The model that runs: of a pair of towers the one that sees images, with the prefix of its hook points."""

    whole: HookedModel
    model: HookedModel
    prefix: str

    @classmethod
    def of(cls, model: HookedModel) -> Tower:
        towers: Mapping[str, HookedModel] = model.towers() if hasattr(model, "towers") else {"": model}
        prefix = "vision." if "vision." in towers else ""
        return cls(model, towers.get(prefix, model), prefix)

    def resolve(self, names: Query | None) -> list[str]:
        """Return the tower's own names for a query, which may spell the prefix out.

        Raises:
            UnknownName: it selects nothing of the tower.
        """
        try:
            return self.model.resolve(self._unprefixed(names))
        except UnknownName:
            if not self.prefix:
                raise
        full = self.whole.resolve(names)
        if lost := [name for name in full if not name.startswith(self.prefix)]:
            raise UnknownName(f"{lost[0]} is not in the tower {self.prefix!r}, which sees the images.")
        return [name.removeprefix(self.prefix) for name in full]

    def _unprefixed(self, names: Any) -> Any:
        if isinstance(names, list):
            return [self._unprefixed(name) for name in names]
        return names.removeprefix(self.prefix) if isinstance(names, str) else names


@checked
@dataclass(repr=False)
class Pass(BriefRepr):
    """A model, data, and what to read: one pass, in an order that depends on neither workers nor interruptions.

    >>> import prisma_core as prisma
    >>> from prisma_toy import sample_scene
    >>> model = prisma.load("toy:scenes-3l")
    >>> data = [(sample_scene(seed).image, f"scene {seed}") for seed in range(4)]
    >>> for batch, activations in Pass(model, data, ("resid_post", 1), pos="patches").run():
    ...     activations["blocks.1.hook_resid_post"].shape, batch.lines[0]["label"]
    (torch.Size([4, 144, 128]), 'scene 0')

    Attributes:
        model: any hooked model of images or videos. Of a pair of towers the vision tower runs.
        data: see ``open_data``.
        names: the hook points (see ``HookedModel.resolve``).
        pos: the tokens: a subset of the layout (``"cls"``, ``"patches"``, ...), positions, or None for all.
        batch: images at once.
        preprocess: ``"model"`` for the model's own, a function of a Pillow image, or None for data that are tensors.
        limit: take only so many images from the start.
        on_error: what an image that cannot be read does: ``"stop"``, or ``"skip"``: it is left out and listed.
        workers: processes that decode; of a stream, threads. None for one less than there are cores, at most 8, and
            none for few images; they are threads too where processes do not begin by ``fork``.
        data_name: tells data apart that begin alike.
        image_column, label_column: the keys of mappings, where they are not the usual ones.
        note: goes into the manifest; needed where hooks are open, or hooks of torch's or forwards are set on parts, for
            they change what is read.
    """

    model: HookedModel
    data: Any
    names: Query | None
    pos: Pos = None
    batch: Count = 32
    preprocess: Any = "model"
    limit: Count | None = None
    on_error: OnError = "stop"
    workers: Workers | None = None
    data_name: str = ""
    image_column: str | None = None
    label_column: str | None = None
    note: str = ""

    tower: Tower = field(init=False, repr=False)
    source: Data = field(init=False, repr=False)
    points: tuple[Point, ...] = field(init=False)
    layout: TokenLayout | None = field(init=False)

    def __post_init__(self) -> None:
        """Open the data and run the first image, for the shapes.

        Raises:
            InputError: the data, the batch or the tokens cannot be what was meant.
            UnknownName: a name matches no hook point.
        """
        self.tower = Tower.of(self.model)
        if not self.note and (names := [*self.model.open_hooks(), *self.tower.model.open_hooks()]):
            raise InputError(f"A hook is open at {names[0]}: close it, or say in note= what the harvest is of.")
        if not self.note and (additions := set_on_parts(self.model)):
            raise InputError(
                f"{additions[0]} may change what is read: take it off, or say in note= what the harvest is of."
            )
        self.own_names = self.tower.resolve(self.names)
        if not self.own_names:
            raise InputError(f"Expected at least one hook point, got names={shown(self.names)}.")
        self.prepare = preparer(self.model, self.preprocess)
        columns = {"image_column": self.image_column, "label_column": self.label_column}
        self.source = open_data(self.data, limit=self.limit, **columns)
        weights = list(tensors_of(self.tower.model).values())
        self.device = weights[0].device if weights else torch.device("cpu")
        self.dtype = next((each.dtype for each in weights if each.is_floating_point()), torch.float32)
        kind = self.device.type
        if not self.note and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            raise InputError(
                f"torch.autocast is on, and the manifest says that the model ran in {self.dtype}: leave it, or say in "
                "note= what the harvest is of. A model is loaded in a half dtype by dtype='bfloat16'."
            )
        axes = {name: point.axes for name, point in self.tower.model.hook_points().items()}
        self._orders = {name: _grid_first(axes[name].split()) for name in self.own_names}
        self._shapes(axes)

    # ---------------------------------------------------------------- the pass

    @checked
    def run(self, start: Natural = 0) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        """Yield each batch with its activations by full name, as the model computed them, where it computed them.

        Args:
            start: the number of the first batch to run. Of a stream, those before it come without activations.

        Raises:
            InputError: an image cannot be read and ``on_error`` is ``"stop"``, or images differ in shape.
        """
        return self.activations(self.batches(start))

    @checked
    def batches(self, start: Natural = 0, stop: Natural | None = None) -> Iterator[Batch]:
        """Return the decoded batches from one number to before another; workers start at once."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        few = self.source.n is not None and self.source.n < _FEW
        n = self.workers if self.workers is not None else 0 if few else min(8, cores - 1)
        # Processes that do not begin as copies run the caller's script again, which has to be written for that.
        processes = n if self.workers is not None or start_method() == "fork" else 0
        plan = Plan(self.batch, start, stop, processes, max(1, n), pin=self.device.type == "cuda")
        return plan.batches(self.source, self.prepare)

    @checked
    def activations(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        """Run decoded batches (see ``run``)."""
        for batch in batches:
            expect(batch, Batch, "batches, as Pass.batches() returns")
            if batch.problem:
                raise InputError(f"{batch.problem} Cut them to one size, or give them apart.")
            if batch.skipped and self.on_error == "stop":
                first = batch.skipped[0]
                raise InputError(
                    f"Image {first['source']} ({first.get('path') or 'without a path'}) cannot be read: "
                    f"{first['error']} on_error='skip' leaves such images out and lists them. What is done is kept."
                )
            yield batch, {} if batch.pixels is None else self._read(batch.pixels, self._pos)

    def _read(self, pixels: Tensor, pos: Any) -> dict[str, Tensor]:
        dtype = self.dtype if pixels.is_floating_point() else None
        pixels = pixels.to(device=self.device, dtype=dtype, non_blocking=True)
        with torch.no_grad():
            _, cache = self.tower.model.run_with_cache(pixels, names=self.own_names, pos=pos, output=False)
        return {self.tower.prefix + name: cache[name].permute(order) for name, order in self._orders.items()}

    def _shapes(self, axes: Mapping[str, str]) -> None:
        """Run the first image that can be read."""
        pixels = self._first()[None]
        self.layout = self.tower.model.layout_for(pixels.to(self.device, self.dtype))
        self._pos: Any = self.pos
        if isinstance(self.pos, int):
            self._pos = [self.pos]
        elif self.pos is not None and not isinstance(self.pos, str):
            if isinstance(self.pos, slice | Tensor) and self.layout is None:
                raise InputError("This model has no token layout: give pos as a list of positions.")
            n = self.layout.n_tokens if self.layout is not None else max(map(abs, self.pos), default=0) + 1
            places = positions_of(self.pos, n)  # its errors, and without a layout no more: a negative one is the pass's
            self._pos = places if self.layout is not None else list(self.pos)
        points: list[Point] = []
        for name, x in self._read(pixels, self._pos).items():
            names = axes[name.removeprefix(self.tower.prefix)].split()
            if names[0] != "batch":
                raise InputError(f"{name} is [{' '.join(names)}]: a harvest holds activations of images, batch first.")
            names = [names[at] for at in _grid_first(names)]
            points.append(Point(name=name, axes=" ".join(names[1:]), shape=tuple(x.shape[1:])))
        self.points = tuple(points)

    def _first(self) -> Tensor:
        n = self.source.n or 1
        problem = "none"
        for index in range(min(n, 100)):
            try:
                item = self.source.get(index) if self.source.get is not None else self.source.head or Item(None)
                return self.prepare(opened(item.image))
            except UNREADABLE as error:
                problem = str(error).rstrip(".")
                if self.on_error == "stop":
                    raise InputError(
                        f"Image {index} cannot be read: {problem}. on_error='skip' leaves such images out."
                    ) from error
        raise InputError(f"None of the first {min(n, 100)} images can be read; the last: {problem}.")

    # ---------------------------------------------------------------- what it depends on

    @checked
    def manifest(self, dtype: Dtype, shard: Count) -> Manifest:
        """Return the manifest of a harvest of this pass."""
        spec = getattr(self.tower.model, "spec", None)
        return Manifest(
            model=ModelFacts(
                reference=getattr(self.model, "reference", None),
                kind=type(self.tower.model).__name__,
                weights=weights_hash(self.model),
                spec=_text_hash(spec.model_dump_json() + _settings(self.model))
                if isinstance(spec, BaseModel)
                else None,
                tower=self.tower.prefix,
                behaviour=behaviour_of(self.model),
                dtype=str(self.dtype).removeprefix("torch."),
                device=self.device.type,
            ),
            points=self.points,
            dtype=dtype,
            pos=self._pos if self._pos is None or isinstance(self._pos, str) else tuple(self._pos),
            layout=self.layout,
            preprocess=self._preprocess_facts(),
            data=DataFacts(
                kind=self.source.kind,
                name=self.data_name,
                examples=self.source.n,
                limit=self.limit if self.source.n is None else None,
                fingerprint=self.source.fingerprint,
            ),
            batch=self.batch,
            shard=shard,
            note=self.note,
        )

    def _preprocess_facts(self) -> dict[str, Any] | str | None:
        function = self.model.preprocess if self.preprocess == "model" else self.preprocess
        if isinstance(function, BaseModel):
            return function.model_dump(mode="json")
        if function is None:
            return None
        text = repr(function)
        name = getattr(function, "__qualname__", None)
        named = f"{function.__module__}.{name}" if name else qualified_name(function)
        return named if " at 0x" in text else f"{named}: {text}"


def _grid_first(axes: Sequence[str]) -> list[int]:
    """Return the order in which the axes of a grid come right behind the batch, as tokens do.

    >>> _grid_first(["batch", "d_model", "row", "column"])
    [0, 2, 3, 1]
    """
    grid = [at for at, axis in enumerate(axes) if axis in GRID] if {"row", "column"} <= set(axes) else []
    return [0, *grid, *(at for at in range(1, len(axes)) if at not in grid)]


def _settings(model: nn.Module) -> str:
    """Return the attributes of upstream's own modules as JSON, of a model that runs as they do; empty for others."""
    plain = (bool, int, float, str, type(None))
    parts = cast("Iterator[tuple[str, nn.Module]]", model.named_modules())
    settings = {
        f"{path}.{name}": value
        for path, part in parts
        if "upstream" in path.split(".")
        for name, value in vars(part).items()
        if name != "training" and name[0] != "_" and all(isinstance(each, plain) for each in tree_leaves(value))
    }
    return json.dumps(settings, sort_keys=True) if settings else ""


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
