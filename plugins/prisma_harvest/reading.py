"""Read a harvest: by example, in order, shuffled, split over workers, as Arrow; two as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prisma_core import HookedModel, InputError, LoadError, NotApplicable, TokenLayout
from prisma_core.plugin import (
    Count,
    Seed,
    behaviour_of,
    check_keywords,
    check_regular,
    checked,
    keyword_names,
    printable,
    resolve_one,
    several,
)
from prisma_harvest.arrow import record_batches
from prisma_harvest.folder import Line, read_lines
from prisma_harvest.manifest import (
    DTYPES,
    EXAMPLES,
    SKIPPED,
    Manifest,
    Name,
    Point,
    example_bytes,
    weights_hash,
)
from prisma_harvest.runs import Run, ShardReader, buffers
from prisma_harvest.shuffling import Chunk, buffered, cut, dealt, drawn, shuffled
from prisma_harvest.splitting import RowDataset

if TYPE_CHECKING:
    import pyarrow

CHUNK_BYTES = 4 * 2**20  # read in one go: long enough that a disk does not notice the seek before it


@dataclass(frozen=True)
class Shard:
    """A file of a harvest.

    Attributes:
        path: the file.
        start: the number of its first example in the harvest.
        n: how many it holds.
    """

    path: Path
    start: int
    n: int


@dataclass(frozen=True, repr=False)
class Harvest:
    """Activations on disk. ``open_harvest`` opens one, ``cat`` makes one of several.

    Attributes:
        folders: the folders it is made of.
        manifest: what it holds: of several, the first one's.
        shards: its files, in order.
    """

    folders: tuple[Path, ...]
    manifest: Manifest
    shards: tuple[Shard, ...] = field(compare=False)

    def __len__(self) -> int:
        return sum(shard.n for shard in self.shards)

    def __repr__(self) -> str:
        points = ", ".join(f"{point.name} {list(point.shape)}" for point in self.points)
        return printable(f"Harvest({len(self)} examples of {points} in {self.manifest.dtype}, {self.folders[0]})")

    @property
    def path(self) -> Path:
        """The folder, of several the first."""
        return self.folders[0]

    @property
    def points(self) -> tuple[Point, ...]:
        """The hook points with their axes and shapes."""
        return self.manifest.points

    @property
    def names(self) -> list[str]:
        """The full names of the hook points."""
        return [point.name for point in self.points]

    @property
    def layout(self) -> TokenLayout | None:
        """The token layout of the model; ``positions_of`` says which of its tokens are at a hook point."""
        return self.manifest.layout

    @checked
    def layout_of(self, name: Name) -> TokenLayout | None:
        """Return the layout that ``positions_of`` counts in: that of a hook point's own grid, else the model's.

        Raises:
            UnknownName: no such hook point.
        """
        return self.manifest.layout_of(self.point(name))

    @checked
    def positions_of(self, name: Name) -> list[int] | None:
        """Return the positions of a hook point's tokens; None where it has no tokens, or no layout of them is known.

        Raises:
            UnknownName: no such hook point.
        """
        return self.manifest.positions(self.point(name))

    @checked
    def tokens_of(self, name: Name) -> list[str] | None:
        """Return the names of a hook point's tokens: ``cls``, ``r3c5``; None where they have none.

        Raises:
            UnknownName: no such hook point.
        """
        return self.manifest.tokens(self.point(name))

    @checked
    def check_model(self, model: HookedModel) -> None:
        """Refuse another model than the one whose activations these are.

        Raises:
            InputError: its weights differ, or what it does beside them.
        """
        subject, facts = getattr(model, "reference", None) or type(model).__name__, self.manifest.model
        if weights_hash(model) != facts.weights:
            raise InputError(
                f"{subject} has other weights than {facts.reference or facts.kind}, which {self.path} is of."
            )
        if (behaviour := behaviour_of(model)) != facts.behaviour:
            raise InputError(
                f"{subject} has the weights of the model that {self.path} is of, and computes something else. Beside "
                f"its weights it has: {behaviour or 'nothing'}. That one had: {facts.behaviour or 'nothing'}."
            )

    @checked
    def point(self, name: Name) -> Point:
        """Return a hook point by full name, shorthand, or shorthand and layer.

        Raises:
            UnknownName: it is none or several of those in the harvest.
        """
        full = resolve_one(name, self.names)
        return next(point for point in self.points if point.name == full)

    def _points(self, names: Name | list[Name]) -> list[Point]:
        """Return the hook points of a name or of a list of at least one."""
        each = several(names, "a hook point or a list of them") if isinstance(names, list) else [names]
        return [self.point(name) for name in each]

    # ---------------------------------------------------------------- lines

    def examples(self) -> Iterator[Line]:
        """Yield what is known of each example: ``example source path label sha256``."""
        lines = (line for folder in self.folders for line in read_lines(folder / EXAMPLES))
        return ({**line, "example": at} for at, line in enumerate(lines))

    def skipped(self) -> Iterator[Line]:
        """Yield what is known of each image that could not be read: ``source path error``."""
        return (line for folder in self.folders for line in read_lines(folder / SKIPPED))

    # ---------------------------------------------------------------- tensors

    @checked
    def example(self, index: int, name: Name) -> Tensor:
        """Return the activation of one example: ``[token d]``, or whatever axes the hook point has.

        Raises:
            InputError: there is no such example.
        """
        if not -len(self) <= index < len(self):
            raise InputError(f"No example {index}: they run from 0 to {len(self) - 1}.")
        index %= len(self)
        return self.read(name, index, index + 1)[0]

    @checked
    def read(self, name: Name, start: int, stop: int) -> Tensor:
        """Return the activations of consecutive examples: ``[example token d]``.

        Raises:
            InputError: there are no such examples.
            LoadError: a shard is missing or damaged.
        """
        if not 0 <= start < stop or start >= len(self):
            raise InputError(f"No examples from {start} to {stop}: they run from 0 to {len(self) - 1}.")
        point = self.point(name)
        parts = [
            self._part(
                shard, max(start, shard.start) - shard.start, min(stop, shard.start + shard.n) - shard.start, point
            )
            for shard in self.shards
            if start < shard.start + shard.n and shard.start < stop
        ]
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def _part(self, shard: Shard, start: int, stop: int, point: Point) -> Tensor:
        check_regular(shard.path)
        try:
            with safe_open(shard.path, "pt") as file:
                whole = file.get_slice(point.name)
                part: Tensor = whole[start:stop]
        except (OSError, SafetensorError) as error:
            raise LoadError(f"{shard.path} cannot be read: {error}. `prisma harvest verify` tells what is.") from error
        if whole.get_shape() != [shard.n, *point.shape] or part.dtype != DTYPES[self.manifest.dtype]:
            held = f"{whole.get_shape()} {part.dtype}"
            raise LoadError(f"{shard.path} holds {held} where its manifest, or the record of it, says otherwise.")
        return part

    @checked
    def batches(self, name: Name, batch: Count) -> Iterator[tuple[int, Tensor]]:
        """Yield the examples in order: the number of the first, and ``[example token d]``."""
        for start in range(0, len(self), batch):
            yield start, self.read(name, start, min(start + batch, len(self)))

    # ---------------------------------------------------------------- rows

    @overload
    def rows(
        self,
        name: Name,
        batch: int,
        shuffle: bool = False,
        buffer: int = ...,
        seed: Seed = 0,
        *,
        part: tuple[int, int] = (0, 1),
        drop_last: bool = False,
    ) -> Iterator[Tensor]: ...
    @overload
    def rows(
        self,
        name: list[Name],
        batch: int,
        shuffle: bool = False,
        buffer: int = ...,
        seed: Seed = 0,
        *,
        part: tuple[int, int] = (0, 1),
        drop_last: bool = False,
    ) -> Iterator[tuple[Tensor, ...]]: ...
    @checked
    def rows(
        self,
        name: Name | list[Name],
        batch: Count,
        shuffle: bool = False,
        buffer: Count = 2**16,
        seed: Seed = 0,
        *,
        part: tuple[int, int] = (0, 1),
        drop_last: bool = False,
    ) -> Iterator[Any]:
        """Yield tokens as rows ``[batch d]``: all tokens of all examples, once each.

        Several axes behind the token, such as ``head d_head``, become one; a grid (``row column d_model``) is its
        positions in reading order; where there is no token axis, an example is a row. The same seed gives the same
        order.

        Args:
            name: a hook point; a list of them gives tuples of the same tokens' rows.
            batch: rows at once; the last batch may be shorter.
            shuffle: read runs of 4 MiB in random order into a buffer, and give out its rows in random order. Rows of
                one file that all fit in the buffer are read in order, and given out without it.
            buffer: how many rows it holds.
            seed: of the order.
            part: (which, of how many): this share of the examples alone; shares differ by one example at most.
            drop_last: leave a shorter last batch out.

        Raises:
            UnknownName: no such hook point.
            NotApplicable: its second axis is no token, as of a pattern; or two differ in tokens.

        >>> import tempfile
        >>> import prisma_core as prisma
        >>> from prisma_toy import sample_scene
        >>> model = prisma.load("toy:scenes-3l")
        >>> data = [(sample_scene(seed).image, f"scene {seed}") for seed in range(16)]
        >>> from prisma_harvest import harvest
        >>> acts = harvest(model, data, ("resid_post", 1), out=tempfile.mkdtemp())
        >>> [rows.shape for rows in acts.rows(("resid_post", 1), 2000, shuffle=True)]
        [torch.Size([2000, 128]), torch.Size([320, 128])]
        """
        points = self._points(name)
        if not 0 <= part[0] < part[1]:
            raise InputError(f"Expected part=(which, of how many), got {part}.")
        tokens = {_tokens(point) for point in points}
        if len(tokens) > 1:
            raise NotApplicable(f"These hook points differ in tokens: {', '.join(each.name for each in points)}.")
        chunks = self._chunks(points, shuffle, seed, part)
        if shuffle and chunks:
            made = self._shuffled(points, chunks, batch, buffer, seed + part[0])
        else:
            made = buffered((self._rows(points, chunk) for chunk in chunks), batch)
        alone = not isinstance(name, list)
        return (group[0] if alone else group for group in made if not drop_last or len(group[0]) == batch)

    def _chunks(self, points: Sequence[Point], shuffle: bool, seed: Seed, part: tuple[int, int]) -> list[Chunk]:
        size = max(1, CHUNK_BYTES // max(1, example_bytes(points[:1], self.manifest.dtype)))
        chunks = cut([shard.n for shard in self.shards], size)
        if shuffle:
            order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(seed))
            chunks = [chunks[at] for at in order.tolist()]
        return dealt(chunks, *part)

    def _shuffled(
        self, points: Sequence[Point], chunks: Sequence[Chunk], batch: int, buffer: int, seed: int
    ) -> Iterator[tuple[Tensor, ...]]:
        per, dtype = _tokens(points[0]), self.manifest.dtype
        shards = {
            at: ShardReader(self.shards[at].path, self.shards[at].n, points, dtype)
            for at in {chunk.shard for chunk in chunks}
        }
        runs = [Run(shards[chunk.shard], chunk.start * per, chunk.stop * per) for chunk in chunks]
        n = sum(run.stop - run.start for run in runs)
        rows = min(max(1, buffer // batch) * batch, n)
        if rows == n and [shard.n * per for shard in shards.values()] == [n]:
            return self._shuffled_file(points, chunks, runs, batch, seed)
        return shuffled(runs, batch, buffers(points, dtype, rows, per), seed)

    def _shuffled_file(
        self, points: Sequence[Point], chunks: Sequence[Chunk], runs: Sequence[Run], batch: int, seed: int
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield all rows of one file in random order, out of its memory map: a buffer would be one more copy."""
        most = max(run.stop - run.start for run in runs)
        scratch = buffers(points, self.manifest.dtype, most, _tokens(points[0]))
        for run in sorted(runs, key=lambda run: run.start):  # in order, so that random reads come from the page cache
            run.shard.read(run.start, [place[: run.stop - run.start] for place in scratch])
        whole = self._rows(points, Chunk(chunks[0].shard, 0, max(chunk.stop for chunk in chunks)))
        yield from drawn(whole, batch, torch.Generator().manual_seed(seed))

    def _rows(self, points: Sequence[Point], chunk: Chunk) -> tuple[Tensor, ...]:
        shard = self.shards[chunk.shard]
        parts = (self._part(shard, chunk.start, chunk.stop, point) for point in points)
        return tuple(point.by_token(x).flatten(0, 1).flatten(1) for x, point in zip(parts, points, strict=True))

    # ---------------------------------------------------------------- other forms

    @checked
    def dataset(self, name: Name | list[Name], batch: Count, **options: Any) -> RowDataset:
        """Return rows as a torch ``IterableDataset`` that workers and ranks share out (see ``RowDataset``)."""
        check_keywords("Harvest.dataset", options, keyword_names(RowDataset))
        self._points(name)  # its errors now, none of a worker's later
        return RowDataset(self.rows, name, batch, **options)

    @checked
    def to_arrow(self, names: Name | list[Name] | None = None, *, batch: Count = 64) -> pyarrow.RecordBatchReader:
        """Return the examples as Arrow, a batch at a time (see ``prisma_harvest.arrow``).

        Raises:
            PluginError: pyarrow is not installed.
            UnknownName: no such hook point.
        """
        points = list(self.points) if names is None else self._points(names)
        return record_batches(points, self.manifest.dtype, self.examples(), self.read, batch)


def _tokens(point: Point) -> int:
    """Return how many rows an example has.

    Raises:
        NotApplicable: its first axis is neither a token nor a feature.
    """
    if not point.has_tokens and len(point.shape) > 1:
        raise NotApplicable(
            f"{point.name} is [{point.axes}], which has no rows of tokens: take harvest.batches or harvest.example."
        )
    return point.n_tokens
