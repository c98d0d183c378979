"""The manifest of a harvest: what its bytes depend on, as data; its hash is the folder's name."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from prisma_core import LoadError, TokenLayout, tensors_of
from prisma_core.plugin import Facts, LayerQuery, checked, digest, path_of, read_fields, read_json, shown

SCHEMA = 1
MANIFEST, WHOLE, EXAMPLES, SKIPPED, SHARDS = (
    "manifest.json",
    "whole.json",
    "examples.jsonl",
    "skipped.jsonl",
    "shards",
)
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Dtype = Literal["bfloat16", "float16", "float32"]
_NAME = re.compile("[0-9a-f]{16}")
_SUBSETS = {"pos": None, "patch": "patches", "cls": "cls"}  # of the layout, by axis
GRID = ("frame", "row", "column")  # axes of patches that a model keeps in their places, as Swin and ConvNeXt do
_TOKENS = (*_SUBSETS, "window", *GRID)  # of windows and frames each has its own tokens behind it
Name: TypeAlias = str | LayerQuery  # of a hook point: full, shorthand, or shorthand and layer


class Point(Facts):
    """A hook point in a harvest.

    Attributes:
        axes: those of one example, without the batch: ``pos d_model``.
        shape: their lengths.
    """

    name: str
    axes: str
    shape: tuple[int, ...]

    @property
    def grid(self) -> TokenLayout | None:
        """The layout of its tokens where they are a grid, ``row column`` or ``frame row column``; else None."""
        lead = dict(zip(takewhile(GRID.__contains__, self.axes.split()), self.shape, strict=False))
        if not {"row", "column"} <= lead.keys():
            return None
        return TokenLayout(frames=lead.get("frame", 1), rows=lead["row"], columns=lead["column"])

    @property
    def token_axes(self) -> int:
        """How many of the first axes are of tokens: one; two or three of a grid; of windows or frames, with the tokens
        in each, two; none."""
        first = list(takewhile(_TOKENS.__contains__, self.axes.split()))
        return len(first) if self.grid is not None or set(first) & set(_SUBSETS) else 0

    @property
    def has_tokens(self) -> bool:
        """Whether the first axes are of tokens: all that were read, of a part of the model the patches or the class
        token alone, or a grid."""
        return self.token_axes > 0

    @property
    def n_tokens(self) -> int:
        """How many tokens an example has; 1 where the axes have none."""
        return math.prod(self.shape[: self.token_axes])

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape of one token's activation."""
        return self.shape[self.token_axes :]

    def by_token(self, x: Tensor) -> Tensor:
        """Return activations of examples with one axis of tokens, a grid in reading order: ``[example token ...]``."""
        return x.flatten(1, self.token_axes) if self.has_tokens else x[:, None]


def token_positions(layout: TokenLayout | None, pos: Any, point: Point) -> list[int] | None:
    """Return the positions of a hook point's tokens (see ``Manifest.positions``)."""
    if point.grid is not None:
        return list(range(point.n_tokens))
    if layout is None or point.token_axes != 1:  # where the tokens of a window are, the model alone knows
        return None
    axis = point.axes.split()[0]
    places = layout.positions(pos if axis == "pos" else _SUBSETS[axis])
    return places if len(places) == point.shape[0] else None  # an image of another size, or a frame's patches


class ModelFacts(Facts):
    """The model that ran.

    Attributes:
        reference: what it was loaded from, if anything.
        kind: its class.
        weights: ``weights_hash`` of the whole model.
        spec: SHA-256 of its spec as JSON, if it has one.
        tower: the prefix of its hook points, ``vision.`` in a pair of towers, else empty.
        behaviour: what it does that neither its spec nor its weights say, if anything.
        dtype: of its weights.
        device: the kind of device it ran on.
    """

    reference: str | None
    kind: str
    weights: str
    spec: str | None
    tower: str
    behaviour: str | None
    dtype: str
    device: str


class DataFacts(Facts):
    """The data.

    Attributes:
        kind: ``folder``, ``tar``, ``indexed`` or ``stream``.
        name: the caller's, to tell sets apart that begin alike.
        examples: how many there are, readable or not; None for a stream, whose end is not known before.
        limit: how many of a stream were asked for.
        fingerprint: SHA-256 of names and sizes, of all content of a list, or of a sample of the content.
    """

    kind: Literal["folder", "tar", "indexed", "stream"]
    name: str
    examples: int | None
    limit: int | None
    fingerprint: str


class Manifest(Facts):
    """All that the bytes of a harvest depend on.

    Attributes:
        points: the hook points.
        dtype: of the tensors on disk.
        pos: the tokens that were asked for: a subset of the layout, positions, or None for all.
        layout: which token is where, where the model knows.
        preprocess: from images to tensors, as data or by name; None where the data were tensors already.
        batch: how many images ran at once: rounding depends on it.
        shard: how many images of the data a shard covers, a multiple of ``batch``.
        note: the caller's words.
    """

    schema_version: int = SCHEMA
    model: ModelFacts
    points: tuple[Point, ...]
    dtype: Dtype
    pos: str | tuple[int, ...] | None
    layout: TokenLayout | None
    preprocess: dict[str, Any] | str | None
    data: DataFacts
    batch: int = Field(gt=0)
    shard: int = Field(gt=0)
    note: str = ""

    def text(self) -> str:
        """Return the bytes of the file: sorted keys, one space of indentation."""
        return as_json(self.model_dump(mode="json"))

    @property
    def name(self) -> str:
        """The folder's name: the first 16 digits of the SHA-256 of ``text()``."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]

    @checked
    def positions(self, point: Point) -> list[int] | None:
        """Return the positions of a hook point's tokens in ``layout_of(point)``; None where it has no tokens, or no
        layout of them is known.

        ``pos`` cuts the axis of that name alone: what has the patches alone, such as the embedding or the features of a
        coder of patches, has all of them.
        """
        return token_positions(self.layout, self.pos, point)

    @checked
    def layout_of(self, point: Point) -> TokenLayout | None:
        """Return the layout of a hook point's tokens: that of its grid, else the model's."""
        return point.grid or self.layout

    @checked
    def tokens(self, point: Point) -> list[str] | None:
        """Return the names of a hook point's tokens, such as ``r3c5``; None where they have none."""
        layout, places = self.layout_of(point), self.positions(point)
        if layout is None or places is None:
            return None
        names = layout.token_names()
        return [names[place] for place in places]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a folder's manifest.

        Raises:
            LoadError: there is none, it is damaged, or of a newer schema.
        """
        path = path_of(folder, "the folder of a harvest") / MANIFEST
        if not path.exists():
            raise LoadError(f"{folder} is no harvest: it has no {MANIFEST}.")
        facts = read_json(path)
        schema = facts.get("schema_version")
        if schema != SCHEMA:
            newer = isinstance(schema, int) and schema > SCHEMA
            what = "update Prisma" if newer else "it is none that Prisma wrote; harvest again"
            raise LoadError(f"{path} has schema {shown(schema)}, and this Prisma reads {SCHEMA}: {what}.")
        manifest = read_fields(cls, facts, f"{path} is no manifest of a harvest")
        if _NAME.fullmatch(path.parent.name) and manifest.name != path.parent.name:
            raise LoadError(
                f"{path} says something else than when it was written: its hash is {manifest.name}. Harvest again."
            )
        return manifest


class ShardFile(Facts):
    """A file of shards: SHA-256, and how many examples it holds."""

    sha256: Sha256
    examples: int = Field(ge=0)


class Whole(Facts):
    """What is known once a harvest is whole.

    Attributes:
        examples: how many it holds.
        skipped: how many could not be read.
        shards: by file name, in order.
        lines: SHA-256 of the files of lines, by name.
    """

    examples: int
    skipped: int
    shards: dict[Annotated[str, Field(pattern=r"^\d{5,9}\.safetensors$")], ShardFile]
    lines: dict[Literal["examples.jsonl", "skipped.jsonl"], Sha256]

    @model_validator(mode="after")
    def _adds_up(self) -> Whole:
        if (n := sum(each.examples for each in self.shards.values())) != self.examples:
            raise ValueError(f"{self.examples} examples in all, and {n} in its shards")
        return self

    @classmethod
    def read(cls, folder: Path) -> Whole | None:
        """Read a folder's record, or return None where the harvest is not whole.

        Raises:
            LoadError: it is damaged.
        """
        path = folder / WHOLE
        if not os.path.lexists(path):
            return None
        return read_fields(cls, read_json(path), f"{path} is damaged")


def example_bytes(points: Iterable[Point], dtype: Dtype) -> int:
    """Return the size of one example's activations on disk."""
    return sum(math.prod(point.shape) for point in points) * DTYPES[dtype].itemsize


def shard_name(index: int) -> str:
    """Return the file name of a shard.

    >>> shard_name(3)
    '00003.safetensors'
    """
    return f"{index:05d}.safetensors"


def as_json(value: Any) -> str:
    """Write JSON in one canonical form."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in C order."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


@checked
def weights_hash(model: nn.Module) -> str:
    """Return the SHA-256 of every parameter and buffer of a model, with names, dtypes and shapes.

    The same weights give the same hash on every device; another dtype is another model. Sparse coders bind with it too.

    >>> import torch
    >>> layer = torch.nn.Linear(2, 2)
    >>> same, other = layer, torch.nn.Linear(2, 2)
    >>> weights_hash(layer) == weights_hash(same), weights_hash(layer) == weights_hash(other)
    (True, False)
    """
    return digest(tensors_of(model))
