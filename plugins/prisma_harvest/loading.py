"""Batches of tensors, decoded by worker processes beside the pass, always in the same order."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from prisma_core import InputError
from prisma_core.plugin import BriefRepr, check_call, open_image
from prisma_harvest.items import UNREADABLE, Item, content_hash, opened
from prisma_harvest.sources import Data

Prepare = Callable[[Any], Tensor]


@dataclass(repr=False)
class Batch(BriefRepr):
    """Some consecutive examples of the data.

    Attributes:
        start: the position of the first in the data.
        size: how many there are, readable or not.
        lines: what is known of each that could be read: source, path, label, sha256.
        skipped: what is known of each that could not.
        pixels: of those that could, ``[example ...]``; None where none could, or where nobody asked.
        problem: why they make no batch, if they do not.
    """

    start: int
    size: int
    lines: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    pixels: Tensor | None = None
    problem: str | None = None

    def pin_memory(self) -> Batch:
        """Return the batch with pixels that a GPU can take over without a stop."""
        if self.pixels is not None:
            self.pixels = self.pixels.pin_memory()
        return self


def preparer(model: Any, preprocess: Any) -> Prepare:
    """Return the function from an image to the tensor of one example, without a batch axis.

    Args:
        preprocess: ``"model"`` for the model's own, a function of a Pillow image, or None for data that are tensors.
    """
    if preprocess is None:
        return _tensor
    if not isinstance(preprocess, str) or preprocess != "model":
        check_call(preprocess, 1, "preprocess=", "'model', None, or a function of a Pillow image")
    return _ModelPrepare(model.preprocess) if isinstance(preprocess, str) else _Prepare(preprocess)


def _tensor(image: Any) -> Tensor:
    if not isinstance(image, Tensor):
        raise InputError(f"preprocess=None means that the data are tensors for the model; got {type(image).__name__}.")
    return image


@dataclass
class _ModelPrepare:
    preprocess: Any

    def __call__(self, image: Any) -> Tensor:
        if isinstance(image, Tensor) and image.is_floating_point() and image.ndim == 3 and image.shape[0] in (1, 3):
            raise InputError(
                f"The data give tensors {list(image.shape)}, channels first, which the model's preprocess does not "
                "take. If they are ready for the model, say preprocess=None; else take their transform away."
            )
        return self.preprocess(str(image) if isinstance(image, Path) else image)[0]


@dataclass
class _Prepare:
    function: Prepare

    def __call__(self, image: Any) -> Tensor:
        return self.function(image if isinstance(image, list) else open_image(image))


@dataclass(frozen=True)
class Plan:
    """How data become batches.

    Attributes:
        batch: examples in one.
        start: the number of the first batch that is decoded; of a stream, those before it are read and hashed alone.
        stop: the number behind the last one, of data that are no stream; None for all.
        workers: processes that decode; 0 for none.
        pin: whether to pin the pixels.
    """

    batch: int
    start: int = 0
    stop: int | None = None
    workers: int = 0
    pin: bool = False

    def batches(self, data: Data, prepare: Prepare) -> Iterator[Batch]:
        """Return the batches, in order whatever the number of workers, which start now."""
        source = _Stream(data, prepare, self) if data.get is None else _Indexed(data, prepare, self.batch)
        last = -(-(data.n or 0) // self.batch)
        numbers = range(self.start, last if self.stop is None else min(self.stop, last))
        if not self.workers:
            groups = source.groups() if isinstance(source, _Stream) else map(source.group, numbers)
            return self._ahead(groups)
        how: dict[str, Any] = {"batch_size": None, "num_workers": self.workers, "collate_fn": _same}
        how |= {"pin_memory": self.pin, "worker_init_fn": partial(_end_with, os.getpid())}
        return iter(DataLoader(source, sampler=None if isinstance(source, _Stream) else numbers, **how))

    def _ahead(self, groups: Iterator[Group]) -> Iterator[Batch]:
        """Yield batches, each made by a thread while the one before it is used.

        Items are read in the caller's thread, which a data set may belong to (as a connection of sqlite does).
        """

        def made(group: Group) -> Batch:
            return group.assemble().pin_memory() if self.pin else group.assemble()

        with ThreadPoolExecutor(1, "prisma-decode") as thread:
            before: Future[Batch] | None = None
            more = True
            while more:
                try:
                    group = next(groups, None)
                except BaseException:
                    if before is not None:
                        yield before.result()  # it is whole, and comes before the error
                    raise
                more = group is not None
                following = None if group is None else thread.submit(made, group)
                if before is not None:
                    yield before.result()
                before = following


def _same(batch: Batch) -> Batch:
    return batch


def _end_with(parent: int, worker: int) -> None:
    """Let a worker end with its parent, however that ends: torch's own check misses a kill during the start."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of linux/prctl.h
    if os.getppid() != parent:
        os._exit(1)


@dataclass(frozen=True)
class Group:
    """The items of one batch, before they are decoded.

    Attributes:
        start: the position of the first in the data.
        items: each as it was read, or why it was not.
        prepare: from an image to a tensor; None hashes alone.
    """

    start: int
    items: Sequence[Item | Exception]
    prepare: Prepare | None

    def assemble(self) -> Batch:
        """Decode the items to a batch; one that cannot be read is listed among the skipped."""
        batch, pixels = Batch(self.start, len(self.items)), list[Tensor]()
        for source, item in enumerate(self.items, self.start):
            line: dict[str, Any] = {"source": source}
            try:
                if isinstance(item, Exception):
                    raise item
                line |= {"path": item.path, "label": item.label}
                line["sha256"] = content_hash(item.image)
                if self.prepare is not None:
                    pixels.append(self.prepare(opened(item.image)))
            except UNREADABLE as error:
                text = " ".join(str(error).split()) or type(error).__name__
                if isinstance(item, Item) and isinstance(item.image, Path) and item.path:
                    text = text.replace(str(item.image), item.path)
                batch.skipped.append({**line, "error": text})
            else:
                batch.lines.append(line)
        shapes = list(dict.fromkeys(tuple(one.shape) for one in pixels))
        if len(shapes) > 1:
            last = self.start + len(self.items) - 1
            batch.problem = f"Images {self.start} to {last} come out in different shapes: {shapes[:3]}."
        elif pixels:
            batch.pixels = torch.stack(pixels)
        return batch


@dataclass
class _Indexed(Dataset[Batch]):
    data: Data
    prepare: Prepare
    batch: int

    def group(self, number: int) -> Group:
        start = number * self.batch
        positions = range(start, min(start + self.batch, self.data.n or 0))
        return Group(start, list(map(self._read, positions)), self.prepare)

    def _read(self, position: int) -> Item | Exception:
        assert self.data.get is not None
        try:
            return self.data.get(position)
        except UNREADABLE as error:
            return error

    def __getitem__(self, number: int) -> Batch:
        return self.group(number).assemble()


@dataclass
class _Stream(IterableDataset[Batch]):
    """Each worker reads the whole stream and decodes every n-th batch, so that the order is that of one process."""

    data: Data
    prepare: Prepare
    plan: Plan

    def groups(self) -> Iterator[Group]:
        items, number = self.data.items(), 0
        while group := list(islice(items, self.plan.batch)):
            prepare = self.prepare if number >= self.plan.start else None
            yield Group(number * self.plan.batch, group, prepare)
            number += 1

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        return (group.assemble() for group in islice(self.groups(), worker, None, workers))
