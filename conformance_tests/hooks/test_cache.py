"""What a cache holds, how it is asked, and that it stays as it is."""

from __future__ import annotations

import pytest
import torch
from models import close

from prisma_core import ActivationCache, HookError, InputError, NotApplicable, UnknownName


@pytest.mark.parametrize(
    "names",
    [
        "*hook_z",
        "z",
        "attn.z",
        lambda name: name.endswith("hook_z"),
        ["blocks.0.attn.hook_z", ("z", 1)],
        ("z", "blocks.1.attn.hook_z"),
        {"z"},
        frozenset({("z", 0), ("z", -1)}),
        (name for name in ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]),
        {"z": None}.keys(),
    ],
    ids=["glob", "shorthand", "path", "predicate", "list", "tuple", "set", "frozenset", "generator", "keys"],
)
def test_every_form_of_names(vit, image, names):
    _, cache = vit.run_with_cache(image, names=names)
    assert list(cache) == ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]


@pytest.mark.parametrize("query", ["v", "attn.v", "blocks.0.attn.hook_v", ("v", 0), ("z", 1)])
def test_a_cache_of_one_activation_holds_no_other(vit, image, query):
    _, cache = vit.run_with_cache(image, names=[("z", 0)])
    assert torch.equal(cache["z"], cache["blocks.0.attn.hook_z"])
    with pytest.raises(UnknownName):
        cache[query]


@pytest.mark.parametrize(
    "how", [{"device": "meta"}, {"dtype": torch.float16}, {"device": "meta", "dtype": torch.float16}]
)
def test_a_cache_is_kept_where_and_as_it_is_asked(vit, image, how):
    _, cache = vit.run_with_cache(image, names=["z", ("v", 0)], **how)
    assert len(cache) == 3
    for activation in cache.values():
        assert activation.device.type == how.get("device", "cpu")
        assert activation.dtype is how.get("dtype", image.dtype)


def test_graphs_may_be_asked_for_where_there_are_none(vit, image):
    with torch.no_grad():
        _, cache = vit.run_with_cache(image, names=["z"], detach=False)
    assert len(cache) == 2
    assert not any(activation.requires_grad for activation in cache.values())


def test_all_is_all_that_is_not_derived(variant, image):
    _, cache = variant.run_with_cache(image)
    assert set(cache) == {name for name, point in variant.hook_points().items() if not point.derived}
    for name, activation in cache.items():
        assert len(variant.hook_points()[name].axes.split()) == activation.ndim, name
        assert activation.isfinite().all(), name


def test_asking(vit, image):
    _, cache = vit.run_with_cache(image, names=["resid_post", ("z", 1), "logits"])
    assert torch.equal(cache["resid_post", -1], cache["blocks.1.hook_resid_post"])
    assert torch.equal(cache["z"], cache["z", 1])
    assert ("z", 1) in cache
    assert "logits" in cache
    assert ("z", 0) not in cache
    assert "nonsense" not in cache
    for query, words in (
        (("z", 0), r"blocks.0.attn.hook_z is not in this cache.*Cache it: names=\['blocks.0.attn.hook_z'\]"),
        ("hook_pooled", "hook_pooled is not in this cache"),
        ("resid_post", r"Name a layer, as in \('resid_post', 0\)"),
        ("resid_pots", "Did you mean resid_post"),
        (("z", 7), "Layers run from 0 to 1"),
        (("logits", 0), "in no layer: ask for 'logits' alone"),
    ):
        with pytest.raises(UnknownName, match=words):
            cache[query]


def test_the_last_layer_is_the_models_last_not_the_caches(vit, image):
    _, cache = vit.run_with_cache(image, names=("resid_post", 0))
    with pytest.raises(UnknownName, match=r"blocks.1.hook_resid_post is not in this cache"):
        cache["resid_post", -1]


@pytest.mark.parametrize(
    ("pos", "tokens"),
    [
        (0, [0]),
        (-1, [8]),
        (slice(2, 5), [2, 3, 4]),
        ([1, -2], [1, 7]),
        (torch.tensor([4, 0]), [4, 0]),
        ("cls", [0]),
        ("registers", [1, 2]),
        ("patches", [3, 4, 5, 6, 7, 8]),
        ("all", list(range(9))),
    ],
)
def test_token_slices_keep_the_axis(vit, image, pos, tokens):
    _, whole = vit.run_with_cache(image, names=lambda name: not name.endswith(("scores", "pattern")))
    _, patterns = vit.run_with_cache(image, names="pattern")
    _, cut = vit.run_with_cache(image, pos=pos)
    for name in ("resid_post", 0), ("z", 1), ("ln1.scale", 1):
        assert torch.equal(cut[name], whole[name][:, tokens]), name
    close(cut["pattern", 1], patterns["pattern", 1][:, :, tokens])  # other products (test_rows.py)
    assert torch.equal(cut["pooled"], whole["pooled"])
    assert cut.positions() == tokens


@pytest.mark.parametrize(("heads", "kept"), [(2, [2]), (slice(1, 3), [1, 2]), ([3, 0], [3, 0])])
def test_head_slices_keep_the_axis(vit, image, heads, kept):
    _, whole = vit.run_with_cache(image, names=["z", "pattern", "resid_post", "result"])
    _, cut = vit.run_with_cache(image, names=["z", "pattern", "resid_post", "result"], heads=heads)
    assert torch.equal(cut["z", 0], whole["z", 0][:, :, kept])
    assert torch.equal(cut["result", 0], whole["result", 0][:, :, kept])
    assert torch.equal(cut["pattern", 0], whole["pattern", 0][:, kept])
    assert torch.equal(cut["resid_post", 0], whole["resid_post", 0])


def test_slices_hold_no_more_memory_than_they_show(vit, image):
    _, cut = vit.run_with_cache(image, pos="cls", heads=0)
    for name in ("resid_post", 0), ("z", 1), ("pattern", 1):
        assert cut[name].untyped_storage().nbytes() == cut[name].numel() * cut[name].element_size(), name


def test_slices_out_of_range_say_so(vit, image):
    for how in ({"pos": 9}, {"pos": [0, -10]}, {"heads": 4}):
        with pytest.raises(InputError, match="No index"):
            vit.run_with_cache(image, **how)
    with pytest.raises(UnknownName, match="Did you mean registers"):
        vit.run_with_cache(image, pos="register")


def test_patches_of_a_larger_image(make):
    vit = make(interpolation=True)
    _, cache = vit.run_with_cache(torch.randn(1, 3, 16, 24), names="resid_post", pos="patches")
    assert cache["resid_post", 0].shape == (1, 24, 18)
    assert cache.patches("resid_post", 0).shape == (1, 4, 6, 18)


def test_dtype_device_and_graph(vit, image):
    logits, cache = vit.run_with_cache(image, dtype=torch.float32, device="cpu")
    assert {activation.dtype for activation in cache.values()} == {torch.float32}
    assert not any(activation.requires_grad for activation in cache.values())
    assert logits.dtype == torch.float64
    _, cache = vit.run_with_cache(image, detach=False)
    cache["resid_post", 1].square().sum().backward()
    assert vit.blocks[0].attn.out.weight.grad.abs().sum() > 0
    moved = cache.to(dtype=torch.float16)
    assert moved["z", 0].dtype == torch.float16
    assert cache["z", 0].dtype == torch.float64
    assert moved.to("meta")["z", 0].device.type == "meta"
    assert isinstance(moved, ActivationCache)
    assert moved.layout == vit.layout


def test_removing_the_batch_axis(vit, image):
    _, cache = vit.run_with_cache(image[:1], loss=lambda logits: logits[0, 1])
    alone = cache.remove_batch_dim()
    assert not alone.has_batch_dim
    assert torch.equal(alone["z", 1], cache["z", 1][0])
    assert torch.equal(alone.grad["z", 1], cache.grad["z", 1][0])
    assert alone.remove_batch_dim() is alone
    with pytest.raises(InputError, match="holds a batch of 3"):
        vit.run_with_cache(image, remove_batch_dim=True)


def test_token_views(vit, image):
    _, cache = vit.run_with_cache(image)
    resid = cache["resid_post", 1]
    assert torch.equal(cache.patches("resid_post", 1), resid[:, 3:].unflatten(1, (2, 3)))
    assert torch.equal(cache.patches("embed"), cache["embed"].unflatten(1, (2, 3)))
    assert torch.equal(cache.cls("resid_post", 1), resid[:, 0])
    assert torch.equal(cache.registers("resid_post", 1), resid[:, 1:3])
    pattern = cache["pattern", 0]
    assert torch.equal(cache.patches("pattern", 0, axis="key_pos"), pattern[..., 3:].unflatten(-1, (2, 3)))
    assert torch.equal(cache.patches("pattern", 0, axis="query_pos"), pattern[:, :, 3:].unflatten(2, (2, 3)))
    assert torch.equal(cache.cls("pattern", 0, axis="query_pos"), pattern[:, :, 0])
    _, alone = vit.run_with_cache(image[:1], remove_batch_dim=True)
    assert torch.equal(alone.patches("resid_post", 1), alone["resid_post", 1][3:].unflatten(0, (2, 3)))
    _, cut = vit.run_with_cache(image, pos="cls")
    close(cut.patches("pattern", 0, axis="key_pos"), pattern[:, :, :1, 3:].unflatten(-1, (2, 3)))
    assert torch.equal(cut.cls("resid_post", 1), cut["resid_post", 1][:, 0])
    for view, words in (
        (lambda: cut.patches("resid_post", 1), "holds 1 of 9 tokens"),
        (lambda: cut.registers("resid_post", 1), "registers tokens are not in the cache"),
        (lambda: cache.patches("pattern", 0), "two token axes"),
        (lambda: cache.patches("pooled"), "no token axis among them"),
        (lambda: cache.patches("z", 0, axis="key_pos"), "no 'key_pos' among them"),
    ):
        with pytest.raises(InputError, match=words):
            view()
    _, six = vit.run_with_cache(image, pos=slice(0, 6))
    with pytest.raises(InputError, match="holds 6 of 9 tokens"):  # as many as there are patches, but not the patches
        six.patches("resid_post", 0)


def test_views_of_tokens_a_model_lacks(make, image):
    _, cache = make(cls=0, pool="avg").run_with_cache(image)
    with pytest.raises(NotApplicable, match="no cls tokens"):
        cache.cls("resid_post", 0)
    with pytest.raises(NotApplicable, match="no registers tokens"):
        cache.registers("resid_post", 0)


# -------------------------------------------------------------------- what is in a cache never changes


def in_place(x, at):
    x.fill_(7.0)


def spoil_weights(vit):
    for parameter in vit.parameters():
        parameter.data.fill_(3.0)


@pytest.mark.parametrize("facts", [{"rope": True, "scale": True}, {"ln_pre": True, "kind": "parallel", "gated": True}])
def test_later_hooks_in_place_cannot_rewrite_a_cache(make, image, facts):
    """Each hook point in turn: everything before it is as in a pass without hooks."""
    vit = make(**facts).requires_grad_(False)
    _, clean = vit.run_with_cache(image)
    names = list(clean)
    for index, name in enumerate(names):
        with vit.caching() as cache, vit.hooks({name: in_place}):
            vit(image)
        assert cache[name].eq(7).all()
        before = [each for each in names[:index] if not each.endswith("hook_scale")]
        for each in before:
            torch.testing.assert_close(cache[each], clean[each], rtol=1e-9, atol=1e-9, msg=f"{each}, by {name}")


def test_a_cache_does_not_follow_the_weights(variant, image):
    with variant.caching() as cache:
        variant(image)
    copies = {name: activation.clone() for name, activation in cache.items()}
    spoil_weights(variant)
    assert all(torch.equal(cache[name], copy) for name, copy in copies.items())


@pytest.mark.parametrize("stop", [None, 1])
def test_a_cache_does_not_follow_the_output(vit, image, stop):
    output, cache = vit.run_with_cache(image, stop_at_layer=stop)
    copies = {name: activation.clone() for name, activation in cache.items()}
    output.detach().zero_()
    assert all(torch.equal(cache[name], copy) for name, copy in copies.items())
    with vit.caching() as cache, torch.no_grad():
        output = vit(image)
    copies = {name: activation.clone() for name, activation in cache.items()}
    output.zero_()
    assert all(torch.equal(cache[name], copy) for name, copy in copies.items())


def test_a_cache_does_not_follow_what_a_hook_holds(vit, image):
    held = []

    def hold(x, at):
        held.append(x)

    def give(x, at):
        held.append(torch.zeros_like(x))
        return held[-1]

    for hook in (hold, give):
        for name in (("resid_post", 0), ("embed", None), ("logits", None)):
            query = name if name[1] is not None else name[0]
            _, cache = vit.run_with_cache(image, hooks={query: hook})
            copies = {each: activation.clone() for each, activation in cache.items()}
            for tensor in held:
                tensor.detach().fill_(5.0)
            assert all(torch.equal(cache[each], copy) for each, copy in copies.items())


# -------------------------------------------------------------------- passes


def test_a_second_pass_in_one_scope_is_an_error(vit, image):
    with vit.caching("resid_post") as cache:
        vit(image)
        with pytest.raises(HookError, match="fired twice: a cache holds one pass"):
            vit(image + 1)
    assert torch.equal(cache["resid_post", 0], vit.run_with_cache(image, names="resid_post")[1]["resid_post", 0])


def test_start_and_stop(vit, image):
    logits, cache = vit.run_with_cache(image, names="resid_pre")
    assert torch.equal(vit(cache["resid_pre", 1], start_at_layer=1), logits)
    assert torch.equal(vit(image, stop_at_layer=1), cache["resid_pre", 1])
    assert torch.equal(vit(image, stop_at_layer=-1), cache["resid_pre", 1])
    _, part = vit.run_with_cache(image, stop_at_layer=1)  # no names: whatever the pass goes through
    assert "blocks.0.hook_resid_post" in part
    assert ("resid_post", 1) not in part
    for how in ({"names": "resid_post"}, {"hooks": {("z", 1): in_place}}):
        run = vit.run_with_cache if "names" in how else vit.run_with_hooks
        with pytest.raises(HookError, match=r"blocks.1.* was not reached in this pass \(stop_at_layer=1\)"):
            run(image, stop_at_layer=1, **how)
    with pytest.raises(HookError, match=r"hook_embed was not reached in this pass \(start_at_layer=1\)"):
        vit.run_with_cache(cache["resid_pre", 1], names="embed", start_at_layer=1)
    with pytest.raises(InputError, match="No layer 3"):
        vit(image, stop_at_layer=3)
    with pytest.raises(InputError, match="needs a residual stream"):
        vit(image, start_at_layer=1)


def test_a_mask_means_the_positions_it_marks(vit, image):
    mask = torch.zeros(vit.layout.n_tokens, dtype=torch.bool)
    mask[[2, 5]] = True
    _, whole = vit.run_with_cache(image, names="*hook_resid_*")
    for given in (mask, mask.tolist(), mask.numpy()):
        _, cache = vit.run_with_cache(image, names="resid_post", pos=given)
        assert torch.equal(cache["resid_post", 1], whole["resid_post", 1][:, [2, 5]])
        assert torch.equal(whole.accumulated_resid(pos_slice=given), whole.accumulated_resid(pos_slice=[2, 5]))
    with pytest.raises(InputError, match="whole numbers"):
        vit.run_with_cache(image, names="resid_post", pos=[0.5])


@pytest.mark.parametrize("length", [1, 6, 8, 10])
def test_a_mask_of_another_length_is_refused(vit, image, length):
    """As torch and numpy refuse it: a mask of the patches alone marks other tokens among all of them."""
    mask = torch.ones(length, dtype=torch.bool)
    _, whole = vit.run_with_cache(image)
    for given in (mask, mask.tolist(), mask.numpy()):
        for ask in (
            lambda given=given: vit.run_with_cache(image, names="z", pos=given),
            lambda given=given: vit.run_with_cache(image, names="pattern", pos=given),
            lambda given=given: vit.run_with_cache(image, names="z", heads=given),
            lambda given=given: whole.accumulated_resid(pos_slice=given),
        ):
            with pytest.raises(InputError, match="truth value for each"):
                ask()


def test_what_the_user_gives_and_gets_is_not_what_the_cache_holds(vit, image):
    with vit.caching() as cache:
        stream = vit(image, stop_at_layer=1)
    kept = cache["resid_post", 0].clone()
    stream.mul_(2)
    assert torch.equal(cache["resid_post", 0], kept)
    with vit.caching() as cache:
        logits = vit(stream, start_at_layer=1)
    kept = cache["resid_pre", 1].clone(), cache["hook_logits"].clone()
    stream.zero_(), logits.zero_()
    assert torch.equal(cache["resid_pre", 1], kept[0])
    assert torch.equal(cache["hook_logits"], kept[1])


def test_a_scope_does_not_guess_the_size_of_an_image_it_has_not_seen(make):
    model = make(interpolation=True)
    rows, columns = model.layout.rows, model.layout.columns
    height, width = model.spec.embed.patch
    image = torch.randn(1, model.spec.embed.in_channels, columns * height, rows * width)
    assert rows != columns
    with model.caching("resid_post") as cache:
        model(image)
    with pytest.raises(NotApplicable, match="layout"):
        cache.patches("resid_post", 0)
    cache.layout = model.layout_for(image)
    assert cache.patches("resid_post", 0).shape[1:3] == (columns, rows)
    _, cache = model.run_with_cache(image=image, names="resid_post")
    assert cache.patches("resid_post", 0).shape[1:3] == (columns, rows)


def test_going_on_from_a_stream_needs_to_know_the_grid_where_positions_turn(make):
    model = make(rope=True)
    stream = torch.randn(1, model.layout.n_tokens + 1, model.spec.d_model)
    with pytest.raises(InputError, match="grid="):
        model(stream, start_at_layer=1)
