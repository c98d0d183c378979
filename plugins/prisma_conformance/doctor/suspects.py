"""Usual mistakes of adapters, each with the change of the spec or of the weights that corrects it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from einops import rearrange
from torch import Tensor, nn

from prisma_core import HookedViT, resize_positions
from prisma_core.plugin import (
    Activation,
    AnySpec,
    BlockSpec,
    DualSpec,
    Facts,
    Interpolation,
    ModelSpec,
    NormSpec,
    TextSpec,
    layer_of,
)

RESIZING = (
    *(Interpolation(mode=mode, antialias=antialias) for mode in ("bicubic", "bilinear") for antialias in (True, False)),
    Interpolation(mode="bilinear", weights_in_float32=True),
)


def _same(spec: Any) -> Any:
    return spec


def _nothing(model: Any) -> None:
    return None


@dataclass(frozen=True)
class Suspect:
    """A change to try: of the spec, or of the adapted model."""

    change: str
    spec: Callable[[Any], Any] = _same
    edit: Callable[[Any], None] = _nothing


def usual(spec: AnySpec, first: str, upstream: nn.Module) -> Iterator[Suspect]:
    """Yield the changes to try for a model that departs from upstream at the hook point ``first``."""
    if isinstance(spec, DualSpec):
        tower = "text" if first.startswith("text.") else "vision"
        inside = usual(spec.text if tower == "text" else spec.vision, first.removeprefix(f"{tower}."), upstream)
        yield from (_in_tower(tower, suspect) for suspect in inside)
        return
    if isinstance(spec, TextSpec):
        return
    yield from _norms(spec, first, upstream)
    yield from _attention(spec)
    yield from _mlps(spec)
    yield from _joins(spec)
    yield from _embedding(spec)
    yield from _pooling(spec)


def _in_tower(tower: str, suspect: Suspect) -> Suspect:
    def change(spec: DualSpec) -> DualSpec:
        return spec.model_copy(update={tower: suspect.spec(getattr(spec, tower))})

    return Suspect(f"{tower}: {suspect.change}", change, lambda model: suspect.edit(getattr(model, tower)))


def _blocks(change: Callable[[BlockSpec], BlockSpec]) -> Callable[[ModelSpec], ModelSpec]:
    return lambda spec: spec.model_copy(update={"blocks": tuple(change(block) for block in spec.blocks)})


def _in_blocks(part: str, **update: Any) -> Callable[[ModelSpec], ModelSpec]:
    def change(block: BlockSpec) -> BlockSpec:
        inner = getattr(block, part)
        return block if inner is None else block.model_copy(update={part: inner.model_copy(update=update)})

    return _blocks(change)


# -------------------------------------------------------------------- norms


def _norms(spec: ModelSpec, first: str, upstream: nn.Module) -> Iterator[Suspect]:
    values = (vars(module).get("eps") for module in upstream.modules())
    layer = layer_of(first)
    candidates = sorted({eps for eps in values if isinstance(eps, float)} | {1e-12, 1e-8, 1e-6, 1e-5})
    counts = Counter(norm.eps for norm in _every(spec))
    for old in (eps for eps, n in counts.items() if n > 1):
        for eps in (eps for eps in candidates if eps != old):
            change = f"eps={eps:g} in all {counts[old]} norms that have {old:g}"
            yield Suspect(change, lambda s, old=old, eps=eps: _exchanged(s, old, eps))
    for place, norm in _places(spec, layer):
        where = re.sub(r"^block\b", f"blocks.{layer}", place)
        for eps in candidates:
            if eps != norm.eps:
                yield Suspect(f"eps={eps:g} in {where} (it has {norm.eps:g})", _with_norm(place, layer, eps=eps))
        kind = "rms" if norm.kind == "ln" else "ln"
        yield Suspect(f"{where} as {kind} norm (it is {norm.kind})", _with_norm(place, layer, kind=kind))


def _every(facts: object) -> Iterator[NormSpec]:
    if isinstance(facts, NormSpec):
        yield facts
    elif isinstance(facts, Facts | tuple):
        for value in cast("Iterable[object]", vars(facts).values() if isinstance(facts, Facts) else facts):
            yield from _every(value)


def _exchanged(facts: Any, old: float, eps: float) -> Any:
    """Copy facts with another eps in every norm that has the old one."""
    if isinstance(facts, NormSpec):
        return facts.model_copy(update={"eps": eps}) if facts.eps == old else facts
    if isinstance(facts, Facts):
        return facts.model_copy(update={name: _exchanged(value, old, eps) for name, value in facts})
    if isinstance(facts, tuple):
        return tuple(_exchanged(value, old, eps) for value in cast("tuple[object, ...]", facts))
    return facts


def _places(spec: ModelSpec, layer: int | None) -> Iterator[tuple[str, NormSpec]]:
    holders: list[tuple[str, Facts | None]] = [("", spec), ("pool", spec.pool), ("embed", spec.embed)]
    if layer is not None:
        block = spec.blocks[layer]
        holders += [("block", block), ("block.attn", block.attn), ("block.mlp", block.mlp)]
    for path, holder in holders:
        for name in type(holder).model_fields if holder is not None else {}:
            if isinstance(value := getattr(holder, name), NormSpec):
                yield (f"{path}.{name}" if path else name), value


def _with_norm(place: str, layer: int | None, **update: Any) -> Callable[[ModelSpec], ModelSpec]:
    path = place.split(".")

    def replaced(holder: Any, path: list[str]) -> Any:
        inner = getattr(holder, path[0])
        new = inner.model_copy(update=update) if len(path) == 1 else replaced(inner, path[1:])
        return holder.model_copy(update={path[0]: new})

    def change(spec: ModelSpec) -> ModelSpec:
        if path[0] != "block" or layer is None:
            return cast(ModelSpec, replaced(spec, path))
        blocks = list(spec.blocks)
        blocks[layer] = cast(BlockSpec, replaced(blocks[layer], path[1:]))
        return spec.model_copy(update={"blocks": tuple(blocks)})

    return change


# -------------------------------------------------------------------- attention


def _attention(spec: ModelSpec) -> Iterator[Suspect]:
    attn = spec.blocks[0].attn
    for text, scale in (("d_head**-0.5", attn.d_head**-0.5), ("1", 1.0), ("d_model**-0.5", spec.d_model**-0.5)):
        if abs(scale - attn.scale) > 1e-12:
            change = f"attention scale {text} = {scale:.6g} (it is {attn.scale:.6g})"
            yield Suspect(change, _in_blocks("attn", scale=scale))
    if attn.n_heads == attn.n_kv_heads:
        orders = {"queries and keys": (1, 0, 2), "keys and values": (0, 2, 1), "queries and values": (2, 1, 0)}
        for names, order in orders.items():
            yield Suspect(f"{names} exchanged", edit=_reordered(order))
        yield Suspect("q, k and v of each head side by side in the fused projection", edit=_per_head)
    if attn.qk_norm is not None:
        over = "all_heads" if attn.qk_norm_over == "head" else "head"
        yield Suspect(f"the norm of queries and keys over {over}", _in_blocks("attn", qk_norm_over=over))
        yield Suspect("no norm of queries and keys", _in_blocks("attn", qk_norm=None))
    if spec.rope is not None:
        layout = "half" if spec.rope.layout == "interleaved" else "interleaved"
        rope = spec.rope.model_copy(update={"layout": layout})
        yield Suspect(f"rope layout {layout} (it is {spec.rope.layout})", lambda s: s.model_copy(update={"rope": rope}))
        yield Suspect("rope turning the other way", edit=lambda model: _scaled(model.rope_sin, -1))
    for what, pick in (("query, key and value", "attn.qkv.bias"), ("attention output", "attn.out.bias")):
        yield Suspect(f"no {what} biases", edit=_each(pick, lambda bias: bias.zero_()))


def _reordered(order: tuple[int, int, int]) -> Callable[[HookedViT], None]:
    def edit(model: HookedViT) -> None:
        for name, tensor in model.named_parameters():
            if ".attn.qkv." in name:
                parts = tensor.detach().clone().chunk(3)
                tensor.copy_(torch.cat([parts[index] for index in order]))

    return edit


def _per_head(model: HookedViT) -> None:
    for name, tensor in model.named_parameters():
        if ".attn.qkv." in name:
            width = model.spec.blocks[0].attn.d_head
            tensor.copy_(rearrange(tensor.detach().clone(), "(h three d) ... -> (three h d) ...", three=3, d=width))


def _each(ending: str, change: Callable[[Tensor], object]) -> Callable[[HookedViT], None]:
    def edit(model: HookedViT) -> None:
        for name, tensor in model.named_parameters():
            if name.endswith(ending):
                change(tensor)

    return edit


def _scaled(tensor: Tensor, factor: float) -> None:
    tensor.mul_(factor)


# -------------------------------------------------------------------- MLPs and joins


def _mlps(spec: ModelSpec) -> Iterator[Suspect]:
    mlp = spec.blocks[0].mlp
    if mlp is None:
        return
    for act in get_args(Activation):
        if act != mlp.act:
            yield Suspect(f"activation {act} (it is {mlp.act})", _in_blocks("mlp", act=act))
    if mlp.gated:
        yield Suspect("gate and input of the gated MLP exchanged", edit=_gates)
    yield Suspect("no MLP input biases", edit=_each("mlp.fc_in.bias", lambda bias: bias.zero_()))
    yield Suspect("no MLP output biases", edit=_each("mlp.fc_out.bias", lambda bias: bias.zero_()))


def _gates(model: HookedViT) -> None:
    tensors = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if ".mlp.fc_gate." in name:
            other = tensors[name.replace("fc_gate", "fc_in")]
            gate = tensor.detach().clone()
            tensor.copy_(other)
            other.copy_(gate)


def _joins(spec: ModelSpec) -> Iterator[Suspect]:
    block = spec.blocks[0]
    for kind in ("pre", "res_post", "parallel"):
        if kind != block.kind:
            update = {"kind": kind}
            yield Suspect(
                f"block kind {kind} (it is {block.kind})", _blocks(lambda b, u=update: b.model_copy(update=u))
            )
    for part, ending in (("attention", "ls1.gamma"), ("MLP", "ls2.gamma")):
        has = block.attn_scale if part == "attention" else block.mlp_scale
        name = "attn_scale" if part == "attention" else "mlp_scale"
        if has:
            yield Suspect(f"no layer scale on the {part}", edit=_each(ending, lambda gamma: gamma.fill_(1)))
        else:
            # Fits only if the weight map has a row for the scale; else adapting fails, and the change is passed over.
            flag = {name: True}
            yield Suspect(f"layer scale on the {part}: {name}=True", _blocks(lambda b, u=flag: b.model_copy(update=u)))


# -------------------------------------------------------------------- embedding and pooling


def _embedding(spec: ModelSpec) -> Iterator[Suspect]:
    grid = (spec.layout.rows, spec.layout.columns)
    n = spec.layout.n_prefix
    if spec.embed.stem == "conv" and spec.embed.patch[0] == spec.embed.patch[1]:
        yield Suspect("patch kernels transposed", edit=_each("embed.proj.weight", _transpose))
    yield Suspect("no patch bias", edit=_each("embed.proj.bias", lambda bias: bias.zero_()))
    if spec.embed.pos and grid[0] == grid[1]:
        yield Suspect("positions column by column", edit=_each("embed.pos_embed", lambda pos: _columns(pos, n, grid)))
    if spec.embed.pos and n:
        yield Suspect("no positions on prefix tokens", edit=_each("embed.pos_embed", lambda pos: pos[:n].zero_()))
    for shift in range(1, n):
        yield Suspect(f"prefix tokens rotated by {shift}", edit=_each("embed.prefix", lambda x, s=shift: _roll(x, s)))
        if spec.embed.pos:
            yield Suspect(
                f"positions of prefix tokens rotated by {shift}",
                edit=_each("embed.pos_embed", lambda x, s=shift: _roll(x[:n], s)),
            )
    if spec.embed.interpolation is not None:
        for how in RESIZING:
            text = f"positions resized {how.mode}, {'antialiased' if how.antialias else 'without antialiasing'}"
            yield Suspect(text + (", by weights" if how.weights_in_float32 else ""), edit=_resizing(how))


def _transpose(kernel: Tensor) -> None:
    kernel.copy_(kernel.detach().clone().transpose(-1, -2))


def _roll(x: Tensor, shift: int) -> None:
    x.copy_(x.detach().clone().roll(shift, 0))


def _columns(pos: Tensor, n: int, grid: tuple[int, int]) -> None:
    transposed = rearrange(pos[n:].detach().clone(), "(c r) d -> (r c) d", r=grid[0], c=grid[1])
    pos[n:].copy_(transposed)


def _resizing(how: Interpolation) -> Callable[[HookedViT], None]:
    def edit(model: HookedViT) -> None:
        embed, n, native = model.embed, model.spec.layout.n_prefix, model.embed.pos_grid

        def positions(size: tuple[int, int]) -> Tensor:
            if size == native:
                return embed.pos_embed
            resized = resize_positions(embed.pos_embed[n:], how, native, size)
            return torch.cat([embed.pos_embed[:n], resized.to(embed.pos_embed)])

        embed.__dict__["positions"] = positions

    return edit


def _pooling(spec: ModelSpec) -> Iterator[Suspect]:
    def pooled(change: str, **update: Any) -> Suspect:
        pool = spec.pool.model_copy(update=update)
        return Suspect(change, lambda s: s.model_copy(update={"pool": pool}))

    if spec.pool.kind in ("token", "avg"):
        for kind in ("token", "avg"):
            if kind != spec.pool.kind:
                yield pooled(f"pooling {kind} (it is {spec.pool.kind})", kind=kind, with_prefix=False)
        if spec.layout.n_prefix:
            yield pooled("pooling over patches and prefix", kind="avg", with_prefix=True)
            yield pooled("pooling over patches alone", kind="avg", with_prefix=False)
    if spec.ln_final is not None and spec.ln_pool is None:
        moved = {"ln_pool": spec.ln_final, "ln_final": None}
        yield Suspect("the final norm after pooling", lambda s: s.model_copy(update=moved))
    yield Suspect("no head bias", edit=_each("head.bias", lambda bias: bias.zero_()))
