"""Batches of tensors, decoded by processes or threads beside the pass, always in the same order."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from pickle import PicklingError
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

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
        workers: processes that read and decode, of data that are no stream; 0 for none.
        threads: how many decode where no processes do.
        pin: whether to pin the pixels.
    """

    batch: int
    start: int = 0
    stop: int | None = None
    workers: int = 0
    threads: int = 1
    pin: bool = False

    def batches(self, data: Data, prepare: Prepare) -> Iterator[Batch]:
        """Return the batches, in order whatever the number of workers, which start now.

        Raises:
            InputError: the data, or ``prepare``, cannot be sent to processes.
        """
        if data.get is None:
            return self._ahead(self._groups(data, prepare))
        source, last = _Indexed(data, prepare, self.batch), -(-(data.n or 0) // self.batch)
        numbers = range(self.start, last if self.stop is None else min(self.stop, last))
        if not self.workers:
            return self._ahead(map(source.group, numbers))
        how: dict[str, Any] = {"batch_size": None, "num_workers": self.workers, "collate_fn": _same}
        how |= {"pin_memory": self.pin, "worker_init_fn": partial(_end_with, os.getpid())}
        try:
            return iter(DataLoader(source, sampler=numbers, **how))
        except (AttributeError, TypeError, PicklingError) as error:  # what pickle raises
            said = " ".join(str(error).split())
            raise InputError(
                f"workers= are processes, which {start_method()!r} begins here, and the data or preprocess= cannot be "
                f"sent to them: {said}. Define what it names at the top of a module, or give workers=0, which decodes "
                "in a thread."
            ) from error

    def _groups(self, data: Data, prepare: Prepare) -> Iterator[Group]:
        """Yield the batches of a stream. Processes would each read all of it, and what shares itself out over the
        workers of torch, as many a data set does, would give each a part of it."""
        items, number = data.items(), 0
        while group := list(islice(items, self.batch)):
            yield Group(number * self.batch, group, prepare if number >= self.start else None)
            number += 1

    def _ahead(self, groups: Iterator[Group]) -> Iterator[Batch]:
        """Yield batches, made by threads while those before them are used.

        Items are read in the caller's thread, which a data set may belong to (as a connection of sqlite does).
        """

        def made(group: Group) -> Batch:
            return group.assemble().pin_memory() if self.pin else group.assemble()

        with ThreadPoolExecutor(self.threads, "prisma-decode") as pool:
            before = deque[Future[Batch]]()
            more = True
            while more or before:
                try:
                    while more and len(before) <= self.threads:
                        group = next(groups, None)
                        more = group is not None
                        if group is not None:
                            before.append(pool.submit(made, group))
                except BaseException:
                    for batch in before:  # they are whole, and come before the error
                        yield batch.result()
                    raise
                if before:
                    yield before.popleft().result()


def start_method() -> str:
    """Return how processes begin here: ``fork``, or what needs everything sent to them."""
    return multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]


def _same(batch: Batch) -> Batch:
    return batch


def _end_with(parent: int, worker: int) -> None:
    """Let a worker end with its parent, however that ends: torch's own check misses a kill during the start."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of linux/prctl.h
    if start_method() != "forkserver" and os.getppid() != parent:
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
