"""Readouts: the directions in a model's output that classes, texts, images or vectors of one's own mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from prisma_core import (
    ActivationCache,
    HookedDual,
    HookedModel,
    HookedText,
    HookedViT,
    InputError,
    NotApplicable,
)
from prisma_core.plugin import BriefRepr, checked, positions_of, several, shown, whole
from prisma_lens.inputs import as_input
from prisma_lens.metrics import class_of

Target: TypeAlias = Any
"""A class (index or label), a text, an image, several of one kind, or directions ``[class out]``."""
TowerName: TypeAlias = Literal["vision", "text"]


@dataclass(frozen=True, repr=False)
class Readout(BriefRepr):
    """Directions in a model's output, and what is added to what lies along them.

    Attributes:
        vectors: ``[class out]``.
        labels: a name for each.
        bias: what a reading has besides the output, ``[class]``: the bias of a dual encoder's logits.
        unit_length: the output is divided by its length first, as a dual encoder does.
    """

    vectors: Tensor
    labels: tuple[str, ...]
    bias: Tensor
    unit_length: bool = False

    def __call__(self, outputs: Tensor) -> Tensor:
        """Return what lies along the directions: ``[... out] -> [... class]``."""
        if self.unit_length:
            outputs = outputs / outputs.norm(dim=-1, keepdim=True)
        return outputs @ self.vectors.to(outputs).T + self.bias.to(outputs)


@checked
def readout(
    model: HookedModel,
    target: Target,
    against: Target | None = None,
    *,
    tower: TowerName = "vision",
    labels: Sequence[str] | None = None,
) -> Readout:
    """Return the readout that a target means for a model.

    >>> import prisma_core as prisma
    >>> model = prisma.load("toy:scenes-3l")
    >>> readout(model, "ladybird", against=3).vectors.shape
    torch.Size([1, 12])

    Args:
        model: a classifier, a tower, or a dual encoder.
        target: of a classifier a class, as index or label, or several; of a dual encoder's vision tower a text or
            several, of its text tower images; of any model directions in its output, as floating point numbers
            ``[out]`` or ``[class out]``.
        against: what is subtracted: one, or one for each target.
        tower: of a dual encoder, whose output is read.
        labels: names of the directions.

    Raises:
        UnknownName: no such class.
        NotApplicable: the model has no head, or no labels.
        InputError: the target does not fit the model.
    """
    with torch.no_grad():
        one = _one(model, target, tower)
        if against is not None:
            less = _one(model, against, tower)
            if len(less.vectors) not in (1, len(one.vectors)):
                raise InputError(
                    f"Expected one to subtract, or one for each of {len(one.vectors)}, got {len(less.vectors)}."
                )
            names = less.labels if len(less.labels) == len(one.labels) else less.labels * len(one.labels)
            pairs = tuple(f"{more} - {minus}" for more, minus in zip(one.labels, names, strict=True))
            if not (one.vectors != less.vectors).any():
                raise InputError(f"Expected another target to subtract, got the same: {', '.join(pairs)} is 0.")
            one = replace(one, vectors=one.vectors - less.vectors, bias=one.bias - less.bias, labels=pairs)
    if labels is None:
        return one
    if len(labels) != len(one.labels):
        raise InputError(
            f"There are {len(one.labels)} directions and {len(labels)} labels, {shown(labels)}: give one for each."
        )
    return replace(one, labels=tuple(labels))


def _one(model: HookedModel, target: Target, tower: TowerName) -> Readout:
    own: Any = tower_of(model, tower)
    n = own.spec.n_classes or (own.spec.d_pool if isinstance(own, HookedViT) else own.spec.d_model)
    like = next(own.parameters())
    if isinstance(target, Tensor) and target.is_floating_point() and target.ndim <= 2:
        rows = target[None] if target.ndim == 1 else target
        if rows.ndim != 2 or rows.shape[-1] != n:
            raise InputError(f"Expected directions [class {n}] in the model's output, got shape {list(target.shape)}.")
        return Readout(rows.to(like), _counted("direction", len(rows)), like.new_zeros(len(rows)))
    if isinstance(model, HookedDual):
        return _pair(model, target, tower)
    one = isinstance(target, str) or whole(target) is not None
    targets = [target] if one else several(target, "classes (indices or labels), or directions [class out]")
    if own.spec.n_classes is None:
        raise NotApplicable(
            f"This model has no head, so there are no classes: give target= as directions in its output, floating "
            f"point numbers [class {n}], such as the weights of a classifier of yours."
        )
    at = [class_of(own, each) for each in targets]
    names = own.labels or ()
    labels = tuple(names[each] if names else str(each) for each in at)
    rows = like.new_zeros(len(at), n)
    rows[torch.arange(len(at)), torch.tensor(at)] = 1
    return Readout(rows, labels, like.new_zeros(len(at)))


def _pair(model: HookedDual, target: Target, tower: TowerName) -> Readout:
    texts = [target] if isinstance(target, str) else target
    if tower == "vision":
        words = isinstance(texts, list | tuple) and texts and all(isinstance(each, str) for each in texts)
        if not words and not isinstance(texts, Tensor):
            raise InputError(f"A dual encoder has no classes: expected a text, or texts, got {shown(target)}.")
        embeds = model.encode_text(texts, normalize=True)
        labels = _counted("text", len(embeds)) if isinstance(texts, Tensor) else tuple(texts)
    else:
        embeds = model.encode_image(as_input(model.vision, target), normalize=True)
        labels = _counted("image", len(embeds))
    bias = model.logit_bias if model.spec.logit_bias else embeds.new_zeros(())
    return Readout(embeds * model.logit_scale.exp(), labels, bias.expand(len(embeds)), unit_length=True)


def _counted(what: str, n: int) -> tuple[str, ...]:
    return tuple(f"{what} {at}" for at in range(n))


def token_outputs(model: HookedViT | HookedText, stream: Tensor) -> Tensor:
    """Return the output ``[... out]`` of every token of a residual stream ``[... d_model]``, each taken alone.

    Raises:
        NotApplicable: the model has one head for each of several tokens, blocks that norm the stream, or a scope is
            open behind it.
    """
    names = [*model.hook_points()]
    refuse_open(
        model, names[names.index(f"blocks.{len(model.blocks) - 1}.hook_resid_post") + 1 :], "a lens reads there"
    )
    if isinstance(model, HookedViT) and model.spec.n_heads_out > 1:
        raise NotApplicable(
            f"This model reads {model.spec.n_heads_out} tokens with a head each and averages their logits; a lens "
            "needs one head. Its streams are in the cache all the same."
        )
    if any(block.kind == "post" for block in model.spec.blocks):
        raise NotApplicable(
            "This model's blocks norm the stream itself (post-norm, as BERT does), so a stream inside is not what its "
            "head could read. Its streams are in the cache all the same."
        )
    x, like = stream.reshape(-1, 1, stream.shape[-1]), model.input_like
    x = x.to(like if all(x.dtype != each.dtype for each in model.parameters()) else like.device)  # caches may be cast
    if model.spec.ln_final is not None:
        x = model.ln_final(x)
    x = model.ln_pool(x[:, 0] if isinstance(model, HookedText) else model.pool(x, 0))
    if model.spec.n_classes is not None:
        x = model.head_mlp(x) if isinstance(model, HookedText) and model.spec.head else model.head(x)
    return x.reshape(*stream.shape[:-1], x.shape[-1])


# -------------------------------------------------------------------- the tower that is read, and its cache


def tower_of(model: HookedModel, tower: TowerName) -> HookedViT | HookedText:
    """Return the transformer that is read: a tower of a dual encoder, or the model itself.

    Raises:
        InputError: no such tower.
        NotApplicable: the model has no canonical form.
    """
    if isinstance(model, HookedDual):
        if tower not in ("vision", "text"):
            raise InputError(f"Expected tower='vision' or 'text', got {tower!r}.")
        return model.vision if tower == "vision" else model.text
    if tower == "text" and isinstance(model, HookedViT):
        raise InputError("This model has one tower, which sees images: leave tower= out.")
    if not isinstance(model, HookedViT | HookedText):
        raise NotApplicable(
            f"Lenses and attribution need a canonical form, and this model ({type(model).__name__}) has none. Patches, "
            "gradients and attention patterns work on it all the same."
        )
    return model


def refuse_open(model: HookedModel, names: Iterable[str], why: str) -> None:
    """Refuse scopes that are open at hook points where a technique computes outside of the model's pass.

    Raises:
        NotApplicable: with the hook point.
    """
    points = model.hook_points()
    if name := next((name for name in names if points[name].wanted), None):
        raise NotApplicable(
            f"A scope is open at {name}, and {why} outside of the pass: close it, or hook another place."
        )


def refuse_with_probe(**options: object) -> None:
    """Refuse options that a probe, which reads along its own directions, has no use for.

    Raises:
        InputError: one is given.
    """
    for name, value in options.items():
        if value is not None:
            raise InputError(f"A probe reads along its own directions: leave {name}= out, got {shown(value)}.")


def gives_every_token(own: HookedViT | HookedText) -> bool:
    """Return whether a model's output has an axis of tokens."""
    return own.spec.pool.kind in ("none", "patches")


def first_given_out(own: HookedViT | HookedText) -> int:
    """Return the position of the first token that a model which gives out every token, or every patch, gives out."""
    return own.spec.layout.n_prefix if isinstance(own, HookedViT) and own.spec.pool.kind == "patches" else 0


def check_pooled(own: HookedViT | HookedText, what: str, pos: int | str | None) -> None:
    """Refuse a model that gives out every token where none is chosen, and a choice where there is none.

    Raises:
        NotApplicable: with what there is no one of.
        InputError: the model pools its tokens, and one is chosen.
    """
    if pos is None and gives_every_token(own):
        raise NotApplicable(
            f"This model reads every token by itself, so there is no one {what}: give pos=, the token whose output is "
            "read."
        )
    if pos is not None and not gives_every_token(own):
        raise InputError(f"This model gives out one vector, not one for each token: leave pos={pos!r} out.")


def token_read(own: HookedViT | HookedText, cache: Any, pos: int | str | None) -> int | None:
    """Return the place in the output of the token that is read, None if none is chosen.

    Args:
        own: the tower.
        cache: of it.
        pos: a position in the stream, or a subset of the layout that has one token.

    Raises:
        InputError: there is no such token, there are several, or the model does not give it out.
        UnknownName: there is no such subset.
    """
    if pos is None:
        return None
    if isinstance(pos, str) and cache.layout is None:
        raise InputError(f"This model has no token layout, so pos={pos!r} means nothing; give a position.")
    places = positions_of(cache.layout.slice(pos) if isinstance(pos, str) else pos, cache["attn_out", -1].shape[1])
    first = first_given_out(own)
    if len(places) != 1 or places[0] < first:
        raise InputError(f"Expected pos= one token that the model gives out, from {first} on; got {pos!r}, {places}.")
    return places[0] - first


def at_token(outputs: Tensor, token: int | None) -> Tensor:
    """Return the outputs ``[... token out]`` of one token, all if it is None; one that is the same for all is kept."""
    return outputs if token is None else outputs[..., token if outputs.shape[-2] > 1 else 0, :]


def cache_of(
    model: HookedModel, given: Any, names: Callable[[HookedViT | HookedText], list[str]], tower: TowerName = "vision"
) -> Any:
    """Return the cache of the tower that is read: of inputs, or the one that is given.

    Args:
        model: the model.
        given: inputs of the tower (images, texts or tokens), or a cache of the model.
        names: of a tower, the hook points that are needed.
        tower: of a dual encoder, which.

    Raises:
        InputError: the cache is another model's.
    """
    own = tower_of(model, tower)
    if not isinstance(given, ActivationCache):
        with torch.no_grad():
            return own.run_with_cache(as_input(own, given), names=names(own), output=False)[1]
    cache: Any = given.tower(tower) if isinstance(model, HookedDual) and given.model is model else given
    if cache.model is not None and cache.model is not own:
        raise InputError(
            "This cache is of another model: expected one that run_with_cache of this very model returned."
        )
    return cache


def token_labels(cache: Any, n: int) -> dict[str, tuple[str, ...]]:
    """Return ``{"pos": names}`` of the tokens that a cache holds, or nothing where they have none."""
    places = cache.positions()
    if cache.layout is None or places is None or len(places) != n:
        return {}
    names = cache.layout.token_names()
    return {"pos": tuple(names[place] for place in places)}
