"""The page of canonical tensors: those of a plain model, and for each fact its field and the tensors that it adds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from pydantic import BaseModel

from prisma_core.model import tensors_of
from prisma_core.spec import AnySpec, DualSpec, Interpolation, ModelSpec, NormSpec, PoolSpec, RopeSpec, TextSpec
from prisma_core.transformer import build

LN, RMS = NormSpec(eps=1e-6), NormSpec(kind="rms", eps=1e-6)
PLAIN: dict[str, Any] = {"d_model": 24, "layers": 2, "heads": 3, "patch": 4, "image": (8, 12), "n_classes": 10}

HEAD = """<!-- Written by `python docs/generate.py` from the code. Change the code, not this page. -->
# Canonical tensors, and the field for what your model has

The right side of a [weight table](reference.md#weight-tables) names tensors of Prisma's model. Which ones there are
follows from the spec. `model.state_dict()` of an adapted model lists them too, and `prisma check` names those that no
row makes.

## A plain model

Patches, a class token, learned positions, pre-norm blocks, a norm, a head that reads the class token. Every linear
layer has a bias: where upstream has none, the row says `SOURCE | zeros -> TARGET`. `embed.prefix` is the class token,
and registers behind it; `embed.pos_embed` has a row for every token; `qkv` is `[queries, keys, values]` along the first
axis, each of them head by head. Here `d_model` is 24, with 3 heads of 8 channels, an MLP of 96 neurons, 6 patches of
4 x 4 pixels and 10 classes.
"""
FIELDS = """
## Your model has ...

Each row differs from the plain model in the fields named; `{l}` stands for a layer, `{n}` for a branch,
`{*}` for weight and bias. A tensor in brackets is the plain model's and is not there. Behind single tensors stands
their shape: `rope_cos` and `rope_sin` are `[pos head d_head]`, with one head where all turn alike, and cosine 1 and
sine 0 for prefix tokens; both channels of a pair have the same.

| your model has | field | tensors |
| --- | --- | --- |
"""
ROWS = """
## Your model has ..., and no field says so

| your model has | row of the weight table |
| --- | --- |
| no bias in a linear layer | `SOURCE \\| zeros -> TARGET` |
| queries, keys and values in three layers | `[q.{*}, k.{*}, v.{*}] -> blocks.{l}.attn.qkv.{*}` |
| no bias of keys | `[q_bias, zeros, v_bias] -> blocks.{l}.attn.qkv.bias` |
| queries, keys and values of each head side by side | `qkv.weight -> TARGET : (h three d) m -> (three h d) m` |
| linear layers stored transposed (`Conv1D` of GPT-2) | `w -> TARGET : i o -> o i` |
| gate and values of the MLP in one layer | `w12.{*} -> [blocks.{l}.mlp.fc_gate.{*}, blocks.{l}.mlp.fc_in.{*}]` |
| a class token `[1 1 d]` beside registers `[n d]` | `[cls : 1 n d -> n d, registers] -> embed.prefix` |
| positions of patches alone, as a grid | `[zeros, grid : r c d -> (r c) d] -> embed.pos_embed` |
| positions of sines and cosines, computed in the forward pass | `{positions} -> embed.pos_embed`, with a function |
| a norm without weights | `ones -> TARGET.weight`, `zeros -> TARGET.bias` |
| registers behind the patches | [functions in the hook table](reference.md#tokens-behind-the-patches) |

`(h three d)` needs its lengths: `WeightMap.parse(table, three=3, h=12)`. What neither table has is unsupported in
canonical form: [hook the model where it stands](../how-to-other-architectures.md#hook-a-model-of-your-own).
"""


TEXTS = """
## Texts and pairs

A text tower has the blocks, norms and head of the models above, and these tensors before them. Here the vocabulary has
50 tokens, and a text at most 9. A [pair of towers](reference.md#pairs-of-towers) has the tensors of both, as
`vision.{*}` and `text.{*}`, and the logarithm of the factor of the similarities.

| your model has | field | tensors |
| --- | --- | --- |
"""


def texts() -> list[str]:
    """The rows of texts and pairs."""
    plain = TextSpec.plain(n_vocab=50, n_ctx=9, d_model=24, layers=2, heads=3, n_classes=10)
    suffix = TextSpec.model_validate({**dict(plain), "suffix": True, "pool": {"kind": "last"}})
    pair = DualSpec(vision=ModelSpec.plain(**PLAIN), text=plain)
    biased = pair.model_copy(update={"logit_bias": True})
    towers = {name for name in shapes(pair) if name.startswith(("vision.", "text."))}
    specs: dict[str, tuple[AnySpec, str, set[str]]] = {
        "tokens and positions": (plain, "`TextSpec`", set(shapes(pair.vision)) - {"embed.pos_embed"}),
        "a learned token behind each text": (suffix, "`TextSpec.suffix=True`", set(shapes(plain))),
        "a pair, and a factor of its similarities": (pair, "`DualSpec`", towers),
        "a bias of the similarities": (biased, "`DualSpec.logit_bias=True`", set(shapes(pair))),
    }
    lines: list[str] = []
    for words, (spec, field, known) in specs.items():
        new = [f"`{name}`{_shape(shape)}" for name, shape in shapes(spec).items() if name not in known]
        lines.append(f"| {words} | {field} | {', '.join(new)} |")
    return lines


def models() -> dict[str, ModelSpec]:
    """The specs of the second table, by what the model has."""

    def plain(**facts: Any) -> ModelSpec:
        return ModelSpec.plain(**{**PLAIN, **facts})

    spec = plain()
    attn, mlp = spec.blocks[0].attn, spec.blocks[0].mlp
    assert mlp is not None

    def each(**changes: Any) -> ModelSpec:
        blocks = tuple(block.model_copy(update=changes) for block in spec.blocks)
        return ModelSpec.model_validate({**dict(spec), "blocks": blocks})

    whole = dict(spec)
    return {
        "root mean square norms": plain(norm=RMS),
        "another scale of the scores than `d_head**-0.5`": plain(scale=0.3),
        "norms of queries and keys, for each head": plain(qk_norm=RMS),
        "norms of queries and keys, over all heads": plain(qk_norm=RMS, qk_norm_over="all_heads"),
        "fewer keys and values than queries (grouped-query attention)": plain(n_kv_heads=1),
        "a bias of the scores, such as relative positions": plain(bias=True),
        "a norm before attention's output projection": each(attn=attn.model_copy(update={"inner_norm": LN})),
        "another activation function": plain(act="quick_gelu"),
        "a gated MLP (GLU, SwiGLU)": plain(gated=True, act="silu"),
        "a norm inside the MLP": each(mlp=mlp.model_copy(update={"inner_norm": LN})),
        "a second norm before the MLP": each(mlp=mlp.model_copy(update={"pre_norm": LN})),
        "blocks without an MLP": each(mlp=None, ln2=None),
        "layer scale": plain(attn_scale=True, mlp_scale=True),
        "norms behind attention and MLP, before the addition": plain(kind="res_post"),
        "attention and MLP side by side": each(kind="parallel", ln2=None),
        "several attentions side by side, then several MLPs": plain(n_parallel=2),
        "register tokens": plain(registers=4),
        "no class token": plain(cls=0, pool="avg"),
        "a distillation token with a head of its own": plain(distillation=1, n_heads_out=2),
        "no learned positions": plain(pos=False),
        "rotary positions": plain(rope=RopeSpec(layout="half")),
        "images of other sizes than the native one": plain(interpolation=Interpolation()),
        "a norm of the patch embedding": ModelSpec.model_validate(
            {**whole, "embed": spec.embed.model_copy(update={"norm": LN})}
        ),
        "a stem of several layers ([`Adapter.stem`](reference.md#the-plugin), `stem.{*} -> embed.stem.{*}`)": (
            ModelSpec.model_validate({**whole, "embed": spec.embed.model_copy(update={"stem": "opaque"})})
        ),
        "a norm before the blocks": plain(ln_pre=LN),
        "no norm behind the blocks": plain(ln_final=None),
        "the mean of the patches, and a norm of it": plain(pool="avg", ln_final=None, ln_pool=LN),
        "the mean of all tokens": plain(pool="avg", with_prefix=True),
        "class token and mean side by side": plain(pool="token_and_avg"),
        "pooling by attention": ModelSpec.model_validate(
            {**whole, "pool": PoolSpec(kind="attention", attn=attn, mlp=mlp, norm=LN)}
        ),
        "all tokens as output": plain(pool="none"),
        "no head": plain(n_classes=None),
        "images of one channel": plain(in_channels=1),
        "videos": plain(tubelet=2, frames=2),
    }


def page() -> str:
    """Return the page's text."""
    plain = ModelSpec.plain(**PLAIN)
    known = shapes(plain)
    lines = [HEAD, "| tensor | shape |", "| --- | --- |"]
    lines += [f"| `{name}` | {' '.join(map(str, shape))} |" for name, shape in known.items()]
    lines.append(FIELDS.rstrip("\n"))
    for words, spec in models().items():
        now = shapes(spec)
        new = [f"`{name}`{_shape(now.get(name))}" for name in folded(name for name in now if name not in known)]
        gone = [f"(`{name}`)" for name in folded(name for name in known if name not in now)]
        fields = ", ".join(f"`{field}`" for field in dict.fromkeys(differences(plain, spec)))
        lines.append(f"| {words} | {fields} | {', '.join([*new, *gone])} |")
    return "\n".join([*lines, TEXTS.rstrip("\n"), *texts()]) + "\n" + ROWS


def shapes(spec: AnySpec) -> dict[str, tuple[int, ...]]:
    """The canonical tensors of a spec, ``{l}`` for the layer."""
    with torch.device("meta"):
        model = build(spec)
    return {re.sub(r"^blocks\.\d+", "blocks.{l}", name): tuple(x.shape) for name, x in tensors_of(model).items()}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "" if shape is None else f" [{' '.join(map(str, shape)) or 'one number'}]"


def folded(names: Iterable[str]) -> list[str]:
    """Fold weight and bias of one part, and parts that differ in a number, into one name with marks."""
    names = list(names)
    both = [name.removesuffix("bias") for name in names if name.endswith(".bias")]
    marked = [
        f"{name.removesuffix('weight').removesuffix('bias')}{{*}}"
        if name.endswith((".weight", ".bias")) and name.removesuffix("weight").removesuffix("bias") in both
        else name
        for name in names
    ]
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "{n}", name) for name in marked))


def differences(one: BaseModel, other: BaseModel) -> Iterator[str]:
    """The fields in which two specs differ, as an adapter writes them."""
    for name in type(other).model_fields:
        old, new = getattr(one, name), getattr(other, name)
        pairs = zip(old, new, strict=True) if name == "blocks" else [(old, new)]
        for before, after in pairs:
            if before == after:
                continue
            if isinstance(before, BaseModel) and isinstance(after, BaseModel) and type(before) is type(after):
                yield from differences(before, after)
            else:
                yield f"{type(other).__name__}.{name}={_short(after)}"


def _short(value: object) -> str:
    return f"{type(value).__name__}(...)" if isinstance(value, BaseModel) else repr(value)
