"""Direct attribution: how much of a reading each layer, head, neuron or source token wrote.

Equation:
    a[c] = sum_p <x_c[p], g[p]>, x_c what component c adds to the stream and g the frozen path from the stream to the
    reading (scales of norms, pooling attention and the output's length as they were): ``sum_c a[c] + constant`` is the
    reading. Heads: z W_O . g. Neurons: post[n] (W_out[n] . g). Source k of a head: pattern[q, k] v[k] W_O . g[q].
Cost:
    One pass; for each class a product of g with W_O or W_out, never a stack of components.
Misleads:
    Direct effects alone: what a head does through later heads and MLPs is not in its number (patch it to see). A large
    term may be cancelled by another: compare differences of classes.
Source:
    Elhage et al. 2021; TransformerLens' logit attribution. For dual encoders: Gandelsman et al. 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from prisma_core import ActivationCache, HookedModel, InputError, NotApplicable, Result, attentions, mlps
from prisma_core.plugin import checked
from prisma_lens.covectors import check_probe, check_total, constant, covectors, probe_covectors
from prisma_lens.readouts import (
    Target,
    TowerName,
    at_token,
    cache_of,
    check_pooled,
    first_given_out,
    gives_every_token,
    readout,
    refuse_with_probe,
    token_labels,
    token_read,
    tower_of,
)

By: TypeAlias = Literal["layer", "head", "neuron", "source", "head source"]
_AXES = {
    "layer": ("component",),
    "head": ("layer", "head"),
    "neuron": ("layer", "neuron"),
    "source": ("layer", "source"),
    "head source": ("layer", "head", "source"),
}
_START = ("hook_full_embed", "hook_pos_embed", "hook_ln_pre")
_END = ("ln_final.hook_scale", "ln_pool.hook_scale", "hook_logits")


@checked
@torch.no_grad()
def attribute(
    model: HookedModel,
    given: ActivationCache | Tensor | Any,
    target: Target | Result,
    *,
    against: Target | None = None,
    by: By = "layer",
    per_token: bool = False,
    tower: TowerName = "vision",
    labels: Sequence[str] | None = None,
    place: str | int = -1,
    pos: int | str | None = None,
) -> Result:
    """Return what each component adds to a reading of the output: ``[*by batch class]``.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> attribute(model, torch.zeros(1, 3, 96, 96), "ladybird", against="bee", by="head").shape
    {'layer': 3, 'head': 4, 'batch': 1, 'class': 1}

    Args:
        model: a classifier, a dual encoder, or a tower of one.
        given: images (texts or tokens, for a text tower), or a cache of them with ``names_for(model, by)``.
        target: what is read (see ``readout``): of a classifier a class, as index or label, or several; of a dual
            encoder's vision tower texts, of its text tower images; of any model directions ``[class out]``. Or the
            ``Result`` of ``probe``: what it reads of the stream, and the layers before it.
        against: what is subtracted: one, or one for each target.
        by: the components: ``layer`` (embeddings, each attention and each MLP), ``head``, ``neuron``; ``source``, the
            tokens that heads bring something from, of all heads together, or ``head source``.
        per_token: keep the axis of the token that is written to, behind ``batch``; not for sources.
        tower: of a dual encoder, whose components.
        labels: names of the directions.
        place: which of a probe's places, as label or number.
        pos: of a model that gives out every token, the one whose output is read, as position or as a subset of the
            layout such as ``"cls"``; None for all of them, with an axis ``pos``. Sources need one.

    Returns:
        The values, and in ``tensors`` the ``constant`` that no component adds and, but for ``layer``, the ``rest``:
        what all other components add, both ``[batch class]``. Together they sum to the logit.

    Raises:
        NotApplicable: the stream or the output is no sum of such components, or a hook that is open edits it elsewhere;
            the message says why.
        UnknownName: the cache lacks activations, or there is no such class.
        InputError: the cache is another model's, or the target does not fit.
    """
    if by not in _AXES:
        raise InputError(f"Expected by= one of {', '.join(map(repr, _AXES))}, got {by!r}.")
    own, sources = tower_of(model, tower), by.endswith("source")
    read_at = list[str]()
    if isinstance(target, Result):
        check_probe(target)
        read_at = [target.facts["names"][target.index("place", place)]]
    cache = cache_of(model, given, lambda each: [*names_for(each, by), *read_at], tower)
    if not cache.has_batch_dim:
        raise InputError("This cache has no batch axis: take it with run_with_cache(...), remove_batch_dim=False.")
    whole = pos is None and gives_every_token(own) and not isinstance(target, Result)
    if pos is not None or (sources and whole):
        check_pooled(own, "token that heads write to", pos)
    keep = (per_token or whole) and not sources
    split: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
        "layer": _layers,
        "head": _heads,
        "neuron": _neurons,
        "source": partial(_sources, merged=True),
        "head source": _sources,
    }
    blocks = own.layers()
    if isinstance(target, Result):
        refuse_with_probe(against=against, labels=labels, pos=pos)
        paths, fixed, names, end, read = probe_covectors(cache, target, place)
        blocks = blocks[:end]
        if not blocks and by != "layer":
            raise NotApplicable("This probe reads the stream before the first block: nothing but embeddings is there.")
    else:
        if place != -1:
            raise InputError(f"place={place!r} is of a probe, and the target is none: leave it out.")
        reading = readout(model, target, against, tower=tower, labels=labels)
        token, names = token_read(own, cache, pos), reading.labels
        paths, fixed = covectors(cache, reading, token), constant(cache, reading, token)
        read = reading(at_token(cache["hook_logits"], token))
    columns = [split[by](cache, blocks, g, keep) for g in paths]
    values, rest = (
        each[0][..., None] if len(each) == 1 else torch.stack(each, -1) for each in zip(*columns, strict=True)
    )
    axes = (*_AXES[by], "batch", *(["pos"] if keep else []), "class")
    tokens = _tokens(cache, axes, values.shape)
    if whole and keep and (first := first_given_out(own)):
        values, rest, tokens = values[..., first:, :], rest[..., first:, :], {k: v[first:] for k, v in tokens.items()}
    parts, others = values.flatten(0, len(_AXES[by]) - 1), rest
    if keep and not whole:
        parts, others = parts.movedim(2, 1).flatten(0, 1), rest.sum(1)
    check_total(cache, parts, (others, fixed), read)
    tensors = {"constant": fixed, **({} if by == "layer" else {"rest": rest})}
    return Result(
        values,
        axes,
        {**_labels(cache, blocks, by, values.shape), **tokens, "class": tuple(names)},
        technique="attribute",
        unit="logits",
        total="the logit, with tensors['constant']" + ("" if by == "layer" else " and tensors['rest']"),
        tensors=tensors,
        facts={"by": by, "tower": tower},
    )


@checked
def names_for(model: HookedModel, by: By = "layer", tower: TowerName = "vision") -> list[str]:
    """Return the hook points that a cache of a tower must hold for ``attribute``.

    >>> import prisma_core as prisma
    >>> [name for name in names_for(prisma.load("toy:scenes-3l"), "head") if name.endswith("z")]
    ['blocks.0.attn.hook_z', 'blocks.1.attn.hook_z', 'blocks.2.attn.hook_z']
    """
    own = tower_of(model, tower)
    wanted = [*_START, *_END, *own.readout_names()]
    wanted += [f"blocks.{layer}.hook_attn_out" for layer in ([len(own.blocks) - 1] if by != "neuron" else [])]
    for layer, block in enumerate(own.layers()):
        at = f"blocks.{layer}"
        if by in ("layer", "neuron"):
            wanted.append(f"{at}.hook_attn_out")
        if by != "neuron":
            wanted.append(f"{at}.hook_mlp_out")
        for branch in attentions(block):
            if by == "head":
                wanted.append(f"{at}.{branch.name}.{_z(branch)}")
            elif by.endswith("source"):
                wanted += [f"{at}.{branch.name}.hook_pattern", f"{at}.{branch.name}.hook_v"]
        if by == "neuron":
            wanted += [f"{at}.{branch.name}.hook_post" for branch in mlps(block)]
    points = own.hook_points()
    return [name for name in dict.fromkeys(wanted) if name in points]


# -------------------------------------------------------------------- components along a covector [batch pos d_model]


def _layers(cache: Any, blocks: list[Any], g: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    values = _stack(cache, blocks, g, "all", keep)
    return values, torch.zeros_like(values[0])


def _heads(cache: Any, blocks: list[Any], g: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    g, at = _read(g)
    rest, rows = _stack(cache, blocks, g, "mlp", keep, at).sum(0), _Table(blocks, attentions, "heads")
    for layer, block in enumerate(blocks):
        check_sum_of(layer, block, "ln1", "heads", "attn_out")
        for branch in attentions(block):
            z = head_inputs(cache, layer, branch)[:, at].to(g)
            along = torch.einsum("bpd,hed->bphe", g, branch.scaled(branch.module.W_O).to(g))
            rows.append(_spread(torch.einsum("bphe,bphe->hbp", z, along), at, cache, keep))
            rest = rest + _bias(g, branch.scaled(branch.module.b_O), at, cache, keep)
    return rows.table(), rest


def _neurons(cache: Any, blocks: list[Any], g: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    g, at = _read(g)
    rest, rows = _stack(cache, blocks, g, "attn", keep, at).sum(0), _Table(blocks, mlps, "neurons")
    for layer, block in enumerate(blocks):
        check_sum_of(layer, block, "ln2", "neurons", "mlp_out")
        for branch in mlps(block):
            post = cache[f"blocks.{layer}.{branch.name}.hook_post"][:, at].to(g)
            along = g @ branch.scaled(branch.module.W_out).to(g).T
            added = (post * along).movedim(-1, 0) if keep else torch.einsum("bpn,bpn->nb", post, along)[..., None]
            rows.append(_spread(added, at, cache, keep))
            rest = rest + _bias(g, branch.scaled(branch.module.b_out), at, cache, keep)
    return rows.table(), rest


def _sources(cache: Any, blocks: list[Any], g: Tensor, keep: bool, merged: bool = False) -> tuple[Tensor, Tensor]:
    g, at = _read(g)
    rest, rows = _stack(cache, blocks, g, "mlp", False, at).sum(0), _Table(blocks, attentions, "heads")
    for layer, block in enumerate(blocks):
        check_sum_of(layer, block, "ln1", "heads", "attn_out")
        for branch in attentions(block):
            spec, name = branch.module.spec, f"blocks.{layer}.{branch.name}"
            check_linear_in_values(layer, branch)
            pattern, v = cache[f"{name}.hook_pattern"], cache[f"{name}.hook_v"]
            if v.shape[1] != pattern.shape[-1]:
                raise NotApplicable(f"{name}.hook_v holds {v.shape[1]} of {pattern.shape[-1]} tokens: cache all.")
            v = v.repeat_interleave(spec.n_heads // v.shape[2], 2)
            along = torch.einsum("bqd,hed->bhqe", g, branch.scaled(branch.module.W_O).to(g))
            arrived = torch.einsum("bhqk,bhqe->bhke", pattern[:, :, at].to(g), along)
            rows.append(torch.einsum("bhke,bkhe->hkb", arrived, v.to(g)))
            rest = rest + _bias(g, branch.scaled(branch.module.b_O), at, cache, False)
    values = rows.table()
    return (values.sum(1) if merged else values), rest


def _read(g: Tensor) -> tuple[Tensor, Any]:
    """Return the covector at the tokens that are read alone, and which these are."""
    at = (g != 0).any(-1).any(0).nonzero().flatten()
    return (g, slice(None)) if len(at) in (0, g.shape[1]) else (g[:, at], at)  # of 0, the reading has no direction


def _stack(cache: Any, blocks: list[Any], g: Tensor, mode: str, keep: bool, at: Any = slice(None)) -> Tensor:
    """What embeddings and layers of one kind add: ``[component batch]``, or with ``pos`` behind it."""
    where = None if isinstance(at, slice) else at.tolist()
    stack = cache.decompose_resid(len(blocks), mode=mode, pos_slice=where)
    return _spread(torch.einsum("cbpd,bpd->cbp", stack.to(g), g), at, cache, keep)


def _bias(g: Tensor, bias: Tensor, at: Any, cache: Any, keep: bool) -> Tensor:
    return _spread(g @ bias.to(g), at, cache, keep)


def _spread(added: Tensor, at: Any, cache: Any, keep: bool) -> Tensor:
    """Sum over the tokens that are read ``[... token]``, or put them in their places among all."""
    if not keep:
        return added.sum(-1)
    if isinstance(at, slice):
        return added
    return added.new_zeros(*added.shape[:-1], cache["attn_out", -1].shape[1]).index_copy(-1, at, added)


class _Table:
    """Rows of all layers, each written to its place as it comes: of neurons they are large."""

    def __init__(self, blocks: list[Any], branches: Callable[[Any], list[Any]], what: str):
        self.sides, self.layers, self.what, self.n = {len(branches(block)) for block in blocks}, len(blocks), what, 0
        self.rows: Tensor | None = None

    def append(self, row: Tensor) -> None:
        """Add what the parts of the next branch add: ``[part ...]``."""
        if self.rows is None:
            self.rows = row.new_empty(self.layers * max(self.sides), *row.shape)
        if len(self.sides) > 1 or row.shape != self.rows.shape[1:]:
            raise NotApplicable(f"The layers differ in their number of {self.what}, so there is no one table of them.")
        self.rows[self.n] = row
        self.n += 1

    def table(self) -> Tensor:
        """Return all rows: ``[layer part ...]``."""
        if self.rows is None:
            raise NotApplicable("This model has no MLPs, so it has no neurons.")
        return self.rows.unflatten(0, (self.layers, -1)).flatten(1, 2)


def head_inputs(cache: Any, layer: int, branch: Any) -> Tensor:
    """Return what W_O of each head reads: ``[batch pos head d_head]``."""
    z = cache[f"blocks.{layer}.{branch.name}.{_z(branch)}"]
    return z if z.ndim == 4 else z.unflatten(-1, (branch.module.spec.n_heads, -1))


def _z(branch: Any) -> str:
    return "hook_z" if branch.module.spec.inner_norm is None else "ln.hook_normalized"


def check_sum_of(layer: int, block: Any, norm: str, what: str, out: str) -> None:
    """Refuse a block whose heads, or neurons, are normed before they join the stream.

    Raises:
        NotApplicable: with which norm it is.
    """
    if block.spec.kind == "res_post" and getattr(block.spec, norm) is not None:
        raise NotApplicable(
            f"Layer {layer} is a res_post block: {norm} normalises the sum of its {what} before it joins the stream, "
            f"so {out} is no sum over {what}. by='layer' holds all the same."
        )


def check_linear_in_values(layer: int, branch: Any) -> None:
    """Refuse an attention with a norm between its values and its output projection.

    Raises:
        NotApplicable: it has one.
    """
    if branch.module.spec.inner_norm is not None:
        raise NotApplicable(f"Layer {layer} norms its heads' outputs, so they are no sum over what they read.")


def _labels(cache: Any, blocks: list[Any], by: str, shape: Sequence[int]) -> dict[str, tuple[str, ...]]:
    if by == "layer":
        return {"component": tuple(cache.decompose_resid(len(blocks), pos_slice=[0], return_labels=True)[1])}
    about = {"layer": tuple(f"L{layer}" for layer in range(shape[0]))}
    if by.startswith("head"):
        about["head"] = tuple(f"H{head}" for head in range(shape[1]))
    elif by == "neuron":
        about["neuron"] = tuple(f"N{neuron}" for neuron in range(shape[1]))
    return about


def _tokens(cache: Any, axes: Sequence[str], shape: Sequence[int]) -> dict[str, tuple[str, ...]]:
    for axis in ("pos", "source"):
        if axis in axes:
            names = token_labels(cache, shape[list(axes).index(axis)])
            return {axis: names["pos"]} if names else {}
    return {}
