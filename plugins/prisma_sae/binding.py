"""The bond of a coder to a model: reference or weights, place, tokens; errors say what differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from prisma_core import HookedModel, InputError, TokenLayout, UnknownName, tensors_of
from prisma_core.plugin import LayerQuery, behaviour_of, digest, several, shown
from prisma_sae.coder import CoderFacts, SparseCoder, Tokens

Coders: TypeAlias = SparseCoder | Sequence[SparseCoder] | Mapping[str | LayerQuery, SparseCoder]


def placed(model: HookedModel, coders: Coders) -> dict[str, SparseCoder]:
    """Return coders by the full name of the hook point that each writes.

    Args:
        model: the model.
        coders: by hook point; or one or several that know their own.

    Raises:
        InputError: there is no coder, one does not know its place, or two have the same.
        UnknownName: no such hook point.
    """
    if isinstance(coders, Mapping):
        pairs = [(_one(model, query), _coder(coder, "sparse coders by hook point")) for query, coder in coders.items()]
    else:
        expected = "a sparse coder, several, or coders by hook point"
        each = [coders] if isinstance(coders, SparseCoder) else several(coders, expected)
        pairs = [(_own_place(model, _coder(coder, expected)), coder) for coder in each]
    if not pairs:
        raise InputError(f"Expected at least one sparse coder, got {shown(coders)}.")
    by_name = dict(pairs)
    if len(by_name) < len(pairs):
        raise InputError(f"Two coders at {pairs[0][0]}: one place takes one.")
    return by_name


def _coder(value: object, expected: str) -> SparseCoder:
    if not isinstance(value, SparseCoder):
        raise InputError(f"Expected {expected}, got {shown(value)}.")
    return value


def _own_place(model: HookedModel, coder: SparseCoder) -> str:
    hook = coder.facts.hook_out or coder.facts.hook
    if hook is None:
        raise InputError("This coder does not say where it belongs: give {'blocks.5.hook_resid_post': coder}.")
    try:
        return find(model, hook)
    except UnknownName as error:
        if differences := _models(model, coder):  # then its place is the lesser trouble
            raise InputError(f"This coder does not belong here: {'; '.join(differences)}. {error}") from error
        raise


def find(model: HookedModel, hook: str) -> str:
    """Return a hook point's full name in a model: of a pair of towers, in the vision tower.

    Raises:
        UnknownName: there is none.
    """
    points = model.hook_points()
    return f"vision.{hook}" if hook not in points and f"vision.{hook}" in points else _one(model, hook)


def _one(model: HookedModel, query: str | LayerQuery) -> str:
    names = model.resolve([query])
    if len(names) != 1:
        raise UnknownName(f"{query!r} is {len(names)} hook points: name one, such as {names[0]!r}.")
    return names[0]


def check(model: HookedModel, coder: SparseCoder, name: str, tokens: Tokens | None) -> None:
    """Refuse to attach a coder where it was not trained.

    Args:
        model: the model.
        coder: the coder.
        name: the hook point that it is to write.
        tokens: the tokens that it is to run on; None for its own.

    Raises:
        InputError: with all that differs.
    """
    facts = coder.facts
    differences = _models(model, coder)
    trained = facts.hook_out or facts.hook
    if trained is not None and name not in (trained, f"vision.{trained}"):
        differences.append(f"it was trained at {trained}, and this is {name}")
    if tokens is not None and facts.tokens is not None and tokens != facts.tokens:
        differences.append(f"it was trained on the tokens {facts.tokens!r}, and is asked to run on {tokens!r}")
    if differences:
        raise InputError(
            f"This coder does not belong here: {'; '.join(differences)}. It computes numbers all the same: "
            "force=True if that is what you mean."
        )


def _models(model: HookedModel, coder: SparseCoder) -> list[str]:
    reference = getattr(model, "reference", None)
    return other_model(coder.facts, reference, lambda: model_digest(model), lambda: behaviour_of(model))


def other_model(
    facts: CoderFacts, reference: str | None, weights: Callable[[], str], behaviour: Callable[[], str | None]
) -> list[str]:
    """Return how a model is another one than a coder was trained on, in words; empty where it is not.

    Args:
        facts: of the coder.
        reference: of the model.
        weights: returns the SHA-256 of its weights; called where the coder knows that of its own.
        behaviour: returns what it does beside its weights, if anything.
    """
    if facts.weights is not None and weights() != facts.weights:
        return [f"it was trained on {facts.model or 'a model'} with other weights than this model ({reference}) has"]
    if facts.weights is None and facts.model is None:
        return []
    if facts.weights is not None or reference in (facts.model, *facts.also):
        return [f"beside its weights this model has: {more}"] if (more := behaviour()) else []
    named = f"is {reference}" if reference else "has no reference (set model.reference if it is the same)"
    return [f"it was trained on {facts.model}, and this model {named}"]


def model_digest(model: HookedModel) -> str:
    """Return a SHA-256 of a model's weights."""
    return digest(tensors_of(model))


_TOKENS = ("pos", "patch", "cls", "window", "frame", "row", "column")


class Places:
    """The vectors of an activation that a coder runs on, whatever the order of its axes.

    >>> Places("batch d_model row column", None).lead, Places("batch pos head d_head", None).lead
    (('batch', 'row', 'column'), ('batch', 'pos'))

    Args:
        axes: of the hook point: those up to the last one of tokens come first, others become one vector.
        cut: the positions on the axis ``pos`` to run on; None for all.
    """

    def __init__(self, axes: str, cut: slice | None):
        names, self.cut = axes.split(), cut
        last = max((at for at, name in enumerate(names) if name in _TOKENS), default=max(0, len(names) - 2))
        first = [at for at in range(last + 1) if not names[at].startswith("d_")]
        self.order = [*first, *(at for at in range(len(names)) if at not in first)]
        self.back = [self.order.index(at) for at in range(len(names))]
        self.lead = tuple(names[at] for at in first)
        self.at = (slice(None),) * (self.lead.index("pos") if cut is not None else 0) + (cut or slice(None),)

    def read(self, x: Tensor) -> Tensor:
        """Return the vectors of an activation: ``[batch token d]``, with as many axes of tokens as it has."""
        return x.permute(self.order).flatten(len(self.lead))[self.at]

    def write(self, x: Tensor, vectors: Tensor) -> Tensor:
        """Return an activation with other vectors in their places."""
        x = x.permute(self.order)
        made = vectors.unflatten(-1, x.shape[len(self.lead) :])
        if self.cut is not None:
            made, new = x.clone(), made
            made[self.at] = new
        return made.permute(self.back)


def places_at(model: HookedModel, name: str, tokens: Tokens | None) -> Places:
    """Return the vectors of a hook point that a coder of these tokens runs on.

    Raises:
        InputError: the hook point, or the model, has no such tokens.
    """
    return Places(model.hook_points()[name].axes, token_slice(model, name, tokens))


def token_slice(model: HookedModel, name: str, tokens: Tokens | None) -> slice | None:
    """Return which positions of a hook point a coder runs on, or None for all.

    Raises:
        InputError: the hook point, or the model, has no such tokens.
    """
    if tokens in (None, "all"):
        return None
    layout = layout_at(model, name)
    axes = model.hook_points()[name].axes
    if tokens == "patches" and {"patch", "row", "window"} & set(axes.split()):  # it has no others
        return None
    if layout is None or "pos" not in axes.split():
        raise InputError(f"This coder runs on the tokens {tokens!r}, and {name} ({axes}) has no layout of tokens.")
    places = layout.slice(str(tokens))
    if places.start == places.stop:
        raise InputError(f"This coder runs on the tokens {tokens!r}, of which this model has none.")
    return slice(places.start, None) if tokens == "patches" else places  # the image may be larger


def layout_at(model: HookedModel, name: str) -> TokenLayout | None:
    """Return the layout of the tokens at a hook point, where the model knows one."""
    tower = getattr(model, name.partition(".")[0], None) if "." in name else None
    return (tower if isinstance(tower, HookedModel) else model).layout_for()
