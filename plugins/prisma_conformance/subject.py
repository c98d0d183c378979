"""Subject of the checks: an upstream model beside its hooked twin, each built once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from prisma_conformance.devices import HALF
from prisma_conformance.digest import digest_of_points, digest_of_spec
from prisma_conformance.randomise import randomise
from prisma_conformance.target import Target, resolve
from prisma_core import HookedViT, Size, ZooModel
from prisma_core.maps.places import INSIDE
from prisma_core.plugin import (
    Adapter,
    AnySpec,
    Case,
    HookMap,
    ImagePreprocess,
    Images,
    InputError,
    MapAdapter,
    PluginError,
    PrismaError,
    Reader,
    Row,
    blaming,
    check_flags,
    copy_module,
    device_of,
    expect,
    number,
    returned,
)
from prisma_core.zoo import adapt_with, read_adapter

Make = Callable[[Adapter, nn.Module], ZooModel]
Inputs = tuple[Tensor, ...]


class Pair(NamedTuple):
    """Upstream and hooked model, in one dtype on one device."""

    upstream: nn.Module
    model: ZooModel


class Passes(NamedTuple):
    """One pass of the hooked model: its inputs, its output and every activation."""

    inputs: Inputs
    logits: Tensor
    acts: dict[str, Tensor]


class Reference(NamedTuple):
    """Places of an untouched upstream that hook points must equal.

    Attributes:
        rows: one for each hook point that is compared.
        sizes: of axes that the rows unfold.
        scope: brings upstream into the state in which the places are read.
    """

    rows: list[Row]
    sizes: dict[str, int]
    scope: AbstractContextManager[None]


class Subject:
    """An upstream model and an adapter, with everything that the checks derive from them.

    Args:
        case: how upstream is built and called.
        adapter: maps it.
        upstream: the built model; a copy of it is checked.
        make: makes the hooked model of adapter and upstream.
        draw: whether the copy gets weights drawn at random, or has those of ``upstream``.
        seed: of weights and inputs.
        device: where everything runs; None for the CPU, and logits on a GPU too where there is one.
        dtypes: what logits are compared in besides float64; empty for those in which the device is used.
        reference: the model it stands for, if any.
        full: whether upstream has its real size.
        note: for users, about that size.
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
        reference: str | None = None,
        full: bool = False,
        note: str = "",
    ):
        self.case = case
        self.adapter = adapter
        self.make = make
        self.drawn = draw
        self.seed = seed
        self.device = device_of(device) or torch.device("cpu")
        if self.device.type == "meta":
            raise InputError("Expected a device with numbers, got 'meta': there is nothing to compare on it.")
        self.second_device = torch.device("cuda") if device is None and torch.cuda.is_available() else None
        self.dtypes = tuple(dtypes)
        self.reference = reference
        self.full = full
        self.note = note
        self.base = copy_module(upstream).cpu().double().eval()  # numbers that float32 does not hold are drawn, too
        if draw:
            randomise(self.base, self.generator())
        for parameter in self.base.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self._pairs: dict[tuple[torch.dtype, torch.device], Pair] = {}
        self._passes: Passes | None = None

    @classmethod
    def of(
        cls,
        target: Target,
        *,
        upstream: nn.Module | None = None,
        adapter: Adapter | None = None,
        device: torch.device | str | None = None,
        dtypes: Sequence[torch.dtype] = (),
        full: bool = False,
        pretrained: bool = False,
        seed: int = 0,
    ) -> Iterator[Subject]:
        """Yield the subjects of a target: one, or for an adapter one a case.

        Args:
            target, upstream, adapter, device, dtypes, full, pretrained, seed: as ``check`` takes them.

        Raises:
            UnknownName: no such reference.
            UnsupportedArchitecture: an adapter without cases, or a model no adapter takes.
            InputError: one is of another type, or no such device is there.
        """
        expect(target, (str, nn.Module, Adapter, Case), "a reference, a model, an adapter or a case")
        for given, kind, what in ((upstream, nn.Module, "the upstream module"), (adapter, Adapter, "an adapter")):
            if given is not None:
                expect(given, kind, what)
        number(seed, "a seed", -(1 << 62), 1 << 62)
        check_flags(full=full, pretrained=pretrained)
        device_of(device)
        for one in resolve(target, upstream=upstream, adapter=adapter, full=full, pretrained=pretrained):
            yield cls(
                one.case,
                one.adapter,
                one.upstream,
                draw=one.drawn,
                seed=seed,
                device=device,
                dtypes=dtypes,
                reference=one.reference,
                full=one.full,
                note=one.note,
            )

    def variant(self, adapter: Adapter, make: Make) -> Subject:
        """Copy the subject with the same upstream and weights, mapped in another way."""
        other = copy.copy(self)
        other.adapter, other.make = adapter, make
        other._pairs, other._passes = {}, None
        return other

    def images(self) -> Images | None:
        """Our and upstream's preprocessing; None where the case has none.

        Raises:
            PluginError: the case returns something else, or the reference does; also later, when it is called.
        """
        case, name = self.case, f"images of the case {self.case.name!r}"
        if case.images is None:
            return None
        with blaming(case.images, name):
            ours, theirs = returned(name, case.images(self.base), Images)

        def reference(image: Any) -> Tensor:
            with blaming(theirs, f"the reference of {name}"):
                x = returned(f"the reference of {name}", theirs(image), Tensor)
            if x.ndim != 3:
                raise PluginError(f"The reference of {name} returned {list(x.shape)}; expected [channel height width].")
            return x

        return Images(returned(name, ours, ImagePreprocess), reference)

    def generator(self, offset: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + offset)

    @property
    def form(self) -> Literal["canonical", "mapped"]:
        """``mapped``: the model has no canonical form, and upstream's own module is hooked at the places of a map."""
        return "mapped" if isinstance(self.adapter, MapAdapter) else "canonical"

    # ---------------------------------------------------------------- both sides

    def upstream(self, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> nn.Module:
        """Copy upstream; the caller may change the copy."""
        return copy_module(self.base).to(device=device or self.device, dtype=dtype)

    def pair(self, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> Pair:
        """Both sides, shared by all checks: leave them as they are."""
        key = (dtype, device or self.device)
        if key not in self._pairs:
            upstream = self.upstream(*key)
            self._pairs[key] = Pair(upstream, self.make(self.adapter, upstream))
        return self._pairs[key]

    def free(self) -> None:
        """Drop what was built, so that its memory is free."""
        self._pairs, self._passes = {}, None

    def precisions(self) -> Iterator[tuple[torch.dtype, torch.device]]:
        """Yield the dtypes, besides float64, and devices in which logits are compared."""
        # float64 on a second device is the same proof again. Half precision on a CPU is slow, so only on request.
        for device in (self.device, *([self.second_device] if self.second_device is not None else [])):
            usual = (torch.float32, *(HALF if device.type == "cuda" else ()))
            yield from ((dtype, device) for dtype in self.dtypes or usual)

    def fresh_model(self) -> ZooModel:
        """Make a hooked model in float64 that the caller may change, for passes over one input.

        An opaque stem runs once: it is upstream's own module, has no hook points inside, and may cost a hundred times
        more than the blocks.
        """
        model = self.make(self.adapter, self.upstream())
        for tower in opaque_stems(model):
            tower.embed.stem = Remembered(tower.embed.stem)
        return model

    @property
    def spec(self) -> AnySpec:
        return self.pair().model.spec

    def forward(self, upstream: nn.Module, *inputs: Tensor) -> Tensor:
        """Upstream's main output."""
        if self.case.forward is not None:
            name = f"forward of the case {self.case.name!r}"
            with blaming(self.case.forward, name):
                return returned(name, self.case.forward(upstream, *inputs), Tensor)
        if self.form == "mapped":  # its own output() reads the hooked model's output too, so it cannot be the reference
            result = upstream(*inputs)
            try:
                return Adapter.output(self.adapter, result)
            except PrismaError as problem:
                raise PrismaError(
                    f"Upstream returns {type(result).__name__}, and the adapter's output() reads what the hooked model "
                    "returns, so it cannot be its own reference. The case has to say where the main output is: "
                    f"Case({self.case.name!r}, ..., forward=lambda model, x: model(x)[...])."
                ) from problem
        with blaming(self.adapter):
            return returned(self.adapter.call, self.adapter.call(upstream, *inputs), Tensor)

    def table(self) -> HookMap:
        """The adapter's hook map."""
        reader = Reader(self.pair().upstream)
        with blaming(self.adapter):
            return returned(self.adapter.hooks, self.adapter.hooks(reader, self.spec), HookMap)

    def references(self) -> list[Reference]:
        """Places that hook points are compared with.

        A hooked upstream runs as upstream does, so its places are read from upstream as it is, and the insides of fused
        kernels, which it computes itself, at the places of ``reference_places`` inside ``unfused_attention``.
        """
        upstream, model = self.pair()
        points = [name for name, point in model.hook_points().items() if not point.derived]

        def reference(table: HookMap, scope: AbstractContextManager[None], inside: bool) -> Reference:
            rows = [row for row in table.bound(points) if inside or row.place.side not in INSIDE]
            return Reference(rows, dict(table.sizes), scope)

        if not isinstance(self.adapter, MapAdapter):
            return [reference(self.table(), unfused(self.adapter, upstream), inside=True)]
        with blaming(self.adapter):
            places = self.adapter.reference_places(Reader(upstream))
            places = returned(self.adapter.reference_places, places, HookMap)
        return [
            reference(self.table(), nullcontext(), inside=False),
            reference(places, unfused(self.adapter, upstream), inside=False),
        ]

    # ---------------------------------------------------------------- inputs and passes

    def sizes(self) -> list[Size]:
        """Sizes of input to try, the native one first."""
        return self.pair().model.sizes()

    def inputs(
        self,
        batch: int = 1,
        size: Size | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | None = None,
    ) -> Inputs:
        """Draw inputs, the same for the same arguments."""
        drawn = self.pair().model.sample_inputs(batch, size=size, generator=self.generator(1))
        # Drawn as float32 so that every dtype that can hold it sees the same input.
        return tuple(x.to(device or self.device, dtype if x.is_floating_point() else None) for x in drawn)

    def passes(self) -> Passes:
        """One pass of the hooked model in float64 over two inputs, with every activation but the derived ones."""
        if self._passes is None:
            model, inputs = self.pair().model, self.inputs(batch=2)
            with torch.no_grad():
                logits, cache = model.run_with_cache(*inputs)
            self._passes = Passes(inputs, logits, dict(cache.store))
        return self._passes

    def digest(self) -> str:
        """Digest of the spec without its sizes; where there is none, of the kinds of hook points."""
        model = self.pair().model
        return digest_of_spec(model.spec) if self.form == "canonical" else digest_of_points(model)


def opaque_stems(model: ZooModel) -> list[HookedViT]:
    """Towers whose stem is upstream's own module."""
    towers = [tower for tower in model.towers().values() if isinstance(tower, HookedViT)]
    return [tower for tower in towers if tower.spec.embed.stem == "opaque"]


class Remembered(nn.Module):
    """A module that runs once, and returns copies of that result from then on."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.result: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        result = self.result
        if result is None:
            with torch.no_grad():
                result = self.result = self.inner(x)
        return result.clone()


def differentiable(inputs: Inputs) -> Inputs:
    """Copy inputs, each with a gradient if it can have one."""
    return tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs)


def reader_of(subject: Subject) -> tuple[Reader, nn.Module]:
    """Return a reader that holds a record of everything the adapter reads, and the copy of upstream it reads."""
    upstream = subject.upstream()
    reader = Reader(upstream)
    read_adapter(subject.adapter, reader)
    return reader, upstream


__all__ = ["Inputs", "Make", "Pair", "Passes", "Reference", "Subject", "differentiable", "opaque_stems", "reader_of"]


@contextmanager
def unfused(adapter: Adapter, upstream: nn.Module) -> Generator[None]:
    """Enter an adapter's scope of unfused attention.

    Raises:
        PluginError: the adapter failed.
    """
    with ExitStack() as stack:
        with blaming(adapter):
            stack.enter_context(adapter.unfused_attention(upstream))
        yield
