"""Rewrites of weights that leave the logits where they are, to rounding.

Each is a pure function of a spec and a state dict, and returns a new state dict; ``rewrite`` runs them on a model::

    plain = rewrite(model, fold_layer_norm, center_writing_weights, fold_value_biases)

The facts of the model stay the same: a folded norm keeps its parameters, as ones and zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from prisma_core.errors import InputError, NotApplicable
from prisma_core.errors.arguments import check_call, expect
from prisma_core.maps.weights import State
from prisma_core.spec import AttentionSpec, BlockSpec, ModelSpec, NormSpec
from prisma_core.transformer.factored import FactoredMatrix
from prisma_core.transformer.vit import HookedViT

Rewrite: TypeAlias = Callable[[ModelSpec, State], dict[str, Tensor]]


def rewrite(model: HookedViT, *rewrites: Rewrite) -> HookedViT:
    """Return a new model with rewritten weights. The given one stays as it is, and no storage is shared.

    Args:
        model: the model.
        rewrites: functions of this module, run in this order.

    Raises:
        NotApplicable: a rewrite does not hold for this model; the message says why.
    """
    expect(model, HookedViT, "a vision transformer in canonical form")
    for each in rewrites:
        check_call(each, 2, "A rewrite", "rewrite(spec, state), such as prisma.fold_layer_norm")
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for each in rewrites:
        state = each(model.spec, state)
    new = copy.deepcopy(model)
    new.load_state_dict(state, strict=True)
    return new


def fold_layer_norm(spec: ModelSpec, state: State) -> dict[str, Tensor]:
    """Move the weight and bias of every norm into the linear maps that read it.

    Norms with no linear reader, such as a final norm that another norm or no head follows, stay as they are.

    Raises:
        NotApplicable: a block normalises what it adds to the stream (``res_post``): no linear map reads that norm.
    """
    new = _copied(spec, state)
    for side in _sides(spec):
        block, attn, mlp = side.spec, side.at("attn"), side.at("mlp")
        if block.kind == "res_post" and (block.ln1 or block.ln2):
            raise NotApplicable(
                f"{side.path} is a res_post block: its norms write to the stream, and no linear map reads them alone."
            )
        readers = [f"{attn}.qkv"]
        if block.mlp is not None:
            mlp_readers = [f"{mlp}.fc_in", *([f"{mlp}.fc_gate"] if block.mlp.gated else [])]
            if block.mlp.pre_norm is not None:
                _fold(new, f"{mlp}.pre_norm", mlp_readers)
                mlp_readers = []
            if block.kind == "parallel":
                readers = [*readers, *mlp_readers] if mlp_readers else []
            if block.ln2 is not None:
                _fold(new, side.at("ln2"), mlp_readers)
            if block.mlp.inner_norm is not None:
                _fold(new, f"{mlp}.ln", [f"{mlp}.fc_out"])
        if block.ln1 is not None:
            _fold(new, side.at("ln1"), readers)
        if block.attn.inner_norm is not None:
            _fold(new, f"{attn}.ln", [f"{attn}.out"])
    for norm, readers in _final_norms(spec):
        _fold(new, norm, readers)
    return new


def fold_layer_scale(spec: ModelSpec, state: State) -> dict[str, Tensor]:
    """Move every layer scale into the output projection before it.

    Raises:
        NotApplicable: a norm stands between the two (``res_post``).
    """
    new = _copied(spec, state)
    for side in _sides(spec):
        block = side.spec
        for has, norm, out, gamma in (
            (block.attn_scale, block.ln1, f"{side.at('attn')}.out", f"{side.at('ls1')}.gamma"),
            (block.mlp_scale and block.mlp, block.ln2, f"{side.at('mlp')}.fc_out", f"{side.at('ls2')}.gamma"),
        ):
            if not has:
                continue
            if block.kind == "res_post" and norm is not None:
                raise NotApplicable(f"{side.path}: a norm stands between the output projection and layer scale.")
            new[f"{out}.weight"] = new[gamma][:, None] * new[f"{out}.weight"]
            new[f"{out}.bias"] = new[gamma] * new[f"{out}.bias"]
            new[gamma] = torch.ones_like(new[gamma])
    return new


def center_writing_weights(spec: ModelSpec, state: State) -> dict[str, Tensor]:
    """Take the mean over ``d_model`` out of everything that is added to the stream, which layer norms remove anyway.

    Layer scale is folded first. What a norm writes (``ln_pre``, a norm of the embedding) or an opaque stem stays.

    Raises:
        NotApplicable: something reads the stream otherwise than through a layer norm, so the mean matters.
    """
    _copied(spec, state)
    for place, norm in _stream_readers(spec):
        if norm is None or norm.kind != "ln":
            what = "no norm" if norm is None else "a root mean square norm, which keeps the mean"
            raise NotApplicable(f"{place} reads the stream through {what}: without the mean the logits would change.")
    new = fold_layer_scale(spec, state)
    written: list[tuple[str, int]] = []
    if spec.ln_pre is None:
        projected = spec.embed.stem == "conv" and spec.embed.norm is None
        written += [("embed.proj.weight", 0), ("embed.proj.bias", 0)] if projected else []
        written += [(f"embed.{table}", 1) for table in ("prefix", "pos_embed", "pos_rows", "pos_columns")]
    for side in _sides(spec):
        for out in (f"{side.at('attn')}.out", f"{side.at('mlp')}.fc_out"):
            written += [(f"{out}.weight", 0), (f"{out}.bias", 0)]
    for name, axis in written:
        if name in new:
            new[name] = new[name] - new[name].mean(axis, keepdim=True)
    return new


def fold_value_biases(spec: ModelSpec, state: State) -> dict[str, Tensor]:
    """Move value biases into attention's output bias: patterns sum to 1, so they add the same to every token.

    Raises:
        NotApplicable: a norm stands before the output projection.
    """
    new = _copied(spec, state)
    for side in _sides(spec):
        _fold_value_bias(side.spec.attn, side.at("attn"), new)
    return new


def refactor_factored_attn_matrices(spec: ModelSpec, state: State) -> dict[str, Tensor]:
    """Give each head's query and key maps, and its value and output maps, orthogonal columns of falling size.

    ``W_Q W_K^T`` and ``W_V W_O`` stay what they are, biases included; queries and keys share the singular values, the
    values carry theirs. Value biases are folded first.

    Source: singular value decomposition of the two products, each through QR of its factors.

    Raises:
        NotApplicable: queries and keys are normed, turned by rotary positions or shared between heads, or a norm stands
            before the output projection.
    """
    new = _copied(spec, state)
    if spec.rope is not None:
        raise NotApplicable("Rotary positions turn queries and keys: W_Q W_K^T is not all there is to a score.")
    for side in _sides(spec):
        attn = side.spec.attn
        if attn.qk_norm is not None:
            raise NotApplicable(f"{side.path} norms queries and keys: W_Q W_K^T is not all there is to a score.")
        if attn.n_kv_heads != attn.n_heads:
            raise NotApplicable(f"{side.path} shares {attn.n_kv_heads} key heads between {attn.n_heads} query heads.")
        _fold_value_bias(attn, side.at("attn"), new)
        _refactor(attn, side.at("attn"), new)
    return new


# -------------------------------------------------------------------- parts


class _Side(NamedTuple):
    """One attention and one MLP of a block; ``number`` is theirs, where several stand side by side."""

    path: str
    spec: BlockSpec
    number: str

    def at(self, part: str) -> str:
        """Return the path of a part that belongs to them, such as ``ln1``."""
        return f"{self.path}.{part}{self.number}"


def _sides(spec: ModelSpec) -> list[_Side]:
    return [
        _Side(f"blocks.{index}", block, f".{side}" if block.n_parallel > 1 else "")
        for index, block in enumerate(spec.blocks)
        for side in range(block.n_parallel)
    ]


def _copied(spec: ModelSpec, state: State) -> dict[str, Tensor]:
    """Return a copy of a state dict; an ``InputError`` where it and the spec are not of one model."""
    sides = _sides(expect(spec, ModelSpec, "the spec of a vision transformer"))
    expect(state, Mapping, "a state dict, tensors by name")
    copied = dict(state)
    lacks = [name for side in sides if (name := f"{side.at('attn')}.out.weight") not in copied]
    if lacks:
        raise InputError(f"Expected the state dict of a model of this spec; {len(copied)} tensors, and no {lacks[0]}.")
    return copied


def _fold(state: dict[str, Tensor], norm: str, readers: list[str]) -> None:
    if not readers:
        return
    weight, bias = state[f"{norm}.weight"], state.get(f"{norm}.bias")
    for reader in readers:
        if bias is not None:
            state[f"{reader}.bias"] = state[f"{reader}.bias"] + state[f"{reader}.weight"] @ bias
        state[f"{reader}.weight"] = state[f"{reader}.weight"] * weight
    state[f"{norm}.weight"] = torch.ones_like(weight)
    if bias is not None:
        state[f"{norm}.bias"] = torch.zeros_like(bias)


def _final_norms(spec: ModelSpec) -> list[tuple[str, list[str]]]:
    """The norms at the end of the stream, each with the linear maps that read it."""
    head = [] if spec.n_classes is None else ["head"] if spec.n_heads_out == 1 else ["head", "head_dist"]
    pairs: list[tuple[str, list[str]]] = []
    pool = spec.pool
    if spec.ln_final is not None:
        if pool.kind == "attention":
            pairs.append(("ln_final", ["pool.attn.kv"]))
        elif spec.ln_pool is None and pool.kind != "token_and_avg":  # there the head reads the norm twice over
            pairs.append(("ln_final", head))
    if pool.mlp is not None:
        readers = ["pool.mlp.fc_in", *(["pool.mlp.fc_gate"] if pool.mlp.gated else [])]
        norm = "pool.ln" if pool.norm is not None else None
        if pool.mlp.pre_norm is not None:  # then no linear map reads the norm before the MLP
            norm = "pool.mlp.pre_norm"
        if norm is not None:
            pairs.append((norm, readers))
        if pool.mlp.inner_norm is not None:
            pairs.append(("pool.mlp.ln", ["pool.mlp.fc_out"]))
    if spec.ln_pool is not None:
        pairs.append(("ln_pool", head))
    return pairs


def _stream_readers(spec: ModelSpec) -> Iterator[tuple[str, NormSpec | None]]:
    for index, block in enumerate(spec.blocks):
        normed = block.kind != "res_post"
        yield f"blocks.{index}.attn", block.ln1 if normed else None
        if block.mlp is not None:
            norm = block.ln1 if block.kind == "parallel" else block.ln2
            yield f"blocks.{index}.mlp", norm if normed else None
    if spec.ln_final is None and spec.pool.kind == "attention":
        yield "pool", None
    else:
        yield "the head", spec.ln_final or spec.ln_pool


def _split(attn: AttentionSpec, path: str, state: State) -> tuple[list[Tensor], list[Tensor]]:
    """Weights ``[head d_head d_model]`` and biases ``[head d_head]`` of queries, keys and values."""
    heads = [attn.n_heads, attn.n_kv_heads, attn.n_kv_heads]
    weights, biases = (
        rearrange(state[f"{path}.qkv.{kind}"], "(head d_head) ... -> head d_head ...", d_head=attn.d_head)
        for kind in ("weight", "bias")
    )
    return list(torch.split(weights, heads)), list(torch.split(biases, heads))


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten(0, 1) for part in parts])


def _fold_value_bias(attn: AttentionSpec, path: str, state: dict[str, Tensor]) -> None:
    if attn.inner_norm is not None:
        raise NotApplicable(f"{path} norms z before the output projection: a value bias is no constant behind it.")
    _, biases = _split(attn, path, state)
    shared = repeat(biases[2], "head d_head -> (head group d_head)", group=attn.n_heads // attn.n_kv_heads)
    state[f"{path}.out.bias"] = state[f"{path}.out.bias"] + state[f"{path}.out.weight"] @ shared
    biases[2] = torch.zeros_like(biases[2])
    state[f"{path}.qkv.bias"] = _joined(biases)


def _refactor(attn: AttentionSpec, path: str, state: dict[str, Tensor]) -> None:
    weights, biases = _split(attn, path, state)
    # A bias is the weight of one more input that is always 1.
    q, k = (torch.cat([weights[i].mT, biases[i][:, None]], dim=1) for i in (0, 1))
    left, size, right = _svd(q, k)
    q, k = left * size.sqrt()[:, None], right * size.sqrt()[:, None]
    w_o = rearrange(state[f"{path}.out.weight"], "d_model (head d_head) -> head d_model d_head", d_head=attn.d_head)
    left, size, right = _svd(weights[2].mT, w_o)
    state[f"{path}.qkv.weight"] = _joined([q[:, :-1].mT, k[:, :-1].mT, (left * size[:, None]).mT])
    state[f"{path}.qkv.bias"] = _joined([q[:, -1], k[:, -1], biases[2]])
    state[f"{path}.out.weight"] = rearrange(right, "head d_model d_head -> d_model (head d_head)")


def _svd(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values of ``a b^T``, as many as ``a`` and ``b`` have columns: ``[head d_model d_head]``."""
    u, size, vh = FactoredMatrix(a, b.mT).svd()
    lacking = a.shape[-1] - size.shape[-1]
    return F.pad(u, (0, lacking)), F.pad(size, (0, lacking)), F.pad(vh.mT, (0, lacking))
