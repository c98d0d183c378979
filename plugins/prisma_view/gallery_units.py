"""Units of a gallery: how activations become scores, and what each unit writes to classes, words and the stream.

Equation:
    A unit's direction w is W_out[n] of a neuron, W_dec[f] W of a feature (W brings its place to the stream), the mean
    of z W_O at the top tokens of a head. Its effect on the output is w M, M the frozen path from the stream at every
    token through the last norm, pooling and head, the mean of it over images. Words are those whose vectors, less the
    mean of all words, have the largest cosine with w M; similar units those whose w do.
Cost:
    One pass over the top images, and d_model / 32 readings of each of eight of them.
Misleads:
    Direct effects alone: what later layers make of a unit is not in it, and early units act mostly through them.
Source:
    nostalgebraist 2020 (the logit lens of directions); Gandelsman et al. 2024 (words of directions).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from prisma_harvest import Pass
from prisma_lens import names_for
from prisma_sae import SparseCoder
from torch import Tensor

from prisma_core import HookedDual, HookedModel, HookedViT, InputError, NotApplicable, attentions, mlps
from prisma_core.plugin import LayerQuery, layer_of, resolve_one

EFFECTS, WORDS, SIMILAR = 5, 8, 6
IMAGES = 8
"""Over how many images the frozen path to the output is averaged."""
_BASIS = 32


@dataclass(frozen=True)
class Units:
    """Units at a hook point.

    Attributes:
        model: the model whose hook points these are: of a pair of towers the pair.
        name: the full name of the hook point.
        kind: ``neuron``, ``head``, ``direction`` or ``feature``.
        pos: the tokens that are searched.
    """

    model: HookedModel
    name: str
    kind: str
    pos: Any = None
    coder: SparseCoder | None = None
    directions: Tensor | None = None

    @classmethod
    def of(
        cls,
        model: HookedModel,
        name: str | LayerQuery | None,
        coder: SparseCoder | None,
        over: str,
        directions: Tensor | None,
        pos: Any,
    ) -> Units:
        """Return the units that were asked for.

        Raises:
            InputError: neither a hook point nor a coder that knows its own, or both a coder and other units.
        """
        if coder is not None and (over == "head" or directions is not None):
            raise InputError("Expected a coder, over='head' or directions, one of them.")
        query = name if name is not None else coder.facts.hook if coder is not None else None
        if query is None:
            raise InputError("Expected the hook point of the units, such as ('mlp.hook_post', 5).")
        points = list(model.hook_points())
        vision = [each for each in points if each.startswith("vision.")] if isinstance(model, HookedDual) else points
        known = isinstance(query, str) and f"vision.{query}" in vision
        full = f"vision.{query}" if known else resolve_one(query, vision)
        if pos is None and coder is not None and coder.facts.tokens in ("cls", "patches"):
            pos = coder.facts.tokens
        kind = "feature" if coder is not None else "direction" if directions is not None else over
        return cls(model, full, "neuron" if kind == "feature" and coder is None else kind, pos, coder, directions)

    def search(self) -> dict[str, Any]:
        """Return what ``top_examples`` takes for these units."""
        if self.coder is not None:
            return {"encode": self.coder.encode}
        return {"over": "head"} if self.kind == "head" else {"directions": self.directions}

    def labels(self, n: int) -> tuple[str, ...]:
        """Return the coder's names of features, empty where it has none."""
        names = {} if self.coder is None else self.coder.facts.labels
        return tuple(names.get(unit, "") for unit in range(n))


@dataclass
class About:
    """What is known of units besides their images.

    Attributes:
        effects: by unit, classes with the effect of one unit of activation, largest first, then smallest.
        words: by unit, the nearest words with their cosines.
        similar: by unit, other units with their cosines.
        why: the reason, by the name of each of these that is left out.
    """

    effects: list[list[tuple[str, float]]] = field(default_factory=list)
    words: list[list[tuple[str, float]]] = field(default_factory=list)
    similar: list[list[tuple[int, float]]] = field(default_factory=list)
    why: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def about(model: HookedModel, run: Pass, units: Units, images: Tensor, mean: Tensor, words: Sequence[str]) -> About:
    """Return what units write: effects on classes, nearest words, similar units; those that apply.

    Args:
        images: over which the path to the output is averaged, as the model takes them.
        mean: of heads: the mean output at the top tokens, ``[head d_head]``.

    Raises:
        InputError: words for a model that reads none.
    """
    if words and not isinstance(model, HookedDual):
        raise InputError(f"{type(model).__name__} reads no texts: words= are for a dual encoder.")
    facts, own = About(), run.tower.model
    written = _try(facts, "similar units", lambda: _written(own, units, run, mean))
    if written is None:
        return facts
    if (
        units.kind == "neuron"
        and written.shape[0] == written.shape[1]
        and torch.equal(written, torch.eye(len(written)))
    ):
        facts.why["similar units"] = "the numbers of the stream are its axes, at right angles to one another"
    else:
        facts.similar = _nearest(written, written, SIMILAR, lambda unit: unit, but_itself=True)
    path = _try(facts, "effects on classes", lambda: _path(own, images[:IMAGES]))
    if path is None:
        return facts
    outputs = written @ path
    if isinstance(model, HookedDual):
        facts.why["effects on classes"] = "a dual encoder has no classes; it has words"
        if words:
            vectors = model.encode_text(list(words), normalize=True).float().cpu()
            vectors = vectors - vectors.mean(0) if len(words) > 1 else vectors
            facts.words = _nearest(outputs, vectors, WORDS, lambda at: words[at])
        else:
            facts.why["nearest words"] = "none were given"
    elif own.spec.n_classes is None:
        facts.why["effects on classes"] = "the model has no classes"
    elif outputs.ndim != 2:
        facts.why["effects on classes"] = "the model has an output for every token"
    else:
        names = own.labels or [f"class {at}" for at in range(own.spec.n_classes)]
        n = min(EFFECTS, (len(names) + 1) // 2)
        for row in outputs:
            order = row.argsort(descending=True).tolist()
            facts.effects.append([(names[at], float(row[at])) for at in (*order[:n], *order[n:][-n:])])
    return facts


def _try(facts: About, part: str, make: Callable[[], Tensor]) -> Tensor | None:
    try:
        return make()
    except NotApplicable as error:
        facts.why[part] = str(error)
        return None


def _written(own: HookedModel, units: Units, run: Pass, mean: Tensor) -> Tensor:
    """Return what one unit of activation writes to the stream: ``[unit d_model]``.

    Raises:
        NotApplicable: the units' place is not added to the stream.
    """
    place = units.name
    rows = units.directions
    if units.coder is not None:
        place, rows = units.coder.facts.hook_out or units.name, units.coder.W_dec
    elif units.kind == "head":
        rows = torch.block_diag(*mean)
    out = _to_stream(own, place.removeprefix(run.tower.prefix))
    return out if rows is None else rows.detach().float().cpu() @ out


def _to_stream(own: HookedModel, name: str) -> Tensor:
    """Return the matrix from the numbers at a hook point to the stream: ``[d d_model]``."""
    if not isinstance(own, HookedViT):
        raise NotApplicable("This model has no canonical form, so what its activations write is not known.")
    layer, last = layer_of(name), name.rpartition(".")[2]
    if last in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"):
        return torch.eye(own.spec.d_model)
    block = None if layer is None else own.layers()[layer]
    for branch in mlps(block) if block is not None and last == "hook_post" else ():
        if name == f"blocks.{layer}.{branch.name}.hook_post":
            return branch.scaled(branch.module.W_out).detach().float().cpu()
    for branch in attentions(block) if block is not None and last == "hook_z" else ():
        if name == f"blocks.{layer}.{branch.name}.hook_z":
            return branch.scaled(branch.module.W_O).detach().float().cpu().flatten(0, 1)
    raise NotApplicable(f"{name} is not added to the stream by itself: take resid_post, mlp.hook_post or z.")


def _path(own: HookedViT, images: Tensor) -> Tensor:
    """Return the frozen path from the stream at every token to the output, the mean over images: ``[d_model out]``."""
    parameter = next(own.parameters())
    basis = torch.eye(own.spec.d_model).to(parameter)
    total = 0.0
    for image in images.to(own.input_like).split(1):
        _, cache = own.run_with_cache(image, names=[*names_for(own), "hook_logits"])
        n = cache["attn_out", -1].shape[1]
        parts = [cache.project_stack(part[:, None, None].expand(-1, 1, n, -1))[:, 0] for part in basis.split(_BASIS)]
        total = total + torch.cat(parts).float().cpu()
    return total / len(images)


def _nearest(
    rows: Tensor, others: Tensor, n: int, name: Callable[[int], Any], *, but_itself: bool = False
) -> list[list[tuple[Any, float]]]:
    """Return for each row the names of the others with the largest cosines."""
    rows, others = (torch.nn.functional.normalize(each, dim=-1) for each in (rows, others))
    nearest = []
    for start in range(0, len(rows), 1024):
        cosines = rows[start : start + 1024] @ others.T
        if but_itself:
            cosines[torch.arange(len(cosines)), start + torch.arange(len(cosines))] = -torch.inf
        best = cosines.topk(min(n, len(others) - but_itself))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        nearest += [[(name(at), value) for at, value in zip(*pair, strict=True)] for pair in pairs]
    return nearest
