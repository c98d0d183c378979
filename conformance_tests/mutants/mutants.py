"""Broken adapters, each with one mistake, and the check that claims to catch it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from types import MethodType
from typing import Any

import timm
import torch
from einops import rearrange
from prisma_conformance import Case, Images
from prisma_conformance.subject import Subject
from torch import Tensor, nn

from prisma_core import HookedViT, HookPoint, ModelSpec
from prisma_core.contract.adapter import Adapter
from prisma_core.hooks.model import Site
from prisma_core.host import installed
from prisma_core.inputs import Preprocess
from prisma_core.maps.places import HookMap
from prisma_core.maps.reader import Reader
from prisma_core.maps.rule import Rule
from prisma_core.maps.weights import WeightMap
from prisma_core.transformer.block import head_inputs
from prisma_core.zoo import adapt_with

# -------------------------------------------------------------------- models to break


def _plain() -> nn.Module:
    """Class token, two registers, layer scale, a size that follows the image."""
    return timm.models.vision_transformer.VisionTransformer(
        img_size=(32, 48), patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=7,
        reg_tokens=2, init_values=0.1, dynamic_img_size=True,
    )  # fmt: skip


def _single() -> nn.Module:
    """One block, for the compiler, which takes long."""
    return timm.models.vision_transformer.VisionTransformer(
        img_size=(32, 48), patch_size=8, embed_dim=24, depth=1, num_heads=3, num_classes=7
    )


def _averaged() -> nn.Module:
    """Patches averaged, the norm after it."""
    return timm.models.vision_transformer.VisionTransformer(
        img_size=(32, 48), patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=7,
        global_pool="avg", reg_tokens=1,
    )  # fmt: skip


def _rotary() -> nn.Module:
    """Rotary positions and a gated MLP."""
    return timm.create_model(
        "eva02_tiny_patch14_224", depth=2, embed_dim=24, num_heads=3, img_size=(42, 56), num_classes=7
    )


def _pooled() -> nn.Module:
    """Attention pooling, queries and keys normed."""
    return timm.models.vision_transformer.VisionTransformer(
        img_size=(32, 48), patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=7,
        global_pool="map", qk_norm=True,
    )  # fmt: skip


def _images(model: nn.Module) -> Images:
    config = {"input_size": (3, 40, 56), "crop_pct": 0.9, "interpolation": "bicubic", "mean": (0.4, 0.5, 0.6)}
    ours = Preprocess(size=(40, 56), crop=0.9, interpolation="bicubic", mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.1))
    return Images(ours, timm.data.create_transform(**config, std=(0.3, 0.2, 0.1)))


CASES = {
    "plain": Case("plain", _plain, images=_images),
    "averaged": Case("averaged", _averaged),
    "rotary": Case("rotary", _rotary),
    "pooled": Case("pooled", _pooled),
    "single": Case("single", _single),
}


@cache
def built(case: str) -> tuple[nn.Module, Adapter]:
    upstream = CASES[case].build()
    return upstream, installed().adapter(upstream)


# -------------------------------------------------------------------- how to break them


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        name: what is wrong.
        check: the check that claims to catch it.
        says: what the check must find, in its own words.
        case: the model it is made in.
        spec, table, hooks: the mistake in the adapter's facts, weight map or hook map.
        make: the mistake in how the hooked model comes out.
        reads: a mistake in what the adapter reads.
        images: a mistake in the preprocessing.
        remedy: what the parity doctor must say would help.
    """

    name: str
    check: str
    says: str
    case: str = "plain"
    spec: Callable[[ModelSpec], ModelSpec] = lambda spec: spec
    table: Callable[[WeightMap], WeightMap] = lambda table: table
    hooks: Callable[[HookMap], HookMap] = lambda table: table
    edit: Callable[[HookedViT], object] = lambda model: None
    before: Callable[[nn.Module], object] = lambda upstream: None
    reads: Callable[[Reader], object] = lambda reader: None
    images: Callable[[nn.Module], Images] | None = None
    remedy: str | None = None

    def subject(self) -> Subject:
        upstream, adapter = built(self.case)
        case = CASES[self.case]
        if self.images is not None:
            case = replace(case, images=self.images)
        return Subject(case, Broken(adapter, self), upstream, make=self.make, seed=1)

    def make(self, adapter: Adapter, upstream: nn.Module) -> HookedViT:
        self.before(upstream)
        model = adapt_with(adapter, upstream)
        with torch.no_grad():
            self.edit(model)
        return model


class Broken(Adapter):
    """An adapter with a mistake in it."""

    types = ()

    def __init__(self, inner: Adapter, mutant: Mutant):
        self.inner = inner
        self.mutant = mutant
        self.types = inner.types  # type: ignore[misc]
        self.ignored = inner.ignored  # type: ignore[misc]

    def spec(self, upstream: Reader) -> ModelSpec:
        spec = self.mutant.spec(self.inner.spec(upstream))
        self.mutant.reads(upstream)
        return spec

    def weights(self, upstream: Reader, spec: ModelSpec) -> WeightMap:
        table = self.mutant.table(self.inner.weights(upstream, spec))
        self.mutant.reads(upstream)
        return table

    def hooks(self, upstream: Reader, spec: ModelSpec) -> HookMap:
        table = self.mutant.hooks(self.inner.hooks(upstream, spec))
        self.mutant.reads(upstream)
        return table

    def stem(self, upstream: Reader, spec: ModelSpec) -> nn.Module | None:
        return self.inner.stem(upstream, spec)

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return self.inner.unfused_attention(upstream)


def block(part: str, **update: Any) -> Callable[[ModelSpec], ModelSpec]:
    """Return a change of one part of every block."""

    def change(spec: ModelSpec) -> ModelSpec:
        changed = (b.model_copy(update={part: getattr(b, part).model_copy(update=update)}) for b in spec.blocks)
        return spec.model_copy(update={"blocks": tuple(changed)})

    return change


def blocks(**update: Any) -> Callable[[ModelSpec], ModelSpec]:
    return lambda spec: spec.model_copy(update={"blocks": tuple(b.model_copy(update=update) for b in spec.blocks)})


def part(name: str, **update: Any) -> Callable[[ModelSpec], ModelSpec]:
    return lambda spec: spec.model_copy(update={name: getattr(spec, name).model_copy(update=update)})


def parameters(model: nn.Module, ending: str) -> Iterator[nn.Parameter]:
    found = [parameter for name, parameter in model.named_parameters() if name.endswith(ending)]
    assert found, ending
    return iter(found)


def ignoring(sources: str, target: str | None = None) -> Callable[[WeightMap], WeightMap]:
    """Return a change that ignores a source, and fills its target with zeros or drops the rule."""

    def change(table: WeightMap) -> WeightMap:
        rules = [rule for rule in table.rows if sources not in (name for options in rule.sources for name in options)]
        assert len(rules) == len(table.rows) - 1, f"{sources}: no such rule"
        rules += [Rule((("zeros",),), (target,))] if target else []
        return replace(table, rows=tuple(rules), ignored={**table.ignored, sources: "thought not to matter"})

    return change


def swap_queries_and_keys(model: HookedViT) -> None:
    for ending in ("qkv.weight", "qkv.bias"):
        for tensor in parameters(model, ending):
            q, k, v = tensor.detach().clone().chunk(3)
            tensor.copy_(torch.cat([k, q, v]))


def transpose_grid(model: HookedViT) -> None:
    """Positions column by column."""
    n, layout = model.layout.n_prefix, model.layout
    pos = model.embed.pos_embed
    turned = rearrange(pos[n:].detach().clone(), "(c r) d -> (r c) d", r=layout.rows, c=layout.columns)
    pos[n:].copy_(turned)


def detach_mlp(model: HookedViT) -> None:
    mlp = model.blocks[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x.detach())


def unspoken_point(model: HookedViT) -> None:
    """A hook point that no equation and no row speaks of."""
    layer: Any = model.blocks[0]
    forward, layer.hook_extra = layer.forward, HookPoint("batch pos d_model", "whatever this is")
    layer.forward = lambda *given: layer.hook_extra(forward(*given))


def scale_after_hook(model: HookedViT) -> None:
    """``hook_attn_out`` before layer scale: not what is added to the stream."""
    for layer in model.blocks:
        layer.ls1, layer.hook_attn_out, scale, point = nn.Identity(), None, layer.ls1, layer.hook_attn_out

        class Swapped(HookPoint):
            def __call__(self, x: Tensor, scale: Any = scale) -> Tensor:
                return scale(super().__call__(x))

        layer.hook_attn_out = like(point, Swapped)


def add_in_place(model: HookedViT) -> None:
    """The stream is added to in place, under the feet of whoever kept it; by a class, which nobody sees."""

    def forward(layer: Any, x: Tensor, rope: Any = None, mask: Tensor | None = None) -> Tensor:
        x = layer.hook_resid_pre(x)
        x = x if x.requires_grad else x.data
        normed = layer.ln1(x)
        points = (layer.hook_q_input, layer.hook_k_input, layer.hook_v_input)
        (inputs,) = head_inputs(x, layer.spec, *points)
        attn_out = layer.hook_attn_out(layer.ls1(layer.attn(normed, rope, inputs)))
        x = x + attn_out if x.requires_grad else x.add_(attn_out)
        x = layer.hook_resid_mid(x)
        return layer.hook_resid_post(x + layer.hook_mlp_out(layer.ls2(layer.mlp(layer.ln2(x)))))

    model.blocks[0].__class__ = type("Adding", (type(model.blocks[0]),), {"forward": forward})


# -------------------------------------------------------------------- broken hook points


def like(point: HookPoint, kind: type[HookPoint]) -> HookPoint:
    other = kind(point.axes, point.equation, derived=point.derived)
    other.order = point.order
    return other


def point(path: str, kind: type[HookPoint]) -> Callable[[HookedViT], None]:
    """Return a change that replaces a hook point by one of another kind."""

    def change(model: HookedViT) -> None:
        where, _, name = path.rpartition(".")
        holder = model.get_submodule(where)
        setattr(holder, name, like(getattr(holder, name), kind))

    return change


class Ignoring(HookPoint):
    def __call__(self, x: Tensor) -> Tensor:
        super().__call__(x)
        return x


class Squared(HookPoint):
    """Shows the square of what passes."""

    def __call__(self, x: Tensor) -> Tensor:
        super().__call__(x.square())
        return x


class Softened(HookPoint):
    """Shows the softmax of what passes."""

    def __call__(self, x: Tensor) -> Tensor:
        super().__call__(x.softmax(-1))
        return x


class Doubled(HookPoint):
    """Shows twice what passes."""

    def __call__(self, x: Tensor) -> Tensor:
        super().__call__(2 * x)
        return x


class Halving(HookPoint):
    """Passes half of an edit on."""

    def __call__(self, x: Tensor) -> Tensor:
        return (x + super().__call__(x)) / 2


class Silent(HookPoint):
    def __call__(self, x: Tensor) -> Tensor:
        return x


class Twice(HookPoint):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(super().__call__(x))


class Rounding(HookPoint):
    """Moves the activation a little whenever it is looked at."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * (1 + 1e-12) if self.wanted else x


class Cutting(HookPoint):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x).detach()


class Sticky(HookPoint):
    """Fails once, changed for ever."""

    def __call__(self, x: Tensor) -> Tensor:
        try:
            return super().__call__(x) * getattr(self, "factor", 1)
        except BaseException:
            self.factor = 2.0
            raise


class Shared(HookPoint):
    """Keeps on the model whose turn it is."""

    def __call__(self, x: Tensor) -> Tensor:
        self.turn = threading.get_ident()
        y = super().__call__(x)
        return y if self.turn == threading.get_ident() else y * 1.5


class Uncompiled(HookPoint):
    """Quietly ignores hooks in a compiled model."""

    def __call__(self, x: Tensor) -> Tensor:
        made = super().__call__(x)
        return x if torch.compiler.is_compiling() else made


def exchange(path: str, other: str, what: str) -> Callable[[HookedViT], None]:
    """Return a change that exchanges the names or the order of two hook points."""

    def change(model: HookedViT) -> None:
        points = model.hook_points()
        if what == "order":
            points[path].order, points[other].order = points[other].order, points[path].order
        else:
            model._sites = MethodType(sites, model)

    def sites(model: HookedViT) -> dict[str, Site]:
        right = type(model)._sites(model)
        return right | {path: right[other], other: right[path]}

    return change
