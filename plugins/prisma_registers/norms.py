"""High-norm outlier tokens by layer, and attention to parts of the layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, TypeAlias, cast

import torch
from jaxtyping import Bool, Float
from rich.progress import track
from torch import Tensor

from prisma_core import HookedDual, HookedViT, InputError, NotApplicable, TokenLayout, attentions
from prisma_core.plugin import BriefRepr, Count, checked, positions_of, shown, widened

Tokens: TypeAlias = str | int | Sequence[int] | Tensor
FACTOR = 3.0
"""Default threshold of an outlier, in median norms of its layer's patches."""


class LayerNorms(NamedTuple):
    """One layer of a study.

    Attributes:
        layer: counted from 0.
        median, largest: norms of patches.
        outliers: the share of patches that are outliers.
        positions: names of the tokens that are outliers in most of the images.
    """

    layer: int
    median: float
    largest: float
    outliers: float
    positions: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class TokenNorms(BriefRepr):
    """Norms of the residual stream after every block.

    Attributes:
        norms: ``[layer batch pos]``.
        layout: which token is where.
    """

    norms: Float[Tensor, "layer batch pos"]
    layout: TokenLayout

    @checked
    def outliers(self, *, cutoff: float | None = None, factor: float | None = None) -> Bool[Tensor, "layer batch pos"]:
        """Return which tokens are outliers.

        Args:
            cutoff: the norm above which a token is one, the same in every layer (Darcet et al. take 150 for DINOv2).
            factor: instead of a cutoff: how many times the median norm of the layer's patches; 3 if nothing is given.

        Raises:
            InputError: both are given, or one is not above 0.

        Source: "Vision transformers need registers" (Darcet et al. 2024), section 2.1, for the cutoff.
        """
        check_outliers(cutoff, factor)
        if cutoff is not None:
            return self.norms > cutoff
        patches = self.norms[..., self.layout.slice("patches")]
        return self.norms > (FACTOR if factor is None else factor) * patches.flatten(1).median(-1).values[:, None, None]

    @checked
    def first_layer(self, *, cutoff: float | None = None, factor: float | None = None) -> int | None:
        """Return the first layer at which a patch is an outlier, or None."""
        outliers = self.outliers(cutoff=cutoff, factor=factor)[..., self.layout.slice("patches")].flatten(1).any(-1)
        return int(outliers.int().argmax()) if bool(outliers.any()) else None

    @checked
    def by_layer(self, *, cutoff: float | None = None, factor: float | None = None) -> list[LayerNorms]:
        """Return one row a layer."""
        outliers = self.outliers(cutoff=cutoff, factor=factor)
        names, patches = self.layout.token_names(), self.layout.slice("patches")
        rows: list[LayerNorms] = []
        for layer, (norms, outlying) in enumerate(zip(self.norms, outliers, strict=True)):
            often = outlying.float().mean(0) > 0.5
            rows.append(
                LayerNorms(
                    layer,
                    float(norms[:, patches].median()),
                    float(norms[:, patches].max()),
                    float(outlying[:, patches].float().mean()),
                    tuple(name for name, is_one in zip(names, often.tolist(), strict=True) if is_one),
                )
            )
        return rows


@checked
@torch.no_grad()
def token_norms(
    model: HookedViT,
    images: Float[Tensor, "batch channel height width"],
    *,
    batch_size: Count = 32,
    progress: bool = False,
) -> TokenNorms:
    """Return the norm of every token in the residual stream after every block.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-reg")
    >>> token_norms(model, torch.rand(2, 3, 96, 96)).by_layer()[-1].layer
    2

    Args:
        model: any hooked vision transformer.
        images: ``[batch channel height width]``.
        batch_size: how many to run at once.
        progress: show a bar.

    Raises:
        InputError: there is no image, or no tensor of images.
        NotApplicable: the model is no vision transformer in canonical form.
    """
    check_vit(model)
    check_images(images)
    norms: list[Tensor] = []
    for part in _batches(images, batch_size, progress, "norms"):
        _, cache = model.run_with_cache(part, names="resid_post", output=False)
        streams = (widened(cache["resid_post", layer]) for layer in range(len(model.blocks)))
        norms.append(torch.stack([stream.norm(dim=-1) for stream in streams]))
    return TokenNorms(torch.cat(norms, dim=1), model.layout_for(images))


@checked
@torch.no_grad()
def attention_to(
    model: HookedViT,
    images: Float[Tensor, "batch channel height width"],
    keys: Tokens = "registers",
    *,
    queries: Tokens = "patches",
    per_image: bool = False,
    batch_size: Count = 8,
    progress: bool = False,
) -> Float[Tensor, "layer head *batch"]:
    """Return how much of their attention some tokens give to others, for each head: ``[layer head]``, from 0 to 1.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-reg")
    >>> attention_to(model, torch.rand(2, 3, 96, 96), "registers").shape
    torch.Size([3, 4])

    Args:
        model: any hooked vision transformer whose layers have as many heads; those of attentions side by side follow
            each other.
        images: ``[batch channel height width]``.
        keys, queries: a subset of the layout (cls, distillation, registers, prefix, patches or all), or positions, such
            as those of outliers, or a mask of them.
        per_image: return each image's own values, ``[layer head batch]``, instead of their mean.
        batch_size: how many images to run at once.
        progress: show a bar.

    Raises:
        UnknownName: there is no such subset.
        InputError: there is no such position, or no image.
        NotApplicable: the model has no token of that kind, its layers differ in their number of heads, or it is no
            vision transformer in canonical form.
    """
    check_vit(model)
    check_images(images)
    layout = model.layout_for(images)
    to, of = _positions(layout, keys), _positions(layout, queries)
    names = [
        [f"blocks.{layer}.{one.name}.hook_pattern" for one in attentions(block)]
        for layer, block in enumerate(model.layers())
    ]
    if len({block.n_parallel * block.attn.n_heads for block in model.spec.blocks}) > 1:
        raise NotApplicable("The layers differ in their number of heads, so there is no [layer head] to return.")
    found: list[Tensor] = []
    for part in _batches(images, batch_size, progress, "attention"):
        _, cache = model.run_with_cache(part, names=list(chain(*names)), output=False)
        patterns = [torch.cat([cache[name] for name in layer], 1) for layer in names]
        found.append(torch.stack([pattern[:, :, of][..., to].sum(-1).mean(-1).T for pattern in patterns]))
    shares = torch.cat(found, dim=-1)
    return shares if per_image else shares.mean(-1)


def _positions(layout: TokenLayout, tokens: Tokens) -> list[int]:
    if tokens is None:
        raise InputError("Expected a subset of the tokens such as 'registers', or positions; got None.")
    if isinstance(tokens, str):
        positions = list(range(layout.n_tokens)[layout.slice(tokens)])
        if not positions:
            raise NotApplicable(f"This model has no tokens of the kind {tokens!r}.")
        return positions
    try:
        return list(dict.fromkeys(positions_of(tokens, layout.n_tokens)))
    except InputError as error:
        raise InputError(
            f"Expected a subset of the tokens such as 'registers', or positions; got {shown(tokens)}. {error}"
        ) from error


def check_outliers(cutoff: float | None, factor: float | None) -> None:
    """Refuse what says nothing of norms.

    Raises:
        InputError: cutoff and factor are both given, or one is not above 0.
    """
    if cutoff is not None and factor is not None:
        raise InputError(
            f"Expected a cutoff or a factor, got both (cutoff={cutoff}, factor={factor}): a cutoff is a norm, a factor "
            "counts medians of norms."
        )
    for name, value in (("cutoff", cutoff), ("factor", factor)):
        number = cast("object", value)
        if number is not None and (not isinstance(number, int | float) or not number > 0):
            raise InputError(f"Expected a {name} above 0, for norms are; got {number!r}.")


def check_images(images: object) -> None:
    """Refuse what is no batch of images.

    Raises:
        InputError: it says what makes one.
    """
    if not isinstance(images, Tensor):
        raise InputError(
            f"Expected images as a tensor [batch channel height width], got {type(images).__name__}. "
            "model.preprocess makes one of images and paths."
        )
    if not images.ndim or not len(images):
        raise InputError(f"Expected at least one image [batch channel height width], got {shown(images)}.")


def check_vit(model: object) -> None:
    """Refuse models that have no tokens in a known place.

    Raises:
        NotApplicable: it says what to take instead.
    """
    if isinstance(model, HookedViT):
        return
    if isinstance(model, HookedDual):
        raise NotApplicable(
            "This model is a pair of towers; registers are the vision tower's: give model.vision, such as "
            "token_norms(model.vision, images)."
        )
    raise NotApplicable(
        f"Registers and token norms need a vision transformer in canonical form, whose layers share one stream of "
        f"tokens; this is a {type(model).__name__}. What it computes is in its cache: run_with_cache."
    )


def _batches(images: Tensor, batch_size: Count, progress: bool, what: str) -> Iterator[Tensor]:
    yield from track(images.split(batch_size), what, disable=not progress, transient=True)
