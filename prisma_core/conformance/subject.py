"""An upstream model and its hooked twin, built once and shared by the checks."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from prisma_core.adapter import Adapter, Reader
from prisma_core.conformance.case import Case
from prisma_core.conformance.randomise import randomise
from prisma_core.errors import PrismaError
from prisma_core.spec import ModelSpec
from prisma_core.transformer.vit import HookedViT
from prisma_core.zoo import adapt_with

Make = Callable[[Adapter, nn.Module], HookedViT]


class Pair(NamedTuple):
    """Both sides at one dtype on one device."""

    upstream: nn.Module
    model: HookedViT


class Passes(NamedTuple):
    """One pass with everything kept: the image, the logits, every activation."""

    image: Tensor
    logits: Tensor
    acts: dict[str, Tensor]


class Subject:
    """What the checks look at.

    Args:
        case: how upstream is built and called.
        adapter: maps it.
        upstream: the built model; never changed.
        make: how the hooked model is made from adapter and upstream.
        draw: whether a copy with drawn weights is checked, or the weights as they came.
        seed: of weights and images.
        device: where everything runs.
    """

    def __init__(
        self,
        case: Case,
        adapter: Adapter,
        upstream: nn.Module,
        *,
        make: Make = adapt_with,
        draw: bool = True,
        seed: int = 0,
        device: torch.device | str | None = None,
    ):
        self.case = case
        self.adapter = adapter
        self.make = make
        self.drawn = draw
        self.seed = seed
        self.device = torch.device(device or "cpu")
        self.also = torch.device("cuda") if device is None and torch.cuda.is_available() else None
        self.base = copy.deepcopy(upstream).cpu().eval()
        if draw:
            randomise(self.base, self.generator())
        for parameter in self.base.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self._pairs: dict[tuple[torch.dtype, torch.device], Pair] = {}
        self._passes: Passes | None = None

    def variant(self, adapter: Adapter, make: Make) -> Subject:
        """Return a subject with the same upstream and weights, mapped in another way."""
        other = copy.copy(self)
        other.adapter, other.make = adapter, make
        other._pairs, other._passes = {}, None
        return other

    def generator(self, offset: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + offset)

    # ---------------------------------------------------------------- both sides

    def upstream(self, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> nn.Module:
        """Return a copy of upstream of one's own."""
        return copy.deepcopy(self.base).to(device=device or self.device, dtype=dtype)

    def pair(self, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> Pair:
        """Return both sides, shared by all checks: leave them as they are."""
        key = (dtype, device or self.device)
        if key not in self._pairs:
            upstream = self.upstream(*key)
            self._pairs[key] = Pair(upstream, self.make(self.adapter, upstream))
        return self._pairs[key]

    def own_model(self) -> HookedViT:
        """Return a hooked model of one's own for one image, in float64.

        An opaque stem runs once: it is upstream's own module, has no hook points inside, and may cost a hundred times
        what the blocks do.
        """
        model = self.make(self.adapter, self.upstream())
        if model.spec.embed.stem == "opaque":
            model.embed.stem = Remembered(model.embed.stem)
        return model

    @property
    def spec(self) -> ModelSpec:
        return self.pair().model.spec

    def forward(self, upstream: nn.Module, image: Tensor) -> Tensor:
        """Return upstream's main output."""
        if self.case.forward is not None:
            return self.case.forward(upstream, image)
        result = cast(object, upstream(image))
        if isinstance(result, tuple):
            result = cast("tuple[object, ...]", result)[0]
        if not isinstance(result, Tensor):
            raise PrismaError(f"Upstream returns {type(result).__name__}: the case needs forward= to read its output.")
        return result

    # ---------------------------------------------------------------- images and passes

    def sizes(self) -> list[tuple[int, int]]:
        """Return the native image size and, where positions follow it, a larger one and one that is not square."""
        height, width = self.spec.image_size
        if self.spec.embed.interpolation is None:
            return [(height, width)]
        down, across = self.spec.embed.patch
        return [(height, width), (height + 2 * down, width + 2 * across), (height + down, max(across, width - across))]

    def image(
        self,
        batch: int = 1,
        size: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | None = None,
    ) -> Tensor:
        """Return a random image, the same for the same arguments."""
        shape = (batch, self.spec.embed.in_channels, *(size or self.spec.image_size))
        # Drawn as float32 so that every dtype that can hold it sees the same image.
        return torch.randn(shape, generator=self.generator(1)).to(device=device or self.device, dtype=dtype)

    def passes(self) -> Passes:
        """Return one pass of the hooked model in float64 with every activation, derived ones apart."""
        if self._passes is None:
            model, image = self.pair().model, self.image(batch=2)
            with torch.no_grad():
                logits, cache = model.run_with_cache(image)
            self._passes = Passes(image, logits, dict(cache.store))
        return self._passes

    def facts(self) -> str:
        """Return a digest of the spec with its sizes left out."""
        return facts_of(self.spec)


class Remembered(nn.Module):
    """A module that computes what it returns for one input once."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        kept = self.kept
        if kept is None:
            with torch.no_grad():
                kept = self.kept = self.inner(x)
        return kept.clone()


def facts_of(spec: ModelSpec) -> str:
    """Return a digest of a spec that is equal for models that differ in size alone."""
    text = json.dumps(_without_sizes(spec.model_dump(mode="json")), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


_SIZES = frozenset(
    ("d_model", "d_mlp", "d_head", "d_pool", "image_size", "patch", "in_channels", "rows", "columns", "eps", "scale")
)
_COUNTS = {"cls", "distillation", "registers", "n_classes"}


def _without_sizes(value: Any) -> Any:
    if isinstance(value, list):
        kinds = {json.dumps(_without_sizes(item), sort_keys=True) for item in cast("list[Any]", value)}
        return sorted(kinds)
    if not isinstance(value, dict):
        return value
    items = cast("dict[str, Any]", value)
    kept = {
        key: bool(item) if key in _COUNTS else _without_sizes(item) for key, item in items.items() if key not in _SIZES
    }
    if "n_heads" in kept:
        kept["grouped"] = kept.pop("n_heads") != kept.pop("n_kv_heads")
    return kept


def worst(ours: Tensor, theirs: Tensor, unit: float | None = None) -> float:
    """Return the largest difference in units of the reference's standard deviation; infinite where shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    if not ours.numel():
        return 0.0
    ours, theirs = ours.detach().double(), theirs.detach().double()
    if unit is None:
        unit = float(theirs.std()) if theirs.numel() > 1 else float(theirs.abs())
    difference = float((ours - theirs).abs().max())
    # A NaN on either side is the worst error there is; comparisons with it would be false.
    return difference / max(unit, 1e-30) if difference == difference else float("inf")


def reader_of(subject: Subject) -> tuple[Reader, nn.Module]:
    """Return a reader of a fresh copy of upstream that has seen everything the adapter reads."""
    upstream = subject.upstream()
    reader = Reader(upstream)
    spec = subject.adapter.spec(reader)
    subject.adapter.stem(reader, spec)
    subject.adapter.weights(reader, spec)
    subject.adapter.hooks(reader, spec)
    return reader, upstream
