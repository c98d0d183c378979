"""Models without a canonical form: upstream's own module is hooked where it stands."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from windows import WIDTH, Adapter

from prisma_core import (
    HookError,
    UnknownName,
    UnsupportedArchitecture,
    export,
    save,
)
from prisma_core.maps.places import FUSED
from prisma_core.zoo import adapt_with

pytestmark = pytest.mark.usefixtures("in_float64")


def test_without_hooks_it_is_upstream_to_the_bit(model, upstream, x):
    assert torch.equal(model(x), upstream(x)[0])
    assert not any(module.training for module in model.modules())
    assert model.sample_inputs(3, size=(9, 4))[0].shape == (3, 9, 4)
    assert model.sizes() == [(4,), (9, 4)]


def test_its_repr_is_short_and_its_parts_show_their_hook_points(model):
    lines = repr(model).splitlines()
    assert len(lines) == 5
    assert type(model.upstream).__name__ in lines[2]
    assert f"{len(model.hook_points())} hook points" in lines[3]
    assert "blocks" in lines[3]
    part = repr(model.blocks[0].attn)
    assert "  hook_pattern" in part
    assert part.splitlines()[0] == f"{len(part.splitlines()) - 1} hook points"
    assert repr(model.blocks).count("hook_pattern") == 1
    assert "<td>hook_pattern</td>" in model.blocks[0].attn._repr_html_()


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_half_precision_is_attended_as_by_the_kernel(upstream, x, dtype, grad):
    """Scores beyond float16, and patterns that differ by less than a rounding of it."""
    with torch.no_grad():
        upstream.blocks[0].attn.qkv.weight.mul_(200)
    model, x = adapt_with(Adapter(), upstream.to(dtype)), x.to(dtype)
    points = ["blocks.0.attn.hook_attn_scores", "blocks.0.attn.hook_pattern"]
    with torch.set_grad_enabled(grad):
        plain = model(x)
        output, cache = model.run_with_cache(x, names=points)
        hooked = model.run_with_hooks(x, hooks=dict.fromkeys(points, lambda a, at: a))
    assert not cache["attn_scores", 0].isfinite().all() or dtype == torch.bfloat16
    assert {a.dtype for a in cache.values()} == {dtype}
    for other in (output, hooked):
        assert (other - plain).abs().max() <= 4 * torch.finfo(dtype).eps * plain.abs().max()
