"""A cache holds how activations are made of others in it, and the numbers are those of the pass, to the bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import prisma_core as prisma
from prisma_core import ActivationCache, InputError
from prisma_core.transformer.norm import Norm
from prisma_core.transformer.recipes import STEPS, Recipe, RecipeKeep
from prisma_core.transformer.stream import StreamCache


@pytest.fixture
def stored(monkeypatch):
    """Return the cache of a pass in which every activation is stored."""

    def run(model, *inputs, **how):
        with monkeypatch.context() as patch:
            patch.setattr(RecipeKeep, "derive", lambda *how: None)
            cache = model.run_with_cache(*inputs, **how)[1]
        assert recipes(cache) == []
        return cache

    return run


def recipes(cache):
    return [name for name, entry in cache.store.data.items() if isinstance(entry, Recipe)]


def assert_same(left, right):
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("graph", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_kind_of_model_has_the_numbers_of_the_pass(variant, image, stored, dtype, graph):
    variant, image = variant.to(dtype), image.to(dtype)
    with torch.set_grad_enabled(graph):
        _, cache = variant.run_with_cache(image)
        whole = stored(variant, image)
    assert recipes(cache)
    assert cache.nbytes < whole.nbytes
    assert_same(cache, whole)


def test_a_full_cache_of_a_vit_is_a_quarter_smaller(stored):
    """Of ViT-Ti/16, in which everything but the patches' embedding is a fourth of ViT-B/16's."""
    model = prisma.load("timm:vit_tiny_patch16_224", pretrained=False)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        _, cache = model.run_with_cache(image)
        whole = stored(model, image)
    assert cache.nbytes <= 0.75 * whole.nbytes
    assert cache.nbytes == sum({x.data_ptr(): x.nbytes() for x in storages(cache)}.values())
    assert_same(cache, whole)


def storages(cache):
    for entry in cache.store.data.values():
        yield from (x.untyped_storage() for x in (entry.tensors() if isinstance(entry, Recipe) else [entry]))


def test_a_recipe_that_makes_other_bits_would_be_seen(vit, image, stored, monkeypatch):
    _, cache = vit.run_with_cache(image)
    whole, make = stored(vit, image), Recipe.make
    monkeypatch.setattr(Recipe, "make", lambda recipe: torch.nextafter(make(recipe), torch.tensor(9.0)))
    with pytest.raises(AssertionError, match="hook_normalized"):
        assert_same(cache, whole)


@pytest.mark.parametrize(
    "name", ["resid_pre", "attn_out", "resid_mid", "mlp_out", "attn_scores", "pattern", "ln2.scale"]
)
def test_hooks_in_between(vit, image, stored, name):
    hooks = {(name, 0): lambda x, at: x * 1.5}
    _, cache = vit.run_with_cache(image, hooks=hooks)
    full = vit.resolve((name, 0))[0]
    assert full not in recipes(cache)  # what a hook made is stored
    assert recipes(cache)
    assert_same(cache, stored(vit, image, hooks=hooks))


def test_what_is_not_a_whole_pass_is_stored(vit, image, stored):
    for how in (
        {"names": ["resid_mid", "pattern"]},  # made of what is not here
        {"pos": "cls"},
        {"dtype": torch.float32},
        {"detach": False},
        {"loss": lambda logits: logits.sum()},
    ):
        _, cache = vit.run_with_cache(image, **how)
        assert recipes(cache) == [], how
    with torch.inference_mode():
        _, cache = vit.run_with_cache(image)
    assert recipes(cache) == []


def test_a_residual_stream_is_stored_now_and_then(make, image):
    _, cache = make(layers=9, norm=None, ln_final=False).run_with_cache(image)
    steps = [entry.steps for entry in cache.store.data.values() if isinstance(entry, Recipe)]
    assert max(steps) == STEPS
    stream = [name for name in cache if "hook_resid" in name and name not in recipes(cache)]
    assert [name for name in stream if "mid" in name or "post" in name] == [
        "blocks.4.hook_resid_mid",
        "blocks.8.hook_resid_post",
    ]


def test_an_edit_of_what_was_made_stays_and_changes_nothing_else(vit, image, stored):
    before = stored(vit, image)
    for name in recipes(vit.run_with_cache(image)[1]):
        _, cache = vit.run_with_cache(image)
        cache[name].zero_()
        assert cache[name] is cache[name]
        assert not cache[name].any()
        for other in cache:
            assert cache[other] is cache[name] or torch.equal(cache[other], before[other]), other


def test_an_edit_of_what_others_are_made_of_is_an_error_where_they_are_asked_for(vit, image):
    _, cache = vit.run_with_cache(image)
    kept = cache["resid_mid", 1]
    before = kept.clone()
    cache["attn_out", 0].zero_()
    for name in ("resid_mid", 0), ("resid_pre", 1):
        with pytest.raises(InputError, match=r"hook_resid_\w+ is gone: .* edited in place.*clone\(\)"):
            cache[name]
    assert cache["pattern", 0].isfinite().all()
    assert torch.equal(cache["resid_mid", 1], before)  # it was made before the edit
    with pytest.raises(InputError, match="resid_mid"):
        copy.deepcopy(cache)["resid_mid", 0]


def test_weights_that_change_after_the_pass(vit, image):
    _, cache = vit.run_with_cache(image)
    before = {name: x.clone() for name, x in cache.items()}
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.mul_(2)
    assert_same(cache, before)


def test_facts_of_a_part_that_change_after_the_pass(variant, image):
    _, cache = variant.run_with_cache(image)
    whole = {name: x.clone() for name, x in variant.run_with_cache(image)[1].items()}
    for part in variant.modules():
        if isinstance(part, Norm):
            part.spec = part.spec.model_copy(update={"eps": 0.9, "kind": "rms"})
    assert_same(cache, whole)


EDITED = {
    "blocks.0": "blocks.0.hook_resid_post",
    "blocks.0.ln1": "blocks.0.ln1.hook_normalized",
    "blocks.1.mlp.fc_in": "blocks.1.mlp.hook_pre",
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("how", [{}, {"names": ["resid_post", "normalized", "pre", "resid_pre"]}, {"pos": slice(0, 9)}])
@pytest.mark.parametrize("kind", ["hook", "hook before the next", "hook of all modules", "forward"])
@pytest.mark.parametrize("place", EDITED)
def test_what_runs_beside_hook_points_may_edit_in_place(vit, image, place, kind, how, mode):
    """A cache holds what was at the hook point, and after it the edit."""
    part = vit.get_submodule(place)

    def edit(module, inputs, output=None):
        if kind == "hook of all modules" and module is not part:
            return
        (inputs[0] if output is None else output).detach().mul_(1.5)

    if kind == "hook of all modules":
        handle = nn.modules.module.register_module_forward_hook(edit)
    elif kind == "hook":
        handle = part.register_forward_hook(edit)
    elif kind == "hook before the next":
        readers = {"blocks.0": "blocks.1", "blocks.0.ln1": "blocks.0.attn", "blocks.1.mlp.fc_in": "blocks.1.mlp"}
        handle = vit.get_submodule(readers[place]).register_forward_pre_hook(edit)
    else:
        plain = part.forward
        part.forward = lambda *args, **kwargs: plain(*args, **kwargs).mul_(1.5)
        handle = None
    seen = {}
    try:
        with mode():
            with vit.hooks({"*": lambda x, at: seen.update({at.name: x.clone()})}):
                vit(image)
            _, cache = vit.run_with_cache(image, **how)
    finally:
        if handle is not None:
            handle.remove()
    for name in cache:
        torch.testing.assert_close(cache[name], seen[name].detach(), rtol=1e-9, atol=1e-9)


def test_where_it_is_asked_for_does_not_matter(vit, image, stored):
    vit, image = vit.float(), image.float()
    _, cache = vit.run_with_cache(image)
    whole = stored(vit, image)
    for scope in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.enable_grad()):
        with scope:
            assert_same(cache, whole)
            assert not cache["resid_mid", 0].is_inference()
            assert not cache["resid_mid", 0].requires_grad
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert_same(cache, whole)
    finally:
        torch.set_num_threads(threads)


def test_under_autocast(vit, image, stored):
    vit, image = vit.float(), image.float()
    with torch.autocast("cpu", torch.bfloat16):
        _, cache = vit.run_with_cache(image)
        whole = stored(vit, image)
    assert_same(cache, whole)


def test_copies_files_and_other_forms(vit, image, stored, tmp_path):
    _, cache = vit.run_with_cache(image[:1])
    whole = stored(vit, image[:1])
    alone = cache.remove_batch_dim()
    assert recipes(alone) == recipes(cache)
    assert alone.nbytes == cache.nbytes
    assert_same(alone, whole.remove_batch_dim())
    assert_same(cache.to(dtype=torch.float32), whole.to(dtype=torch.float32))
    assert_same(ActivationCache.load(cache.save(tmp_path / "cache.safetensors"), vit), whole)
    assert_same(copy.deepcopy(cache), whole)
    assert_same(pickle.loads(pickle.dumps(cache)), whole)
    assert f"{cache.nbytes / 2**20:.1f} MiB" in repr(cache)
    assert recipes(StreamCache(dict(cache))) == []


def test_two_scopes_hold_recipes_of_their_own(vit, image, stored):
    with vit.caching() as outer, vit.caching(["resid_mid", "resid_pre"]) as inner:
        vit(image)
    assert_same(outer, stored(vit, image))
    assert recipes(inner) == []
    assert torch.equal(inner["resid_mid", 0], outer["resid_mid", 0])


def test_the_towers_of_a_pair_have_the_recipes_of_the_pair(stored):
    model = prisma.load("toy:clip-scenes")
    inputs = model.sample_inputs()
    _, cache = model.run_with_cache(*inputs)
    whole = stored(model, *inputs)
    assert len(recipes(cache.tower("vision"))) + len(recipes(cache.tower("text"))) == len(recipes(cache)) > 0
    assert_same(cache, whole)
    for name in ("vision", "text"):
        assert_same(cache.tower(name), whole.tower(name))
