"""Everything runs where the model is, in its dtype: on a device that is not there, and in half precision.

``elsewhere`` holds numbers apart from the CPU's as a GPU does, so that a tensor made on the CPU in the middle of a pass
fails here as it would there. What needs a real GPU skips, with that reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import prisma_dino
import prisma_lens
import prisma_patch
import prisma_registers
import pytest
import torch
from elsewhere import DEVICE, Elsewhere, elsewhere
from models import VARIANTS
from models import build as variant_of
from prisma_conformance import Case, check, devices
from prisma_conformance.devices import exact
from prisma_conformance.randomise import randomise
from prisma_conformance.registry import select
from prisma_conformance.run import run_check
from prisma_conformance.subject import Subject
from torch import Tensor, nn

import prisma_core as prisma
from prisma_core import ActivationCache, HookContext, HookedViT, InputError
from prisma_core.inputs import Preprocess
from prisma_core.maps.places import HookMap
from prisma_core.maps.reader import qualified_name
from prisma_core.plugin.adapter import Adapter, MapAdapter
from prisma_core.plugin.host import installed
from prisma_core.spec import (
    AttentionSpec,
    BlockSpec,
    DualSpec,
    EmbedSpec,
    Interpolation,
    MapSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
    PoolSpec,
    RopeCount,
    RopeGrid,
    RopeSpec,
    TextPoolSpec,
    TextSpec,
)
from prisma_core.transformer import HookedDual, build, rewrites
from prisma_core.zoo import adapt_with, tensors_of

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and no CUDA device is here")
HALF = [torch.bfloat16, torch.float16]
LN = NormSpec(eps=1e-3)


@pytest.fixture
def device() -> Iterator[torch.device]:
    with elsewhere() as place:
        yield place


# -------------------------------------------------------------------- models


def block(width: int = 12, **facts: object) -> BlockSpec:
    attn = AttentionSpec(n_heads=2, n_kv_heads=2, d_head=6, scale=0.4)
    return BlockSpec.model_validate({"attn": attn, "mlp": MlpSpec(d_mlp=10, act="gelu"), "ln1": LN, "ln2": LN, **facts})


def vision(**facts: object) -> ModelSpec:
    given: dict[str, Any] = {
        "d_model": 12, "image_size": (8, 12), "embed": EmbedSpec(patch=(4, 4), interpolation=Interpolation()),
        "layout": prisma.TokenLayout(cls=1, registers=1, rows=2, columns=3), "blocks": (block(),) * 2,
        "ln_final": LN, "pool": PoolSpec(kind="token"), "d_pool": 12, "n_classes": 5,
    }  # fmt: skip
    return ModelSpec.model_validate(given | facts)


def text(**facts: object) -> TextSpec:
    given: dict[str, Any] = {"causal": True, "pool": TextPoolSpec(kind="argmax"), "n_classes": 5, "pad_id": 7}
    return TextSpec(d_model=12, n_vocab=30, n_ctx=7, blocks=(block(),) * 2, ln_final=LN, **given | facts)


FILM = {"layout": prisma.TokenLayout(cls=1, frames=2, rows=2, columns=3)}
TURNED = (block(attn=AttentionSpec(n_heads=2, n_kv_heads=2, d_head=8, scale=0.4)),) * 2
KINDS: dict[str, ModelSpec | TextSpec | DualSpec] = {
    "positions resized": vision(),
    "positions by axis": vision(embed=EmbedSpec(patch=(4, 4), pos_factorized=True, interpolation=Interpolation())),
    "patches pooled by attention": vision(
        pool=PoolSpec(kind="attention", attn=AttentionSpec(n_heads=2, n_kv_heads=2, d_head=6, scale=0.4))
    ),
    "turned by their place": vision(
        blocks=TURNED, rope=RopeSpec(layout="half", grid=RopeGrid(coordinates="centred", waves=(1.0, 3.0)))
    ),
    "turned by a count": vision(
        blocks=TURNED,
        rope=RopeSpec(
            layout="interleaved",
            grid=RopeGrid(coordinates="index", waves=(1.0, 3.0), reference=(2, 2), in_float32=True),
        ),
    ),
    "video": vision(**FILM, embed=EmbedSpec(patch=(4, 4), tubelet=2)),
    "video of any length": vision(
        **FILM,
        embed=EmbedSpec(patch=(4, 4), tubelet=2, pos=False, any_length=True),
        rope=RopeSpec(layout="interleaved", grid=RopeCount(pairs=1, theta=100.0, rows=2, columns=3)),
    ),
    "causal text": text(),
    "text read both ways": text(causal=False, pool=TextPoolSpec(kind="avg")),
    "text counted by its words": text(causal=False, pos_by_text=True, pool=TextPoolSpec(kind="first")),
    "text with an end": text(suffix=True, pool=TextPoolSpec(kind="last")),
    "text to its end": text(pool=TextPoolSpec(kind="eos", eos_id=3)),
    "pictures and texts": DualSpec(vision=vision(), text=text(), logit_bias=True),
}


def drawn(spec: ModelSpec | TextSpec | DualSpec) -> Any:
    return randomise(build(spec), torch.Generator().manual_seed(0)).eval()


def inputs_of(model: Any, place: torch.device | str, dtype: torch.dtype, **size: Any) -> tuple[Tensor, ...]:
    given = model.sample_inputs(2, generator=torch.Generator().manual_seed(1), **size)
    return tuple(x.to(place, dtype if x.is_floating_point() else None) for x in given)


def every(model: Any) -> list[list[str]]:
    """Return what can be asked for at once: all plain points, then each kind of derived ones."""
    points = model.hook_points()
    derived = [name for name, point in points.items() if point.derived]
    return [[name for name in points if name not in derived], *([derived] if derived else [])]


def total(output: Any) -> Tensor:
    return output.square().sum()


# -------------------------------------------------------------------- what is asked of each


def passes(model: Any, place: torch.device, dtype: torch.dtype) -> None:
    """Run everything that a pass can do, and look where its tensors lie, in which dtype."""

    def held(cache: ActivationCache, like: ActivationCache | None = None) -> None:
        for name, x in cache.items():
            assert x.device == place, name
            assert x.dtype == dtype, name
            assert bool(torch.isfinite(x).any()), name

    def halved(x: Tensor, at: HookContext) -> Tensor:
        return x * 0.5

    def doubled(x: Tensor, at: HookContext) -> None:
        x.mul_(2)

    sizes = model.sizes()
    for size in sizes:
        given = inputs_of(model, place, dtype, size=size)
        assert model(*given).device == place
    given = inputs_of(model, place, dtype)
    for names in every(model):
        with torch.no_grad():
            output, cache = model.run_with_cache(*given, names=names)
        assert output.device == place
        assert output.dtype == dtype
        held(cache)
        edited = model.run_with_hooks(
            *given, hooks={name: (halved, doubled)[index % 2] for index, name in enumerate(names)}
        )
        assert edited.device == place
        _, cache = model.run_with_cache(*given, names=names, loss=total)
        held(cache.grad)
    tokens = [name for name, point in model.hook_points().items() if {"pos", "query_pos"} & set(point.axes.split())]
    _, cache = model.run_with_cache(*given, names=tokens[:3], pos=[0, -1])
    held(cache)


def decompositions(model: Any, place: torch.device, dtype: torch.dtype) -> None:
    given = inputs_of(model, place, dtype)
    _, cache = model.run_with_cache(*given)
    found = [
        cache.decompose_resid(layer=-1)[0], cache.accumulated_resid(layer=-1)[0], cache.stack_head_results()[0],
        cache.stack_neuron_results(layer=-1)[0], cache.logit_attrs(cache.decompose_resid(layer=-1)[0], [0, 1]),
    ]  # fmt: skip
    lens = prisma_lens.logit_lens(model, cache)
    found += [lens.logits]
    found += [prisma_lens.logit_attribution(model, cache, [0, 1]).values]
    found += [model.W_Q, model.OV.AB, model.QK.A]
    for x in found:
        assert x.device == place
        assert x.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_all_runs_where_the_model_is(kind: str, device: torch.device) -> None:
    model = drawn(KINDS[kind]).to(device)
    assert all(isinstance(x, Elsewhere) for x in tensors_of(model).values())
    passes(model, device, torch.float32)


@pytest.mark.parametrize("part", VARIANTS)
def test_each_part_runs_where_the_model_is(part: str, device: torch.device) -> None:
    passes(variant_of(**VARIANTS[part], layers=1).to(device), device, torch.float32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_all_runs_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    """A cache holds the model's own dtype, at every hook point."""
    passes(drawn(KINDS[kind]).to(dtype), torch.device("cpu"), dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("part", VARIANTS)
def test_each_part_runs_in_half_precision(part: str, dtype: torch.dtype) -> None:
    passes(variant_of(**VARIANTS[part], layers=1).to(dtype), torch.device("cpu"), dtype)


WHOLE = ["positions resized", "video", "causal text"]


@pytest.mark.parametrize("kind", WHOLE)
@torch.no_grad()
def test_decompositions_stay_where_the_model_is(kind: str, device: torch.device) -> None:
    decompositions(drawn(KINDS[kind]).to(device), device, torch.float32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", WHOLE)
@torch.no_grad()
def test_decompositions_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    decompositions(drawn(KINDS[kind]).to(dtype), torch.device("cpu"), dtype)


def techniques(model: HookedViT, place: torch.device, dtype: torch.dtype) -> None:
    """Patch, rewrite, and change registers: all of it where the model is."""
    (images,) = inputs_of(model, place, dtype)
    metric = prisma_patch.logit_difference(0, 1)
    sweep = {"pos": [0, 2], "over": "layer"}
    effects = {
        at: prisma_patch.activation_patch(model, images, images.flip(0), metric, at=at, **sweep).values
        for at in ("resid_pre", "z")
    }
    effects["heads"] = prisma_patch.patch_heads(model, images, images[:1], metric).values
    folded = rewrites.rewrite(model, rewrites.fold_layer_norm, rewrites.center_writing_weights)
    effects["folded"] = folded(images)
    effects["norms"] = prisma_registers.token_norms(model, images).norms
    effects["to registers"] = prisma_registers.attention_to(model, images, "registers")
    neurons = prisma_registers.register_neurons(model, images, top=2, factor=0.5)
    scopes = {
        "without": prisma_registers.without_registers(model),
        "extra": prisma_registers.extra_registers(model, 2),
        "moved": prisma_registers.registers_at_test_time(model, neurons or [prisma_registers.Neuron(0, 1)]),
    }
    for name, scope in scopes.items():
        with scope as changed:
            effects[name] = changed(images)
    effects |= {f"layer {n}": x for n, x in enumerate(prisma_dino.last_layers(model, images, 2))}
    effects["linear"] = prisma_dino.linear_input(model, images, 2)
    for name, x in effects.items():
        assert x.device == place, name
        assert x.dtype == dtype, name


@torch.no_grad()
def test_techniques_stay_where_the_model_is(device: torch.device) -> None:
    techniques(drawn(KINDS["positions resized"]).to(device), device, torch.float32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@torch.no_grad()
def test_techniques_in_half_precision(dtype: torch.dtype) -> None:
    techniques(drawn(KINDS["positions resized"]).to(dtype), torch.device("cpu"), dtype)


def zero_shot(place: torch.device | str, dtype: torch.dtype) -> None:
    model: HookedDual = drawn(KINDS["pictures and texts"]).to(place, dtype)
    model.preprocess = Preprocess(size=(8, 12))
    model.tokenizer = lambda texts: torch.tensor([[1, 2, 4 + len(each) % 3, 7, 7, 7, 7] for each in texts])
    pictures = list(np.random.default_rng(0).integers(0, 256, (2, 9, 14, 3), dtype=np.uint8))
    chances = model.classify(pictures, ["cat", "elephant"])
    assert (chances.device.type, chances.dtype) == (torch.device(place).type, dtype)
    torch.testing.assert_close(chances.float().cpu().sum(-1), torch.ones(2), rtol=0, atol=0.02)
    assert model.encode_text("cat").dtype == dtype


@torch.no_grad()
def test_texts_go_where_the_model_is(device: torch.device) -> None:
    zero_shot(device, torch.float32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@torch.no_grad()
def test_zero_shot_in_half_precision(dtype: torch.dtype) -> None:
    zero_shot("cpu", dtype)


# -------------------------------------------------------------------- the kit itself


class Upstream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.shifted(x + self.mlp(x).relu()).mean(1))

    def shifted(self, x: Tensor) -> Tensor:
        return x


class Careless(Upstream):
    def shifted(self, x: Tensor) -> Tensor:
        return x + torch.arange(x.shape[1])[:, None]  # made on the CPU, wherever x is


class Mapped(MapAdapter):
    types = (qualified_name(Upstream()), qualified_name(Careless()))

    def spec(self, upstream: Any) -> MapSpec:
        return MapSpec(shape=(6, 4), n_classes=5)

    def hooks(self, upstream: Any, spec: Any) -> HookMap:
        return HookMap.parse(
            """
            embed       ->  blocks.0.hook_resid_pre   : batch pos d_model
            mlp         ->  blocks.0.mlp.hook_pre     : batch pos d_mlp
            head : in   ->  hook_pooled               : batch d_model
            head        ->  hook_logits               : batch class
            """
        )


def subject(upstream: type[nn.Module], adapter: Adapter, **given: Any) -> Subject:
    return Subject(Case(upstream.__name__, upstream), adapter, upstream(), **given)


def test_a_mapped_model_runs_where_it_is(device: torch.device) -> None:
    found = subject(Upstream, Mapped(), device=device)
    for name in ("parity.logits", "parity.hooks", "parity.gradients"):
        assert run_check(select(name)[0], found).passed, run_check(select(name)[0], found).detail
    model = adapt_with(Mapped(), Upstream().to(device))
    passes(model, device, torch.float32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_mapped_model_in_half_precision(dtype: torch.dtype) -> None:
    found = subject(Upstream, Mapped(), dtypes=[dtype])
    result = run_check(select("parity.logits")[0], found)
    assert result.passed, result.detail
    assert [(one.dtype, one.equal) for one in result.precisions] == [(str(dtype).removeprefix("torch."), True)]


def test_the_kit_runs_on_another_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "machine", lambda place: f"made up for {place}")
    case = next(case for case, _ in installed().cases({"toy"}) if case.name == "published-norms")
    report = check(case, device=device, checks=["parity.*", "weights.*", "algebra", "save.load"])
    assert report.passed, str(report)
    assert report.certificate.device == "cuda:0"
    assert report.certificate.machine == "made up for cuda:0"
    assert {one.dtype for one in report.certificate["parity.logits"].precisions} == {"float32", "bfloat16", "float16"}


# -------------------------------------------------------------------- it can fail


def test_what_is_made_on_the_cpu_inside_a_pass_is_caught(device: torch.device) -> None:
    result = run_check(select("parity.hooks")[0], subject(Careless, Mapped(), device=device))
    assert not result.passed
    assert "same device, found cuda:0 and cpu, in aten::add" in result.detail
    with pytest.raises(RuntimeError, match="same device"):
        Careless().to(device)(torch.zeros(1, 6, 4).to(device))
    Careless()(torch.zeros(1, 6, 4))


def test_two_devices_do_not_mix(device: torch.device) -> None:
    there, here = torch.ones(2, 3).to(device), torch.ones(2, 3)
    assert there.device == DEVICE
    mixed: list[Callable[[], Tensor]] = [
        lambda: there + here,
        lambda: here @ there.T,
        lambda: here[there[0].long()],
        lambda: torch.cat([there, here]),
    ]
    for mixing in mixed:
        with pytest.raises(RuntimeError, match="same device"):
            mixing()
    with pytest.raises(TypeError, match="to numpy"):
        there.numpy()
    with pytest.raises(TypeError, match="to numpy"):
        np.asarray(there)
    assert torch.equal((there + 1).cpu(), here + 1)
    assert (there * torch.tensor(2.0)).device == DEVICE  # a number without axes may come along
    model = drawn(KINDS["positions resized"]).to(device)
    with pytest.raises(InputError, match=r"on cuda:0, where the model is; it is on cpu"):
        model(torch.zeros(1, 3, 8, 12))


def _set(index: Any, value: Any) -> Callable[[Tensor], Tensor]:
    def write(x: Tensor) -> Tensor:
        x = x.clone()
        x[index] = value
        return x

    return write


MADE_BELOW_PYTHON: dict[str, Callable[[Tensor], Tensor]] = {
    "x[0] = number": _set(0, 1.5),
    "x[0, 1] = number": _set((0, 1), 2),
    "x[:] = number": _set(slice(None), 3),
    "x[list] = number": _set([0, 2], 4),
    "x[:, list] = tensor without axes": _set((slice(None), [0, 2]), torch.tensor(5.0)),
    "x[index] = number": _set(torch.tensor([1, 2]), 6),
    "x[mask] = number": lambda x: _set(x > 0, 7)(x),
    "x[list]": lambda x: x[[0, 2]],
    "x[:, list]": lambda x: x[:, [2, 0]],
    "where": lambda x: torch.where(x > 0, x, -1.0) + torch.where(x > 1, 0.25, x) + x.where(x > 2, 0.5),
    "new_tensor": lambda x: x * x.new_tensor([[1.5], [2.5], [3.5]]),
}


@pytest.mark.parametrize("way", MADE_BELOW_PYTHON)
def test_numbers_and_lists_go_to_the_device_as_torch_sends_them(way: str, device: torch.device) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    there = MADE_BELOW_PYTHON[way](x.to(device))
    assert there.device == DEVICE
    assert torch.equal(there.cpu(), MADE_BELOW_PYTHON[way](x))


def test_a_tensor_without_numbers_is_said_to_be_one(device: torch.device) -> None:
    with pytest.raises(RuntimeError, match="on meta, has no numbers, in aten::index"):
        torch.ones(3, 4).to(device)[True]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_arithmetic_worse_than_upstreams_is_caught_in_half_precision(dtype: torch.dtype) -> None:
    """What float64 cannot show: products rounded once more."""

    class Rounded(Upstream):
        def forward(self, x: Tensor) -> Tensor:
            coarse = torch.float8_e4m3fn if x.dtype == torch.bfloat16 else torch.bfloat16
            x = x if x.dtype == torch.float64 else x.to(coarse).to(x.dtype)
            return super().forward(x)

    found = subject(Upstream, Mapped(), dtypes=[dtype])

    def make(adapter: Adapter, upstream: nn.Module) -> Any:
        upstream.__class__ = Rounded
        made = adapt_with(adapter, upstream)
        upstream.__class__ = Upstream
        return made

    Mapped.types = (*Mapped.types, qualified_name(Rounded()))
    result = run_check(select("parity.logits")[0], found.variant(found.adapter, make))
    assert not result.passed
    assert "more than 1.5 times that" in result.detail


# -------------------------------------------------------------------- how a run is set up


def test_tensorfloat_is_off_during_checks_and_as_before_afterwards() -> None:
    def state() -> list[object]:
        matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
        return [matmul.fp32_precision, conv.fp32_precision, torch.backends.cudnn.deterministic]

    seen: list[list[object]] = []

    class Seen(Upstream):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(state())
            return super().forward(x)

    class Adapter(Mapped):
        types = (qualified_name(Seen()),)

    before = state()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        changed = state()
        found = subject(Seen, Adapter())
        run_check(select("parity.logits")[0], found)
        assert state() == changed
    finally:
        torch.backends.cuda.matmul.fp32_precision = before[0]
    assert seen
    assert all(each == ["ieee", "ieee", True] for each in seen)
    with pytest.raises(ZeroDivisionError), exact():
        raise ZeroDivisionError
    assert state() == before


def test_a_device_that_fails_is_said_to_and_ends_no_run() -> None:
    class Full(Upstream):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    class Adapter(Mapped):
        types = (qualified_name(Full()),)

    result = run_check(select("parity.logits")[0], subject(Full, Adapter()))
    assert not result.passed
    assert result.detail == "cpu has not enough memory for this model: CUDA out of memory"


def test_devices_and_dtypes_that_are_none() -> None:
    with pytest.raises(InputError, match="No device 'abacus' here; there is cpu"):
        check("toy:scenes-3l", device="abacus")
    with pytest.raises(InputError, match="float32, bfloat16, float16; got 'int8'"):
        check("toy:scenes-3l", dtypes=["int8"])


@GPU
def test_on_a_gpu() -> None:
    case = next(case for case, _ in installed().cases({"toy"}) if case.name == "published-norms")
    report = check(case, device="cuda")
    assert report.passed, str(report)
    assert torch.cuda.get_device_name() in report.certificate.machine
    passes(drawn(KINDS["positions resized"]).to("cuda:0"), torch.device("cuda:0"), torch.float32)
