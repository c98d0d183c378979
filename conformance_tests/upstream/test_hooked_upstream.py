"""Models without a canonical form: upstream's own module is hooked where it stands, and a broken map is caught."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from prisma_conformance import check
from prisma_conformance.registry import select
from prisma_conformance.run import run_check
from prisma_conformance.subject import Subject
from torch import Tensor, nn

from prisma_core import (
    HookError,
    InputError,
    NotApplicable,
    PrismaError,
    UnknownName,
    UnsupportedArchitecture,
    export,
    save,
)
from prisma_core.contract.adapter import MapAdapter
from prisma_core.contract.case import Case
from prisma_core.maps.places import FUSED, HookMap, Place
from prisma_core.maps.reader import Reader, qualified_name
from prisma_core.spec import MapSpec
from prisma_core.upstream import observer
from prisma_core.upstream.model import HookedUpstream
from prisma_core.zoo import adapt_with

pytestmark = pytest.mark.usefixtures("in_float64")

HEADS, WIDTH, WINDOW = 2, 8, 3


class Windows(nn.Module):
    """Attention in windows, as libraries write it: folded axes, edits in place, several results."""

    def __init__(self, fused: bool):
        super().__init__()
        self.fused = fused
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.bias = nn.Parameter(torch.zeros(3 * WIDTH))
        self.distance = nn.Parameter(torch.zeros(HEADS, WINDOW, WINDOW))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, n, _ = x.shape
        qkv = self.qkv(x)
        qkv += self.bias  # in place: what qkv gave out is no longer what it was
        q, k, v = qkv.view(batch * n // WINDOW, WINDOW, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=self.distance)
        else:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + self.distance
            z = scores.softmax(-1) @ v
        z = self.out(z.transpose(1, 2).reshape(batch, n, -1))
        return z, z.mean()


class Block(nn.Module):
    def __init__(self, fused: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Windows(fused)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 12), nn.ReLU(inplace=True), nn.Linear(12, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))[0]
        return x + self.mlp(self.norm2(x))


class Upstream(nn.Module):
    def __init__(self, fused: bool = True):
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList([Block(fused), Block(not fused)])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1)), 0


GRID = "batch pos d_model"
HEAD = "(batch window) head pos d_head -> batch window pos head d_head"
SQUARE = "(batch window) head query_pos key_pos -> batch window head query_pos key_pos"


def block_rows(n: int, fused: bool) -> str:
    at = f"blocks.{n}"
    inside = f"""
        {at}.attn @ softmax : in  ->  {at}.attn.hook_attn_scores  : {SQUARE}
        {at}.attn @ softmax       ->  {at}.attn.hook_pattern      : {SQUARE}  = softmax(attn_scores)
        {at}.attn @ matmul#1      ->  {at}.attn.hook_z            : {HEAD}
    """
    opened = f"""
        {at}.attn @ {FUSED} : scores   ->  {at}.attn.hook_attn_scores  : {SQUARE}
        {at}.attn @ {FUSED} : pattern  ->  {at}.attn.hook_pattern      : {SQUARE}  = softmax(attn_scores)
        {at}.attn @ {FUSED}            ->  {at}.attn.hook_z            : {HEAD}
    """
    return f"""
        {at} : in                 ->  {at}.hook_resid_pre        : {GRID}
        {at}.norm1                ->  {at}.ln1.hook_normalized   : {GRID}  = {at}.norm1(resid_pre)
        {at}.attn.qkv             ->  {at}.attn.hook_projected   : batch pos d_qkv  = {at}.attn.qkv(ln1.normalized)
        {at}.attn @ unbind        ->  {at}.attn.hook_q           : {HEAD}
        {at}.attn @ unbind : out1 ->  {at}.attn.hook_k           : {HEAD}
        {at}.attn @ unbind : out2 ->  {at}.attn.hook_v           : {HEAD}
        {opened if fused else inside}
        {at}.attn                 ->  {at}.hook_attn_out         : {GRID}
        {at} @ add                ->  {at}.hook_resid_mid        : {GRID}  = resid_pre + attn_out
        {at}.mlp.0                ->  {at}.mlp.hook_pre          : batch pos d_mlp  = {at}.mlp.0({at}.norm2(resid_mid))
        {at}.mlp.1                ->  {at}.mlp.hook_post         : batch pos d_mlp  = relu(pre)
        {at}.mlp                  ->  {at}.hook_mlp_out          : {GRID}  = {at}.mlp.2(mlp.post)
        {at}                      ->  {at}.hook_resid_post       : {GRID}
    """


class Adapter(MapAdapter):
    types = (f"{__name__}.Upstream",)

    def spec(self, upstream: Reader) -> MapSpec:
        return MapSpec(shape=(6, 4), sizes=((9, 4),), n_classes=upstream.head.out_features)

    def rows(self, upstream: Reader) -> str:
        rows = f"embed -> hook_embed : {GRID} = embed(input)\n"
        for n, block in enumerate(upstream.blocks):
            rows += block_rows(n, block.attn.fused)
        pooled = f"head : in -> hook_pooled : batch d_model = mean(blocks.{n}.resid_post)\n"
        return rows + pooled + "head -> hook_logits : batch class = head(pooled)"

    def hooks(self, upstream: Reader, spec: MapSpec) -> HookMap:
        return HookMap.parse(self.rows(upstream))

    def reference_places(self, upstream: Reader) -> HookMap:
        rows = [block_rows(n, False) for n, block in enumerate(upstream.blocks) if block.attn.fused]
        kept = [line for line in "\n".join(rows).splitlines() if "softmax" in line]
        return HookMap.parse("\n".join(kept))

    def unfused_attention(self, upstream: Any) -> Any:
        return StepByStep(upstream)

    def equations(self, upstream: Reader, acts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        for n, block in enumerate(upstream.blocks):
            q, k = acts[f"blocks.{n}.attn.hook_q"], acts[f"blocks.{n}.attn.hook_k"]
            scores = torch.einsum("bwqhd,bwkhd->bwhqk", q, k) * q.shape[-1] ** -0.5 + block.attn.distance
            yield f"blocks.{n}: scores = q . k * scale + distance", acts[f"blocks.{n}.attn.hook_attn_scores"], scores


class StepByStep:
    def __init__(self, upstream: nn.Module):
        self.attns = [module for module in upstream.modules() if isinstance(module, Windows) and module.fused]

    def __enter__(self) -> None:
        for attn in self.attns:
            attn.fused = False

    def __exit__(self, *exc: object) -> None:
        for attn in self.attns:
            attn.fused = True


@pytest.fixture
def upstream() -> Upstream:
    torch.manual_seed(0)
    model = Upstream()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.fixture
def model(upstream: Upstream) -> HookedUpstream:
    made = adapt_with(Adapter(), upstream)
    assert isinstance(made, HookedUpstream)
    return made


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))


# -------------------------------------------------------------------- the model


def test_without_hooks_it_is_upstream_to_the_bit(model, upstream, x):
    assert torch.equal(model(x), upstream(x)[0])
    assert not any(module.training for module in model.modules())
    assert model.sample_inputs(3, size=(9, 4))[0].shape == (3, 9, 4)
    assert model.sizes() == [(4,), (9, 4)]


def test_adapting_leaves_upstream_alone_and_sharing_shares_weights_only(upstream, x):
    shared = adapt_with(Adapter(), upstream, copy=False)
    assert shared.upstream is not upstream
    assert dict(shared.upstream.named_parameters())["head.weight"] is upstream.head.weight
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in upstream.modules())
    own = adapt_with(Adapter(), upstream)
    with torch.no_grad():
        upstream.head.weight.mul_(2)
    assert torch.equal(shared(x), upstream(x)[0])
    assert not torch.equal(own(x), upstream(x)[0])


def test_a_cache_holds_every_point_with_the_axes_it_names(model, x):
    logits, cache = model.run_with_cache(x)
    assert list(cache.keys()) == list(model.hook_points())
    for name, point in model.hook_points().items():
        assert cache[name].ndim == len(point.axes.split())
    assert cache["blocks.0.attn.hook_q"].shape == (2, 2, 3, 2, 4)
    assert cache["pattern", 1].shape == (2, 2, 2, 3, 3)
    assert torch.equal(cache["hook_logits"], logits)
    assert model.hook_points()["blocks.0.attn.hook_pattern"].equation == "softmax(attn_scores)"


def test_what_upstream_edits_in_place_stays_as_it_was_in_the_cache(model, upstream, x):
    _, cache = model.run_with_cache(x)
    block = upstream.blocks[0]
    projected = block.attn.qkv(cache["blocks.0.ln1.hook_normalized"])
    torch.testing.assert_close(cache["blocks.0.attn.hook_projected"], projected)
    assert (cache["blocks.0.mlp.hook_pre"] < 0).any()
    assert torch.equal(cache["blocks.0.mlp.hook_post"], cache["blocks.0.mlp.hook_pre"].relu())


@pytest.mark.parametrize("layer", [0, 1])  # the fused kernel, and its steps
def test_scores_and_patterns_can_be_written(model, upstream, x, layer):
    def nearest(scores, at):
        hidden = torch.ones(3, 3, dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, -torch.inf)

    name = f"blocks.{layer}.attn.hook_attn_scores"
    logits, cache = model.run_with_cache(x, hooks={name: nearest})
    assert not cache[f"blocks.{layer}.attn.hook_pattern"].triu(1).any()
    for block in upstream.blocks:
        block.attn.fused = False
    with torch.no_grad():
        upstream.blocks[layer].attn.distance += torch.full((3, 3), -torch.inf).triu(1)
    torch.testing.assert_close(logits, upstream(x)[0])


def test_a_kernel_is_opened_only_where_its_insides_are_wanted(model, x, monkeypatch):
    calls: list[str] = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, FUSED, lambda *a, **k: calls.append("fused") or real(*a, **k))
    model.run_with_cache(x, names="resid_mid")
    model.run_with_cache(x, names="q")
    assert calls == ["fused", "fused"]


def test_hooks_may_run_torch_functions_and_models(model, upstream, x):
    """What a hook calls is not upstream's: it is neither counted nor hooked."""
    other, clean = adapt_with(Adapter(), upstream), model(x)
    seen: list[str] = []

    def busy(activation, at):
        seen.append(at.name)
        torch.softmax(activation, -1) + torch.softmax(activation, -2)
        assert torch.equal(other(x), clean)
        assert len(other.run_with_cache(x)[1]) == len(model.hook_points())
        model.upstream.blocks[1](torch.zeros(1, 6, WIDTH))

    names = list(model.hook_points())
    torch.testing.assert_close(model.run_with_hooks(x, hooks=dict.fromkeys(names, busy)), clean)
    assert seen == names


def test_scopes_nest_and_nothing_is_left_behind(model, x):
    clean = model(x)
    with model.hooks({"blocks.0.hook_resid_pre": lambda a, at: a * 2}):
        outer = model(x)
        with pytest.raises(ZeroDivisionError):
            model.run_with_hooks(x, hooks={"blocks.1.attn.hook_pattern": lambda a, at: 1 / 0})
        assert torch.equal(model(x), outer)
    assert torch.equal(model(x), clean)
    assert not torch.equal(outer, clean)
    assert not any(point.wanted for point in model.hook_points().values())


def test_gradients_reach_every_point_and_stopping_early_stops(model, x):
    _, cache = model.run_with_cache(x, loss=lambda logits: logits[:, 0].square().sum())
    for name in model.hook_points():
        assert cache.grad[name].any(), name
    seen: list[str] = []
    with model.hooks({"hook_logits": lambda a, at: seen.append(at.name)}):
        output, cache = model.run_with_cache(x, names=("resid_post", 0), output=False)
    assert output is None
    assert not seen
    assert list(cache.keys()) == ["blocks.0.hook_resid_post"]


def test_a_copy_has_hook_points_of_its_own(model, x):
    twin = copy.deepcopy(model)
    assert list(twin.hook_points()) == list(model.hook_points())
    edited = twin.run_with_hooks(x, hooks={"blocks.0.attn.hook_v": lambda a, at: 0 * a})
    assert not torch.equal(edited, model(x))
    with model.hooks({"blocks.0.attn.hook_v": lambda a, at: 0 * a}):
        assert torch.equal(twin(x), twin(x.clone()))
        assert not torch.equal(twin(x), edited)


def test_threads_see_their_own_hooks_where_functions_are_watched(model, x):
    def run(factor: float) -> Tensor:
        return model.run_with_hooks(x, hooks={"blocks.0.attn.hook_pattern": lambda a, at: a * factor})

    alone = {factor: run(factor) for factor in (0.5, 2.0)}
    found: dict[float, list[Tensor]] = {0.5: [], 2.0: []}
    meet = threading.Barrier(2, timeout=60)

    def work(factor: float) -> None:
        for _ in range(3):
            meet.wait()
            found[factor].append(run(factor))

    workers = [threading.Thread(target=work, args=(factor,)) for factor in found]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(len(outputs) == 3 for outputs in found.values())
    assert all(torch.equal(output, alone[factor]) for factor, outputs in found.items() for output in outputs)


def test_weights_go_home_and_a_folder_cannot_hold_the_model(model, upstream, tmp_path):
    with torch.no_grad():
        model.upstream.head.bias.add_(1)
    state = export(model)
    assert list(state) == list(upstream.state_dict())
    upstream.load_state_dict(state, strict=True)
    assert torch.equal(upstream.head.bias, model.upstream.head.bias)
    with pytest.raises(UnsupportedArchitecture, match=r"keep what prisma\.export"):
        save(model, tmp_path)


def test_a_hook_in_a_compiled_model_is_refused(model, x, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert model(x).shape == (2, 5)
    with model.hooks({"hook_embed": lambda a, at: a}), pytest.raises(HookError, match="run it eagerly"):
        model.forward(x)


def test_unknown_names_are_suggested(model, x):
    with pytest.raises(UnknownName, match=r"hook_resid_mid|resid_mid"):
        model.run_with_cache(x, names="resid_middle")


# -------------------------------------------------------------------- tables that cannot be used


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("nothing -> hook_embed : batch pos d_model", "no module 'nothing'"),
        ("embed -> hook_embed", "must name its axes"),
        ("embed -> hook_embed : batch pos d -> batch (pos d)", "must name its axes"),
        ("embed -> hook_embed : a b c\nhead -> hook_embed : a b", "several rows for hook_embed"),
        ("blocks.{l} -> blocks.{l}.hook_resid_post : batch pos d_model", "leaves numbers open"),
        ("embed : scores -> hook_embed : a b c", "is not a place"),
        ("embed -> upstream.hook_embed : a b c", "is the model's own"),
    ],
)
def test_tables_that_cannot_be_used(upstream, rows, words):
    with pytest.raises(PrismaError, match=words):
        adapt_with(with_rows(lambda _: rows), upstream)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("embed -> hook_embed : batch d_model", r"has the axes 'batch d_model'.*holds \[2, 6, 8\]"),
        ("blocks.0.attn : out2 -> hook_embed : batch pos d_model", "No tensor passes"),
    ],
)
def test_rows_that_do_not_fit_what_passes(upstream, x, rows, words):
    with pytest.raises(PrismaError, match=words):
        adapt_with(with_rows(lambda _: rows), upstream).run_with_cache(x)


@pytest.mark.parametrize(
    ("how", "shape"),
    [
        (HEAD, (4, 2, 3, 5)),
        (SQUARE, (4, 2, 3, 3)),
        ("batch d_model row column -> batch row column d_model", (2, 4, 3, 5)),
        ("batch d_model 1 1 -> batch d_model", (2, 7, 1, 1)),
        ("batch pos (head d_head) -> batch pos head d_head", (2, 5, 6)),
        ("batch pos d_model", (2, 3, 4)),
    ],
)
def test_what_is_written_is_what_was_read(how, shape):
    (row,) = HookMap.parse(f"place -> hook_x : {how} = an equation").plain()
    sizes, x = {"batch": 2, "unused": 9} | ({"head": 3} if "(head" in how else {}), torch.randn(shape)
    seen = row.read(x, sizes)
    assert seen.ndim == len(row.axes.split())
    assert torch.equal(row.write(seen, sizes), x)
    assert row.equation == "an equation"


def test_one_of_several_results_is_read():
    place = Place.parse("attn @ unbind : out2")
    assert torch.equal(place.pick((), torch.arange(3).unbind(0)), torch.tensor(2))
    assert place.pick((), torch.arange(2).unbind(0)) is None
    assert Place.parse("attn : out1").pick((), torch.zeros(3)) is None


# -------------------------------------------------------------------- the kit


def with_rows(change: Callable[[str], str]) -> MapAdapter:
    class Changed(Adapter):
        def rows(self, upstream: Reader) -> str:
            return change(super().rows(upstream))

    return Changed()


def moved(old: str, new: str) -> MapAdapter:
    def change(rows: str) -> str:
        assert old in rows
        return rows.replace(old, new, 1)

    return with_rows(change)


def failing(adapter: MapAdapter, make: Any = adapt_with) -> set[str]:
    subject = Subject(Case("toy", Upstream), adapter, Upstream().eval(), make=make)
    return {one.name for one in select() if not (found := run_check(one, subject)).passed and not found.skipped}


def test_a_sound_map_passes_every_check_that_applies():
    report = check(Case("toy", Upstream), adapter=Adapter())
    assert report.passed, str(report)
    applied = {result.name for result in report.results if result.skipped is None}
    assert {result.name for result in report.results} - applied == {"spec.audit", "save.load", "preprocess"}
    assert report.certificate["parity.hooks"].detail.startswith("33 of 33")
    assert report.certificate.upstream == qualified_name(Upstream())


BROKEN = {
    "keys for queries": (moved("@ unbind        ->", "@ unbind : out1  ->"), "maps.proven"),
    "another layer's place": (moved("blocks.1 : in ", "blocks.0 : in "), "algebra"),
    "a place that only the norm reads": (moved("blocks.0 : in ", "blocks.0.norm1 : in "), "algebra"),
    "a sum that only the norm reads": (moved("blocks.1 @ add ", "blocks.1.norm2 : in "), "algebra"),
    "a dead place": (moved("blocks.0.attn.qkv             ", "blocks.0.attn : out1"), "hooks.live"),
    "a transposed pattern": (
        moved(
            f"blocks.1.attn.hook_pattern      : {SQUARE}",
            "blocks.1.attn.hook_pattern : (batch window) head k q -> batch window head q k",
        ),
        "algebra",
    ),
    "heads taken for positions": (
        moved(
            f"blocks.0.attn.hook_v           : {HEAD}", f"blocks.0.attn.hook_v : {HEAD.replace('pos head', 'head pos')}"
        ),
        "algebra",
    ),
    "the second sum for the first": (moved("blocks.0 @ add ", "blocks.0 @ add#1 "), "algebra"),
    "a call that never comes": (moved("blocks.0 @ add ", "blocks.0 @ add#2 "), "parity.hooks"),
    "rows out of order": (with_rows(lambda rows: "\n".join(reversed(rows.splitlines()))), "hooks.live"),
}


@pytest.mark.parametrize(("adapter", "caught_by"), BROKEN.values(), ids=BROKEN)
def test_a_broken_map_is_caught(adapter, caught_by):
    assert caught_by in failing(adapter)


def test_an_opened_kernel_that_nothing_vouches_for_is_caught():
    class Unproven(Adapter):
        def reference_places(self, upstream: Reader) -> HookMap:
            return HookMap((), {})

    assert failing(Unproven()) == {"parity.hooks"}


def test_a_kernel_opened_with_other_numbers_is_caught(monkeypatch):
    real = observer._unfused

    def wrong(run: Any, inside: Any, q: Tensor, *rest: Any, **options: Any) -> Tensor:
        return real(run, inside, 1.01 * q, *rest, **options)

    monkeypatch.setattr(observer, "_unfused", wrong)
    assert {"parity.hooks", "hooks.live"} <= failing(Adapter())


def test_a_model_that_is_not_a_copy_is_caught():
    def shared(adapter: MapAdapter, upstream: nn.Module) -> Any:
        return adapt_with(adapter, upstream, copy=False)

    assert failing(Adapter(), shared) == {"weights.accounted"}


def test_an_output_that_is_not_upstream_s_is_caught():
    class Other(Adapter):
        def output(self, result: Any) -> Tensor:
            return 2 * super().output(result)

    assert "parity.logits" in failing(Other())


# -------------------------------------------------------------------- what it does not take


class Painter(nn.Module):
    """Takes pictures of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 2, stride=2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(1))


@pytest.fixture
def painter() -> HookedUpstream:
    rows = "conv -> hook_embed : batch d_model row column\nhead -> hook_logits : batch class"
    return HookedUpstream(Painter(), HookMap.parse(rows), MapSpec(shape=(3, 4, 4)), lambda result: result)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.zeros(3, 4, 4), r"\[batch 3 4 4\], got shape \[3, 4, 4\]. Add a batch axis: image\[None\]"),
        (torch.zeros(2, 4), r"got shape \[2, 4\]"),
        (torch.zeros(1, 1, 4, 4), "Expected 3 channels"),
        (torch.zeros(1, 3, 6, 4), r"\[batch 3 4 4\], got shape \[1, 3, 6, 4\], on which upstream's code failed"),
        ("cat.jpg", "got str. model.preprocess makes one"),
        (None, "got NoneType"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "got torch.uint8"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.float16), "in torch.float64.*it is in torch.float16"),
        (torch.zeros(1, 3, 4, 4, device="meta"), "on cpu, where the model is; it is on meta"),
        (torch.full((1, 3, 4, 4), torch.nan), "48 values that are NaN"),
    ],
)
def test_inputs_are_refused_in_words(painter: HookedUpstream, given: Any, said: str) -> None:
    given = given.double() if isinstance(given, Tensor) and given.dtype == torch.float32 else given
    with pytest.raises(InputError, match=said):
        painter(given)
    with pytest.raises(InputError, match=said):
        painter.run_with_cache(given, names="logits", output=False)


def test_there_is_no_layer_to_start_at_and_no_layout(painter: HookedUpstream) -> None:
    x = torch.randn(1, 3, 4, 4)
    with pytest.raises(InputError, match="takes no 'start_at_layer'"):
        painter(x, start_at_layer=1)
    with pytest.raises(InputError, match="takes no 'stop_at_layer'"):
        painter.run_with_cache(x, stop_at_layer=1)
    with pytest.raises(InputError, match="takes no 'mask'"):
        painter(x, mask=x)
    assert painter.layout is None
    assert torch.equal(painter(x=x), painter(x))


def test_positions_and_heads_that_nothing_asked_for_has(model: HookedUpstream, x: Tensor) -> None:
    with pytest.raises(InputError, match=r"heads= chooses along the axis 'head', and nothing asked for has one: it is"):
        model.run_with_cache(x, names="resid_post", heads=[0])
    with pytest.raises(InputError, match="pos= chooses along"), model.caching("logits", pos=0):
        pass
    _, cache = model.run_with_cache(x, names=["resid_post", "z"], heads=[0])
    assert cache["z", 0].shape[-2] == 1  # and what has no heads is kept whole
    assert cache["resid_post", 0].shape == (2, 6, WIDTH)


def test_decompositions_say_that_there_is_no_canonical_form(model: HookedUpstream, x: Tensor) -> None:
    _, cache = model.run_with_cache(x)
    with pytest.raises(NotApplicable, match="need a canonical form, and this model"):
        cache.decompose_resid()


def test_weights_that_are_not_there_are_explained_and_parts_have_numbers(model: HookedUpstream) -> None:
    first = model.blocks[0]
    assert first.attn.hook_z is model.hook_points()["blocks.0.attn.hook_z"]
    assert [part is model.get_submodule(f"blocks.{n}") for n, part in enumerate(model.blocks)] == [True] * 2
    assert model.blocks[-1] is model.get_submodule("blocks.1")
    with pytest.raises(AttributeError, match=r"no attribute 'W_Q': a model without canonical form.*model\.upstream"):
        _ = first.attn.W_Q
    with pytest.raises(AttributeError, match=r"no attribute 'stages'.*Here there are .*blocks"):
        _ = model.stages
    with pytest.raises(AttributeError, match=r"model\.spec"):
        _ = model.cfg
    with pytest.raises(IndexError, match="No part 2 here: there are 0, 1"):
        _ = model.blocks[2]
