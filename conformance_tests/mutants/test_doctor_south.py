"""More mistakes planted in third-party adapters: tokens, rotary positions, projections, norms, scales, pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from einops import rearrange
from prisma_conformance import CHECKS
from prisma_conformance.doctor.diagnosis import examine
from prisma_conformance.run import run_check
from prisma_conformance.subject import Subject
from torch import Tensor

from prisma_core import TokenLayout
from prisma_core.plugin import NormSpec, PoolSpec, Reader, RopeSpec

from .south import AT, CASE, HOOKS, PREFIX, WEIGHTS, SouthAdapter, SouthViT, kernel, table
from .test_doctor import edited


@dataclass(frozen=True)
class Planted:
    """A mistake.

    Attributes:
        name: what is wrong.
        says: parts of the doctor's answer.
        fact, functions: as ``SouthAdapter`` takes them.
        weights, hooks: texts in the tables, and what stands there instead.
    """

    name: str
    says: tuple[str, ...]
    fact: Mapping[str, Callable[[Reader], Any]] = field(default_factory=dict[str, Any])
    functions: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict[str, Any])
    weights: Mapping[str, str] = field(default_factory=dict[str, Any])
    hooks: Mapping[str, str] = field(default_factory=dict[str, Any])

    def subject(self) -> Subject:
        tables = (edited(WEIGHTS, self.weights), edited(HOOKS, self.hooks))
        return Subject(CASE, SouthAdapter(*tables, self.fact, self.functions), SouthViT(), seed=1)


def _layout(**changed: int) -> Callable[[Reader], TokenLayout]:
    return lambda upstream: TokenLayout(
        **{"cls": 1, "registers": 2, "rows": upstream.rows, "columns": upstream.columns, **changed}
    )


def _slower(turn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Angles as of another base: the first pair of an axis turns as fast, the second half as fast."""
    return lambda x: table(turn)(x * torch.tensor([1.0, 0.5, 1.0, 0.5]).to(x))


def _by_columns(turn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: table(turn)(x.roll(2, 1))


QKV = f"[{AT}.attention.q.{{*}}, {AT}.attention.k.{{*}}, {AT}.attention.v.{{*}}]"
PLANTED = [
    Planted("a register too few", ("layout.registers=2 (it is 1)",), fact={"layout": _layout(registers=1)}),
    Planted("a register too many", ("layout.registers=2 (it is 3)",), fact={"layout": _layout(registers=3)}),
    Planted("no class token", ("layout.registers=3 (it is 2) or layout.cls=1 (it is 0)",), fact={"layout": _layout(cls=0)}),
    Planted("the token alone for the prefix", ("layout.registers=2 (it is 0)",), fact={"layout": _layout(registers=0)}, weights={"[token, registers]  ": "token"}),
    Planted("rope by halves", ("rope.layout='interleaved'",), fact={"rope": lambda upstream: RopeSpec(layout="half")}),
    Planted("another base of rope", ("rope_cos and rope_sin: angles of each pair times [1, 2, 1, 2]", "another base"), functions={"cos": _slower(torch.cos), "sin": _slower(torch.sin)}),
    Planted("rope by columns first", ("pairs of channels in the order [2, 3, 0, 1]",), functions={"cos": _by_columns(torch.cos), "sin": _by_columns(torch.sin)}),
    Planted("rope turned backwards", ("rope_sin with its sign changed",), functions={"sin": lambda x: -table(torch.sin)(x)}),
    Planted("the output projection transposed", ("attn.out.weight transposed",), functions={"t": lambda x: x.T if x.ndim == 2 else x}, weights={"blocks.{l}.attn.out.{*}": "blocks.{l}.attn.out.{*} : {t}"}),
    Planted("an MLP's square weight transposed", ("mlp.fc_in.weight transposed",), functions={"t": lambda x: x.T if x.ndim == 2 else x}, weights={"blocks.{l}.mlp.fc_in.{*}": "blocks.{l}.mlp.fc_in.{*} : {t}"}),
    Planted("keys and values exchanged", (f"'{QKV} -> blocks",), weights={QKV: f"[{AT}.attention.q.{{*}}, {AT}.attention.v.{{*}}, {AT}.attention.k.{{*}}]"}),
    Planted("queries last", ("blocks.{l}.attn.qkv",), weights={QKV: f"[{AT}.attention.k.{{*}}, {AT}.attention.v.{{*}}, {AT}.attention.q.{{*}}]"}),
    Planted("norms of a block exchanged", ("blocks.{l}.ln1", "blocks.{l}.ln2"), weights={f"{AT}.before_attention": f"{AT}.before_mlp", f"{AT}.before_mlp": f"{AT}.before_attention"}),
    Planted("no scale of scores", ("attn.scale=0.353553 (it is 1)",), fact={"scale": lambda layer: 1.0}),
    Planted("eps of 1e-5 everywhere", ("eps=1e-06 in all 5 norms that have 1e-05",), fact={"ln1": lambda layer: NormSpec(eps=1e-5), "ln2": lambda layer: NormSpec(eps=1e-5), "ln_final": lambda upstream: NormSpec(eps=1e-5)}),
    Planted("eps of 1e-5 in the last norm", ("ln_final.eps=",), fact={"ln_final": lambda upstream: NormSpec(eps=1e-5)}),
    Planted("gelu by tanh", ("mlp.act='gelu'",), fact={"act": lambda layer: "gelu_tanh"}),
    Planted("layer scale of attention dropped", ("attn_scale=True",), fact={"attn_scale": lambda layer: False}, weights={f"{AT}.scale1.gamma                 ->  blocks.{{l}}.ls1.gamma": f"ignore {AT}.scale1.gamma : of training"}),
    Planted("the mean of all tokens", ("pool.with_prefix=False",), fact={"pool": lambda upstream: PoolSpec(kind="avg", with_prefix=True)}),
    Planted("the class token for the mean", ("pool.kind='avg'",), fact={"pool": lambda upstream: PoolSpec(kind="token")}),
    Planted("positions without rows for the prefix", ("positions",), weights={"[zeros, positions : 1 n d -> n d]": "positions"}),
    Planted("positions before those of the prefix", ("positions",), weights={"[zeros, positions : 1 n d -> n d]": "[positions : 1 n d -> n d, zeros]"}),
    Planted("patches column by column", ("column by column",), functions={"p": lambda x: torch.cat([x.new_zeros(PREFIX, 24), rearrange(x[0], "(r c) d -> (c r) d", r=3)])}, weights={"[zeros, positions : 1 n d -> n d] ->  embed.pos_embed": "positions -> embed.pos_embed : {p}"}),
    Planted("rows and columns of a patch exchanged", ("patch kernels transposed",), functions={"kernel": lambda w, std: kernel(w, std).transpose(2, 3)}),
    Planted("channels of pixels first", ("embed.proj",), functions={"kernel": lambda w, std: rearrange(w, "d (c p q) -> d c p q", p=4, c=3) / std[:, None, None]}),
    Planted("blue for red", ("channels in the other order (bgr)",), functions={"kernel": lambda w, std: kernel(w, std).flip(1)}),
    Planted("pixels as they come", ("mean", "std"), functions={"plain": lambda w: rearrange(w, "d (p q c) -> d c p q", p=4, c=3)}, weights={"[stem.weight, std]  ": "stem.weight", "{kernel}": "{plain}", "[stem.weight, stem.bias, mean, std]": "stem.bias", ": {offset}": "\n ignore mean : of the images\n ignore std : of the images"}),
    Planted("pixels without their mean", ("mean",), weights={"[stem.weight, stem.bias, mean, std]": "stem.bias", ": {offset}": "\n ignore mean : of the images"}),
    Planted("twice as many heads", ("n_heads=3",), fact={"heads": lambda layer: 6, "scale": lambda layer: 0.5, "rope": lambda upstream: None}),
    Planted("one head", ("n_heads=3",), fact={"heads": lambda layer: 1}),
    Planted("no rope", ("rotation.angles",), fact={"rope": lambda upstream: None}, weights={"rotation.angles                   ->  rope_cos                   : {cos}": "", "rotation.angles                   ->  rope_sin                   : {sin}": "ignore rotation.angles : a table"}),
    Planted("branches side by side", ("kind='pre'",), fact={"kind": lambda layer: "parallel", "ln2": lambda layer: None}, weights={f"{AT}.before_mlp.{{*}}               ->  blocks.{{l}}.ln2.{{*}}": f"ignore {AT}.before_mlp.* : not used"}),
    Planted("rows of queries and keys exchanged", ("blocks.{l}.attn.hook_q",), hooks={"attention.q    ": "attention.k    ", "attention.k    ": "attention.q    "}),
    Planted("the stream's row behind the norm", ("layers.{l} -> blocks.{l}.hook_resid_post",), hooks={f"{AT}                            ->": f"{AT}.before_mlp : in                       ->"}),
]
