"""An upstream model and its hooked twin, built once and shared by the checks."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from prisma_conformance import tolerances
from prisma_conformance.devices import HALF
from prisma_conformance.randomise import randomise
from prisma_core.errors import ask, called
from prisma_core.maps.places import HookMap
from prisma_core.maps.reader import Reader
from prisma_core.maps.weights import WeightMap
from prisma_core.model import Size
from prisma_core.plugin.adapter import Adapter, MapAdapter, read_spec
from prisma_core.plugin.case import Case
from prisma_core.spec import AnySpec, Facts
from prisma_core.transformer import HookedViT, ZooModel
from prisma_core.upstream.model import HookedUpstream
from prisma_core.zoo import adapt_with

Make = Callable[[Adapter, nn.Module], ZooModel]
Inputs = tuple[Tensor, ...]


class Pair(NamedTuple):
    """Both sides at one dtype on one device."""

    upstream: nn.Module
    model: ZooModel


class Passes(NamedTuple):
    """One pass with everything kept: the inputs, the logits, every activation."""

    inputs: Inputs
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
        dtypes: what logits are compared in besides float64; without any, what the device is used in.
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
        dtypes: Sequence[torch.dtype] = (),
    ):
        self.case = case
        self.adapter = adapter
        self.make = make
        self.drawn = draw
        self.seed = seed
        self.device = torch.device(device or "cpu")
        self.also = torch.device("cuda") if device is None and torch.cuda.is_available() else None
        self.dtypes = tuple(dtypes)
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

    def forget(self) -> None:
        """Let go of what was built, so that its memory can be had again."""
        self._pairs, self._passes = {}, None

    def precisions(self) -> Iterator[tuple[torch.dtype, torch.device]]:
        """Yield in which dtypes, besides float64, logits are compared on which devices."""
        # float64 on a second device is the same proof again. Half precision on a CPU is slow, so it is for who asks.
        for device in (self.device, *([self.also] if self.also is not None else [])):
            usual = (torch.float32, *(HALF if device.type == "cuda" else ()))
            yield from ((dtype, device) for dtype in self.dtypes or usual)

    def own_model(self) -> ZooModel:
        """Return a hooked model of one's own for one input, in float64.

        An opaque stem runs once: it is upstream's own module, has no hook points inside, and may cost a hundred times
        what the blocks do.
        """
        model = self.make(self.adapter, self.upstream())
        for tower in opaque_stems(model):
            tower.embed.stem = Remembered(tower.embed.stem)
        return model

    @property
    def spec(self) -> AnySpec:
        return self.pair().model.spec

    def forward(self, upstream: nn.Module, *inputs: Tensor) -> Tensor:
        """Return upstream's main output."""
        if self.case.forward is not None:
            return called(f"forward of the case {self.case.name!r}", self.case.forward, upstream, *inputs, gives=Tensor)
        if isinstance(self.adapter, MapAdapter):  # its output is the hooked model's, so it is no witness
            return Adapter.output(self.adapter, upstream(*inputs))
        return ask(self.adapter, "call", upstream, *inputs, gives=Tensor)

    def table(self, upstream: nn.Module, method: str = "hooks") -> HookMap:
        """Return the adapter's hook map of an upstream module."""
        given = (self.spec,) if method == "hooks" else ()
        return ask(self.adapter, method, Reader(upstream), *given, gives=HookMap)

    # ---------------------------------------------------------------- inputs and passes

    def sizes(self) -> list[Size]:
        """Return the sizes of input to try, the native one first."""
        return self.pair().model.sizes()

    def inputs(
        self,
        batch: int = 1,
        size: Size | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | None = None,
    ) -> Inputs:
        """Return random inputs, the same for the same arguments."""
        drawn = self.pair().model.sample_inputs(batch, size=size, generator=self.generator(1))
        # Drawn as float32 so that every dtype that can hold it sees the same input.
        return tuple(x.to(device or self.device, dtype if x.is_floating_point() else None) for x in drawn)

    def passes(self) -> Passes:
        """Return one pass of the hooked model in float64 with every activation, derived ones apart."""
        if self._passes is None:
            model, inputs = self.pair().model, self.inputs(batch=2)
            with torch.no_grad():
                logits, cache = model.run_with_cache(*inputs)
            self._passes = Passes(inputs, logits, dict(cache.store))
        return self._passes

    def facts(self) -> str:
        """Return a digest of the spec with its sizes left out; where there is none, of the kinds of hook points."""
        model = self.pair().model
        if isinstance(model, HookedUpstream):
            kinds = {re.sub(r"\d+", "", f"{name} {point.axes}") for name, point in model.hook_points().items()}
            return hashlib.sha256("\n".join(sorted(kinds)).encode()).hexdigest()[:12]
        return facts_of(self.spec)


def opaque_stems(model: ZooModel) -> list[HookedViT]:
    """Return the towers whose stem is upstream's own module."""
    towers = [tower for tower in model.towers().values() if isinstance(tower, HookedViT)]
    return [tower for tower in towers if tower.spec.embed.stem == "opaque"]


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


def facts_of(spec: AnySpec) -> str:
    """Return a digest of a spec that is equal for models that differ in size alone."""
    text = json.dumps(_without_sizes(spec.model_dump(mode="json")), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


_WIDTHS = {"d_model", "d_mlp", "d_head", "d_pool", "n_vocab"}
_LENGTHS = {"image_size", "patch", "in_channels", "rows", "columns", "n_ctx"}
_SIZES = {*_WIDTHS, *_LENGTHS, "eps", "scale"}
_COUNTS = {"cls", "distillation", "registers", "n_classes", "pad_id", "eos_id"}


def _without_sizes(value: Any) -> Any:
    if isinstance(value, list):
        kinds = {json.dumps(_without_sizes(item), sort_keys=True) for item in cast("list[Any]", value)}
        return sorted(kinds)
    if not isinstance(value, dict):
        return value
    items = cast("dict[str, Any]", value)
    kept = {
        key: item not in (None, 0) if key in _COUNTS else _without_sizes(item)
        for key, item in items.items()
        if key not in _SIZES
    }
    if "n_heads" in kept:
        kept["grouped"] = kept.pop("n_heads") != kept.pop("n_kv_heads")
    return kept


def unit_of(reference: Tensor) -> float:
    """Return what errors are counted in: the standard deviation, or a share of the size where that is more."""
    if reference.numel() == 1:
        return float(reference.abs())
    size = float(reference.square().mean().sqrt())
    return max(float(reference.std()), tolerances.SHARE_OF_SIZE * size)


def worst(ours: Tensor, theirs: Tensor, unit: float | None = None) -> float:
    """Return the largest difference in units of the reference (``unit_of``); infinite where shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    if not ours.numel():
        return 0.0
    ours, theirs = ours.detach().double(), theirs.detach().double()
    hidden = theirs < torch.finfo(torch.float64).min / 2  # scores that a mask hides, by infinity or by the least number
    if hidden.any():
        if not torch.equal(hidden, torch.isneginf(ours)):
            return float("inf")
        ours, theirs = ours[~hidden], theirs[~hidden]
    if unit is None:
        unit = unit_of(theirs)
    difference = float((ours - theirs).abs().max())
    # A NaN on either side is the worst error there is; comparisons with it would be false.
    return difference / max(unit, 1e-30) if difference == difference else float("inf")


def typical(ours: Tensor, theirs: Tensor) -> float:
    """Return the root of the mean square of the difference, in the unit of ``worst``."""
    if ours.shape != theirs.shape:
        return float("inf")
    ours, theirs = ours.detach().double(), theirs.detach().double()
    unit = unit_of(theirs)
    difference = float((ours - theirs).square().mean().sqrt())
    return difference / max(unit, 1e-30) if difference == difference else float("inf")


def differentiable(inputs: Inputs) -> Inputs:
    """Return the inputs with a gradient wherever they can have one."""
    return tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs)


def reader_of(subject: Subject) -> tuple[Reader, nn.Module]:
    """Return a reader of a fresh copy of upstream that has seen everything the adapter reads."""
    upstream = subject.upstream()
    reader = Reader(upstream)
    spec = read_spec(subject.adapter, reader, Facts)
    ask(subject.adapter, "stem", reader, spec, gives=(nn.Module, type(None)))
    ask(subject.adapter, "weights", reader, spec, gives=WeightMap)
    ask(subject.adapter, "hooks", reader, spec, gives=HookMap)
    return reader, upstream
