"""Sections of masked autoencoders: what hidden patches are filled in with, by layer and along training.

The head of a canonical model must make the pixels of each patch from the patch's own token, in the order of torch's
``PixelShuffle``: channel, row, column. Hidden patches are zero in its input: the mean colour. A hooked upstream whose
``spec.pixels`` says that its output is pixels hides patches itself, and its own decoder fills them in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from prisma_lens import logit_lens
from torch import Tensor

import prisma_core as prisma
from prisma_core import HookedViT, NotApplicable, Result
from prisma_core.plugin import installed, layer_of, taking_gradients
from prisma_view.figures import plot
from prisma_view.images import data_uri
from prisma_view.panels import Section, Subject, enlarged, spread
from prisma_view.words import stage_name

SHARE = 0.6
"""Share of patches that are hidden."""
MOST = 6
FIRST = "blocks.0.hook_resid_post"


def by_layer(subject: Subject) -> Section:
    """Show what the head, or the model's own decoder, makes of the stream after each layer.

    Raises:
        NotApplicable: the model's head does not make pixels.
    """
    if getattr(subject.model.spec, "pixels", None) is not None:
        return _by_decoder(subject)
    hidden = _hidden(subject)
    lens = logit_lens(subject.model, subject.x.masked_fill(hidden, 0)).sel(batch=0)
    made = [_filled(subject, hidden, reading) for reading in lens.values]
    names = [stage_name(stage) for stage in lens.stages]
    words = (
        f"{SHARE:.0%} of the patches are hidden, and the head fills them in from the stream after each layer. "
        "The error is of hidden pixels."
    )
    return _section("Reconstruction by layer", words, subject, hidden, made, names, "layer")


def _by_decoder(subject: Subject) -> Section:
    """Show what upstream's own decoder makes of the stream after each layer, which stands in for the last layer's."""
    model, points = subject.model, subject.model.hook_points()
    hidden, made, names = _unseen(subject), [], []
    for part in (first.removesuffix(FIRST) for first in points if first.endswith(FIRST)):
        layers = [name for name in points if re.fullmatch(rf"{re.escape(part)}blocks\.\d+\.hook_resid_post", name)]
        with torch.no_grad(), _same_draw():
            _, cache = model.run_with_cache(subject.x, names=layers)
        for name in spread(layers, MOST):
            with torch.no_grad(), _same_draw(), model.hooks({layers[-1]: _put(cache[name])}):
                made.append(torch.where(hidden, _joined(subject, model(subject.x)), subject.x))
            names.append(f"{part.rstrip('.') or 'encoder'} {layer_of(name)}")
    words = (
        f"The model hides {hidden.float().mean():.0%} of the image, and its own decoder fills that in: from the "
        "encoder's stream after each layer, and from its own stream after each layer. The error is of hidden pixels."
    )
    return _section("Reconstruction by layer", words, subject, hidden, made, names, "layer")


def _put(stream: Tensor) -> Callable[[Tensor, Any], Tensor]:
    return lambda _, at: stream


def _unseen(subject: Subject) -> Tensor:
    """Return which pixels no output depends on, ``[1 1 height width]``: those of the patches that the model hides."""
    with taking_gradients(), _same_draw():
        x = subject.x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(subject.model(x).float().square().sum(), x)
    height, width = subject.model.spec.pixels
    seen = torch.nn.functional.max_pool2d((gradient != 0).any(1, keepdim=True).float(), (height, width))
    return (seen == 0).repeat_interleave(height, 2).repeat_interleave(width, 3)


@contextmanager
def _same_draw() -> Iterator[None]:
    """Let a model that hides patches at random hide the same ones each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _joined(subject: Subject, pixels: Tensor) -> Tensor:
    """Return pixels of patches ``[1 patch pixel]`` as an image."""
    height, width = subject.model.spec.pixels
    return rearrange(
        pixels, "1 (row column) (h w c) -> 1 c (row h) (column w)", row=subject.x.shape[-2] // height, h=height, w=width
    )


def by_checkpoint(subject: Subject) -> Section:
    """Show what checkpoints along the training of the model make of the same hidden patches.

    Raises:
        NotApplicable: the model's head does not make pixels, or the model comes with no checkpoints.
    """
    hidden = _hidden(subject)
    references = checkpoints(subject.model)
    if len(references) < 2:
        raise NotApplicable("This model comes with no checkpoints along its training.")
    steps = spread([str(step) for step in references], MOST)
    masked, made = subject.x.masked_fill(hidden, 0), []
    with torch.no_grad():
        for step in steps:
            made.append(_filled(subject, hidden, prisma.load(references[int(step)]).to(masked)(masked)[0]))
    words = "The same hidden patches, filled in at checkpoints along training; the last one is the model itself."
    names = [f"step {step}" for step in steps]
    return _section("Reconstruction along training", words, subject, hidden, made, names, "checkpoint")


def checkpoints(model: Any) -> dict[int, str]:
    """Return references of the checkpoints that come with a model, by step; none where its source knows none."""
    source, _, rest = (model.reference or "").partition(":")
    sources = installed().sources()
    return sources[source].checkpoints(rest) if source in sources else {}


def _hidden(subject: Subject) -> Tensor:
    """Return which pixels are hidden, the same at each call: ``[1 1 height width]``.

    Raises:
        NotApplicable: the model's head does not make pixels.
    """
    model, layout = subject.model, subject.layout
    if not isinstance(model, HookedViT) or layout is None or model.labels or model.spec.n_frames is not None:
        raise NotApplicable("This model's head does not make the pixels of an image's patches.")
    patch, pool = model.spec.embed.patch, model.spec.pool.kind
    pixels = model.spec.n_channels * math.prod(patch)
    if pool != "patches" or model.spec.n_classes != pixels:
        raise NotApplicable(f"This model's head does not make the {pixels} pixels of each patch.")
    order = torch.rand(layout.n_patches, generator=torch.Generator().manual_seed(0)).argsort()
    grid = (order < round(SHARE * layout.n_patches)).view(1, 1, layout.rows, layout.columns)
    return grid.repeat_interleave(patch[0], 2).repeat_interleave(patch[1], 3).to(subject.x.device)


def _filled(subject: Subject, hidden: Tensor, made: Tensor) -> Tensor:
    """Return the input with its hidden pixels from the head's output ``[pos pixel]``."""
    rows = subject.layout.grid(made, axis=0)
    height, width = subject.model.spec.embed.patch
    image = rearrange(rows, "row column (c h w) -> c (row h) (column w)", h=height, w=width)
    return torch.where(hidden, image, subject.x)


def _section(
    title: str, words: str, subject: Subject, hidden: Tensor, made: list[Tensor], names: list[str], axis: str
) -> Section:
    true = _pixels(subject, subject.x)
    drawn = [_pixels(subject, each) for each in made]
    error = torch.stack([((each - true) ** 2).mean(1)[hidden[:, 0]].mean() for each in drawn])
    result = Result(
        error, (axis,), {axis: tuple(names)}, technique="error of hidden pixels",
        unit="mean squared error (pixels in 0..1)",
    )  # fmt: skip
    masked = _pixels(subject, subject.x.masked_fill(hidden, 0))
    shown = [("what the model sees", masked), *zip(names, drawn, strict=True), ("the image", true)]
    images = tuple((data_uri(enlarged(pixels[0].movedim(0, -1))), name) for name, pixels in shown)
    return Section(title, words, (plot(result, kind="curves"),), images)


def _pixels(subject: Subject, x: Tensor) -> Tensor:
    """Return pixels in 0..1, red first."""
    preprocess = subject.model.preprocess
    return (preprocess.denormalise(x.float()) if preprocess else x.float()).clamp(0, 1).cpu()
