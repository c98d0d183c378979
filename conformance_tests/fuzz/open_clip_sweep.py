"""A move of one field of open_clip's, judged: the numbers are open_clip's, or the model is refused or not built."""

from __future__ import annotations

import json
import logging
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from prisma_conformance import tolerances
from prisma_conformance.checks.tensors import fingerprint
from prisma_conformance.measure import worst
from torch import Tensor, nn

import prisma_core as prisma
from prisma_core.errors import UnsupportedArchitecture
from prisma_core.host import installed
from prisma_core.transformer import HookedDual
from prisma_core.zoo import tensors_of

from .open_clip_values import BASES, FACTORY, MOVED, PARTS, Config, Fields, configured, open_clip

# -------------------------------------------------------------------- one move


@contextmanager
def quiet() -> Iterator[None]:
    """open_clip warns that weights are random, and torch of scripting."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


@cache
def noise_for(name: str, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def drawn(model: nn.Module) -> nn.Module:
    """Return a model in float64, each parameter drawn by its name, so that two models share what they both have.

    What is a single number, or is not trained, keeps what it was made with, and noise is added.
    """
    model = model.double().eval()
    for name, parameter in model.named_parameters():
        noise = noise_for(name, parameter.shape)
        if parameter.numel() == 1 or not parameter.requires_grad:
            parameter.data.add_(0.2 * noise)
        elif parameter.ndim < 2:
            parameter.data.copy_(0.4 * noise + ("weight" in name or "gamma" in name))
        else:
            parameter.data.copy_(noise / parameter[0].numel() ** 0.5)
    return model


# What is built for half precision computes its norms in float32, and takes nothing wider: no tanh for erf comes near.
IN_FLOAT32 = 1e-5
Numbers = tuple[Tensor, Tensor, Tensor]


def theirs(upstream: Any, image: Tensor, tokens: Tensor) -> Numbers:
    """Return open_clip's own logits of images and of texts, and their similarities."""
    seen, read = upstream.encode_image(image, normalize=False), upstream.encode_text(tokens, normalize=False)
    alike = upstream.logit_scale.exp() * F.normalize(seen, dim=-1) @ F.normalize(read, dim=-1).T
    return seen, read, alike if upstream.logit_bias is None else alike + upstream.logit_bias


def sampled(model: HookedDual) -> tuple[Tensor, Tensor]:
    image, tokens = model.sample_inputs(3, generator=torch.Generator().manual_seed(1))
    return image.double(), tokens


class Verdict(NamedTuple):
    """The outcome of a move, the reason, and whether open_clip's model changed."""

    kind: str
    why: str = ""
    mattered: bool = True


class Base:
    """A model as it is, to compare with."""

    def __init__(self, upstream: nn.Module):
        self.upstream = drawn(upstream)
        self.model = prisma.adapt(self.upstream)
        assert isinstance(self.model, HookedDual)
        self.inputs = sampled(self.model)
        self.numbers = theirs(self.upstream, *self.inputs)

    def mattered(self, upstream: nn.Module) -> bool:
        """Return whether a model's numbers differ by more than rounding, or it cannot take the same inputs."""
        try:
            numbers = theirs(upstream, *self.inputs)
        except Exception:  # noqa: BLE001  # upstream's own, of any type
            return True
        pairs = list(zip(numbers, self.numbers, strict=True))
        return any(a.shape != b.shape or not worst(a, b) <= tolerances.FLOAT64 for a, b in pairs)

    def runs(self, upstream: Any) -> bool:
        """Return whether open_clip's model takes these inputs, or some of the sizes it says it has."""
        image, tokens = self.inputs
        height, width = _pair(getattr(upstream.visual, "image_size", image.shape[2:]))
        images = [image, torch.randn(3, 3, height, width, dtype=torch.float64)]
        for pixels, length in product(images, (tokens.shape[1], upstream.context_length)):
            try:
                numbers = theirs(upstream, pixels, tokens[:, :1].expand(-1, length))
            except Exception:  # noqa: BLE001
                continue
            return all(isinstance(one, Tensor) for one in numbers)
        return False

    def judge(self, make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> Verdict:
        """Build a model, run it, map it, compare."""
        try:
            upstream = drawn(make())
        except Exception as error:  # noqa: BLE001
            return Verdict("not built", f"{type(error).__name__}: {error}")
        mattered = self.mattered(upstream)
        if not mattered and same(upstream, self.upstream):
            return Verdict("same", mattered=False)
        try:
            return self.compared(upstream.to(dtype), mattered)
        except Exception as error:  # noqa: BLE001
            return Verdict("defect", f"{type(error).__name__}: {error}")

    def compared(self, upstream: Any, mattered: bool) -> Verdict:
        try:
            model = prisma.adapt(upstream)
        except UnsupportedArchitecture as refused:
            return Verdict("refused", refused.feature, mattered) if self.runs(upstream) else Verdict("not run")
        assert isinstance(model, HookedDual)
        image, tokens = sampled(model)
        image = image.to(upstream.logit_scale.dtype)
        try:
            expected = theirs(upstream, image, tokens)
        except Exception as error:
            if self.runs(upstream):
                raise
            return Verdict("not run", f"{type(error).__name__}: {error}")
        ours = (model.vision(image), model.text(tokens), model(image, tokens))
        called = installed().adapter(upstream).call(upstream, image, tokens)  # by its own forward
        error = max(worst(a, b) for a, b in zip((*ours, called), (*expected, expected[2]), strict=True))
        if error <= (tolerances.FLOAT64 if image.dtype == torch.float64 else IN_FLOAT32):
            return Verdict("agrees", "", mattered)
        return Verdict("defect", f"off by {error:.1e} of std", mattered)


def _pair(side: Any) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else tuple(side)


def same(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two models were built alike: the same modules, with the same facts and tensors."""
    if repr(one) != repr(other) or fingerprint(one) != fingerprint(other):
        return False
    tensors, others = tensors_of(one), tensors_of(other)
    return all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


# -------------------------------------------------------------------- the sweep


def values(table: Fields) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, others in table.items() for value in others)


def judged(base: str, berts: Path) -> Iterator[tuple[str, Verdict]]:
    """Yield the verdict of each move, by part, field and value."""
    kind = BASES[base][0]
    start = Base(kind(**configured(base, berts)))
    for part, table in (PARTS[key] for key in MOVED[base]):
        for name, value in values(table):
            half = isinstance(value, torch.dtype)
            make = partial(kind, **configured(base, berts, part, name, value))
            yield f"{part}.{name}={value}", start.judge(make, torch.float32 if half else torch.float64)


def created(folder: Path, config: Config, **options: Any) -> nn.Module:
    """Build the model of a configuration in a folder by open_clip's factory."""
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False, **options)


def judged_factory(base: str, folder: Path) -> Iterator[tuple[str, Verdict]]:
    config = configured(base, folder)
    start = Base(created(folder, config))
    for name, value in values(FACTORY):
        moved = {name: value}
        inside = name == "custom_text"  # a field of the configuration; the others are options
        make = partial(created, folder, config | moved) if inside else partial(created, folder, config, **moved)
        yield f"{name}={value}", start.judge(make, torch.float32 if name == "precision" else torch.float64)
