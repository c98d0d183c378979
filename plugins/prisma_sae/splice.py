"""Coders in a model's forward pass, as a scope; their features are hook points of the model.

Equation:
    The activation x of a hook point becomes decode(encode(x)), or with the error term decode(f) + (x - decode(f0)),
    where f is what hooks made of the features f0 = encode(x): unedited it is x itself, to the bit.
Cost:
    The coder's own two products a pass; with the error term and edited features, two more.
Misleads:
    Without the error term, effects of a feature are mixed with those of what the coder does not reconstruct; with it,
    what an edit leaves in the error goes on having its effect.
Source:
    Marks et al. 2024 (error terms); Dunefsky et al. 2024 (transcoders in the place of MLPs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from inspect import currentframe
from threading import get_ident
from types import FrameType

import torch
from torch import Tensor

from prisma_core import HookedModel, HookError, HookPoint, InputError
from prisma_core.plugin import Splice, checked
from prisma_sae.binding import Coders, Places, check, find, placed, places_at
from prisma_sae.coder import SparseCoder, Tokens

INPUT, FEATURES, RECON, ERROR = "sae.hook_input", "sae.hook_features", "sae.hook_recon", "sae.hook_error"


@checked
def splice(
    model: HookedModel,
    coders: Coders,
    *,
    error_term: bool = False,
    tokens: Tokens | None = None,
    force: bool = False,
) -> AbstractContextManager[None]:
    """Return a scope in which coders stand in the place of activations.

    Their hook points are the model's while the scope is open: ``<hook>.sae.hook_input``, ``.sae.hook_features``
    (``[batch pos feature]``; ``cls`` or ``patch`` for ``pos`` where the coder runs on those alone), ``.sae.hook_recon``
    and, with the error term, ``.sae.hook_error``. A transcoder reads its ``hook`` and stands at its ``hook_out``.

    >>> import prisma_core as prisma, torch
    >>> from prisma_sae import load, splice
    >>> model, coder = prisma.load("toy:scenes-3l"), load("scenes-3l")
    >>> with splice(model, coder):
    ...     logits, cache = model.run_with_cache(torch.zeros(1, 3, 96, 96), names="sae.features")
    >>> cache["sae.features", 1].shape
    torch.Size([1, 144, 256])

    Args:
        model: the model whose passes are changed.
        coders: by hook point, as full name or ``(shorthand, layer)``; or one or several that know their place.
        error_term: add what the coder does not reconstruct.
        tokens: the tokens to run on; default those that each was trained on.
        force: attach coders where they were not trained.

    Raises:
        InputError: a coder was trained on another model, place or scope of tokens; with what differs.
        UnknownName: no such hook point.
        HookError: a hook point is spliced already.
    """
    splices: dict[str, Splice] = {}
    sources: dict[str, list[Source]] = {}
    for name, coder in placed(model, coders).items():
        if not force:
            check(model, coder, name, tokens)
        scope = tokens or coder.facts.tokens
        source = _source(model, coder, scope)
        splices[name] = CoderSplice(coder, scope, places_at(model, name, scope), error_term, source)
        if source is not None:
            sources.setdefault(source.name, []).append(source)
    return model.splicing(splices, reads={name: _seen_by(each) for name, each in sources.items()})


def _source(model: HookedModel, coder: SparseCoder, tokens: Tokens | None) -> Source | None:
    facts = coder.facts
    if not coder.is_transcoder:
        if facts.kind == "transcoder" and facts.hook is None:
            raise InputError("This transcoder does not say what it reads: coder.with_facts(hook=..., hook_out=...).")
        return None
    name = find(model, str(facts.hook))
    return Source(name, places_at(model, name, tokens))


def _seen_by(sources: Sequence[Source]) -> Callable[[Tensor], None]:
    """Return what several transcoders that read one activation make of it: each keeps it for itself."""

    def see(x: Tensor) -> None:
        for source in sources:
            source(x)

    return see


class Source:
    """What a transcoder reads in the pass under way, kept from there to where it writes, thread by thread."""

    def __init__(self, name: str, places: Places):
        self.name, self.places = name, places
        self.seen: dict[int, tuple[Tensor, FrameType | None]] = {}

    def __call__(self, x: Tensor) -> None:
        self.seen[_thread()] = x, _running_pass()

    def take(self) -> Tensor:
        """Return the vectors of the activation, and forget it.

        Raises:
            HookError: the pass did not go by it.
        """
        x, run = self.seen.pop(_thread(), (None, None))
        if x is None or run is not _running_pass():  # a pass that stopped in between leaves one behind
            raise HookError(
                f"The transcoder reads {self.name}, which this pass did not go by: start before it. If blocks are "
                "checkpointed one by one, checkpoint the model as a whole: what is computed again is one block."
            )
        return self.places.read(x)


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else get_ident()  # which torch does not compile


def _running_pass() -> FrameType | None:
    """Return the innermost call of a model that runs; None in a compiled one, and where a part is computed again."""
    frame = None if torch.compiler.is_compiling() else currentframe()
    while frame is not None and frame.f_code is not HookedModel.__call__.__code__:
        frame = frame.f_back
    return frame


class CoderSplice:
    """A coder in the place of an activation.

    Args:
        coder: the coder.
        tokens: the tokens that it runs on; None for all.
        places: their vectors in the activation.
        error_term: add what it does not reconstruct.
        source: of a transcoder, what it reads.
    """

    def __init__(
        self, coder: SparseCoder, tokens: Tokens | None, places: Places, error_term: bool, source: Source | None
    ):
        self.coder, self.places, self.source, self.error_term = coder, places, source, error_term
        token = {"cls": "cls", "patches": "patch"}.get(tokens or "", "pos")
        lead = " ".join(token if name == "pos" else name for name in places.lead)
        self.input = HookPoint(f"{lead} d_in", "what the coder reads")
        self.features = HookPoint(f"{lead} feature", "activate((normalize(x) - b_in) W_enc + b_enc)")
        self.recon = HookPoint(f"{lead} d_out", "features W_dec + b_dec, in the units of the activation")
        self.error = HookPoint(f"{lead} d_out", "the activation less its reconstruction")

    @property
    def points(self) -> Mapping[str, HookPoint]:
        points = {INPUT: self.input, FEATURES: self.features, RECON: self.recon}
        return points | ({ERROR: self.error} if self.error_term else {})

    def __call__(self, x: Tensor) -> Tensor:
        target = self.places.read(x)
        source = target if self.source is None else self.source.take()
        return self.places.write(x, self._coded(source, target))

    def _coded(self, source: Tensor, target: Tensor) -> Tensor:
        u = self.input(source)
        f = self.coder.encode(u)
        features = self.features(f)
        decoded = self.coder.decode(features, u).to(target.dtype)
        recon = self.recon(decoded)
        if not self.error_term:
            return recon
        same = u is source and features is f
        clean = decoded if same else self.coder(source).to(target.dtype)
        left = target - clean
        # Written as changes, so that nothing edited leaves the activation as it is, to the bit.
        return target + (recon - clean) + (self.error(left) - left)

    def __repr__(self) -> str:
        return f"CoderSplice({self.coder.extra_repr()})"
