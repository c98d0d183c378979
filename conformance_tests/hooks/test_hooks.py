"""Hooks are a scope: what they change reaches the output, and nothing stays behind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import close

from prisma_core import HookError, UnknownName


def zero(x, at):
    x.zero_()


def set_to(x, other):
    x.data = other


# -------------------------------------------------------------------- every hook point is live


def test_every_point_fires_once_and_identity_changes_nothing(variant, image):
    logits = variant(image)
    fired: list[str] = []
    with variant.hooks({"*": lambda x, at: fired.append(at.name)}):
        close(variant(image), logits)
    assert fired == [name for name, point in variant.hook_points().items() if not point.derived]
    for name, point in variant.hook_points().items():
        close(variant.run_with_hooks(image, hooks={name: lambda x, at: x.clone()}), logits)
        assert point.equation
        assert point.axes


def test_a_change_at_every_point_reaches_the_output(variant, image):
    logits = variant(image)
    generator = torch.Generator().manual_seed(2)
    for name in variant.hook_points():
        changed = variant.run_with_hooks(
            image, hooks={name: lambda x, at: x + torch.randn(x.shape, generator=generator, dtype=x.dtype)}
        )
        assert (changed - logits).abs().max() > 1e-8, name


def test_a_point_holds_what_its_axes_say(vit, image):
    sizes = {"batch": 3, "pos": 9, "query_pos": 9, "key_pos": 9, "patch": 6, "head": 4}
    sizes |= {"d_model": 18, "d_head": 6, "d_mlp": 20, "class": 7, "1": 1}
    for name, point in vit.hook_points().items():
        _, cache = vit.run_with_cache(image, names=name)
        assert list(cache[name].shape) == [sizes[axis] for axis in point.axes.split()], name


# -------------------------------------------------------------------- derived points


@pytest.mark.parametrize("facts", [{}, {"inner_norm": True}, {"kv_heads": 2}, {"rope": True, "qk_norm": True}])
def test_results_and_bias_sum_to_attention(make, image, facts):
    vit = make(**facts)
    _, cache = vit.run_with_cache(image, names=["result", "attn_out"])
    for layer, block in enumerate(vit.blocks):
        close(cache["result", layer].sum(2) + block.attn.b_O, cache["attn_out", layer])


@pytest.mark.parametrize("facts", [{}, {"kv_heads": 2}, {"kind": "res_post"}, {"kind": "parallel"}, {"norm": None}])
def test_head_inputs_are_the_stream_once_for_each_head(make, image, facts):
    vit = make(**facts)
    logits, cache = vit.run_with_cache(image, names=["q_input", "k_input", "v_input", "resid_pre"])
    close(logits, vit(image))
    for layer in range(2):
        for name in ("q_input", "k_input", "v_input"):
            for head in range(cache[name, layer].shape[2]):
                assert torch.equal(cache[name, layer][:, :, head], cache["resid_pre", layer])


@pytest.mark.parametrize("letter", "qkv")
def test_a_head_input_edit_reaches_only_that_head(vit, image, letter):
    def edit(x, at):
        x[:, :, 2] *= -0.5

    _, before = vit.run_with_cache(image)
    _, after = vit.run_with_cache(image, hooks={(f"{letter}_input", 1): edit})
    other = [0, 1, 3]
    for name in ("q", "k", "v"):
        close(after[name, 1][:, :, other], before[name, 1][:, :, other])
        changed = (after[name, 1][:, :, 2] - before[name, 1][:, :, 2]).abs().max() > 1e-3
        assert changed == (name == letter), name
    close(after["z", 1][:, :, other], before["z", 1][:, :, other])
    assert (after["z", 1][:, :, 2] - before["z", 1][:, :, 2]).abs().max() > 1e-4
    close(after["resid_pre", 1], before["resid_pre", 1])
    close(after["k", 0], before["k", 0])


def test_one_result_can_be_knocked_out(vit, image):
    def drop(x, at):
        x[:, :, 1] = 0

    def drop_z(x, at):
        x[:, :, 1] = 0

    close(vit.run_with_hooks(image, hooks={("result", 0): drop}), vit.run_with_hooks(image, hooks={("z", 0): drop_z}))


# -------------------------------------------------------------------- edits


def test_in_place_and_returned_edits_agree(vit, image):
    def in_place(x, at):
        x[:, 0] = 0

    def in_place_and_returned(x, at):
        x[:, 0] = 0
        return x

    def returned(x, at):
        return torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], dim=1)

    outputs = [
        vit.run_with_hooks(image, hooks={("resid_mid", 0): f}) for f in (in_place, in_place_and_returned, returned)
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], vit(image))


def test_an_in_place_edit_reaches_nothing_else(vit, image):
    """The stream before a block goes to its norm and past it; an edit of q's projection must not reach k."""
    _, before = vit.run_with_cache(image)
    _, after = vit.run_with_cache(image, hooks={("q", 0): zero})
    for name in ("k", "v", "resid_pre"):
        close(after[name, 0], before[name, 0])
    before_image = image.clone()
    vit.run_with_hooks(image, hooks={"*": zero})
    assert torch.equal(image, before_image)


def test_hooks_of_one_point_run_in_order_each_on_what_the_last_left(vit, image):
    seen: list[tuple[str, float]] = []

    def add(label, amount):
        def hook(x, at):
            seen.append((label, x.flatten()[0].item()))
            return x + amount

        return hook

    base = vit.run_with_cache(image, names=("resid_post", 0))[1]["resid_post", 0].flatten()[0].item()
    with (
        vit.hooks({("resid_post", 0): add("outer", 1.0)}),
        vit.hooks({"blocks.0.hook_resid_post": add("first", 10.0), "*resid_post": add("second", 100.0)}),
    ):
        _, cache = vit.run_with_cache(image, hooks={("resid_post", 0): add("inner", 1000.0)})
    of_layer = seen[:4]
    assert [label for label, _ in of_layer] == ["outer", "first", "second", "inner"]
    for (_, value), added in zip(of_layer, (0, 1, 11, 111), strict=True):
        assert value == pytest.approx(base + added, abs=1e-9)
    assert cache["resid_post", 0].flatten()[0].item() == pytest.approx(base + 1111, abs=1e-9)


def test_what_a_hook_is_told(vit, image):
    told = []
    vit.run_with_hooks(image, hooks={("pattern", -1): lambda x, at: told.append((at.name, at.axes, at.layer()))})
    assert told == [("blocks.1.attn.hook_pattern", "batch head query_pos key_pos", 1)]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            lambda x: x[:, :1],
            r"blocks.0.hook_resid_mid returned \[3, 1, 18\].*expected.*\[3, 9, 18\] \(batch pos d_model\)",
        ),
        (lambda x: x.float(), r"torch.float32 on cpu; expected the activation's \[3, 9, 18\].*torch.float64 on cpu"),
        (lambda x: x.to("meta"), r"on meta; expected"),
        (lambda x: 3, r"returned int; expected a tensor of shape \[3, 9, 18\]"),
        (lambda x: (x,), "returned tuple"),
        (lambda x: x.numpy(force=True), "returned ndarray"),
        (lambda x: x.to_sparse(), "returned a nested or sparse tensor; expected"),
        (lambda x: torch.nested.nested_tensor(list(x), layout=torch.strided), "returned a nested or sparse tensor"),
        # what a hook makes of its argument, and returns nothing
        (lambda x: set_to(x, x.swapaxes(0, 1)), r"returned \[9, 3, 18\]"),
        (lambda x: set_to(x, x[:, :1]), r"returned \[3, 1, 18\]"),
        (lambda x: set_to(x, x.float()), r"torch.float32 on cpu; expected"),
    ],
)
def test_an_unusable_return_is_an_error_that_names_the_point(vit, image, value, words):
    with pytest.raises(HookError, match=words):
        vit.run_with_hooks(image, hooks={("resid_mid", 0): lambda x, at: value(x)})


def test_wrong_hooks_are_refused_before_the_pass(vit, image):
    for hooks, error, words in (
        ({"nothing": lambda x, at: x}, UnknownName, "No hook point matches"),
        ({"z": 3}, HookError, r"The hook for 'z' is 3; expected hook\(activation, at\)"),
        ([("z", lambda x, at: x)], HookError, r"Expected hooks as \{name: hook\}, got list"),
    ):
        with pytest.raises(error, match=words):
            vit.hooks(hooks)
        with pytest.raises(error, match=words):
            vit.run_with_hooks(image, hooks=hooks)


# -------------------------------------------------------------------- what goes wrong inside a hook


def test_what_a_hook_raises_says_where(vit, image):
    def broken(x, at):
        raise ValueError("oh no")

    with pytest.raises(ValueError, match="oh no") as caught:
        vit.run_with_hooks(image, hooks={("z", 1): broken})
    assert caught.value.__notes__ == ["in the hook at blocks.1.attn.hook_z"]
    with pytest.raises(TypeError, match="NoneType") as caught:  # raised inside the hook: not about how it was called
        vit.run_with_hooks(image, hooks={("z", 1): lambda x, at: x + None})
    assert caught.value.__notes__ == ["in the hook at blocks.1.attn.hook_z"]
    with vit.hooks(backward={("z", 0): broken}), pytest.raises(ValueError, match="oh no") as caught:
        vit(image).sum().backward()
    assert caught.value.__notes__ == ["in the hook at blocks.0.attn.hook_z"]


@pytest.mark.parametrize(
    ("hook", "told"),
    [
        (lambda x: x, r"The hook for 'z' is <lambda>\(x\); expected hook\(activation, at\)"),
        (lambda x, at, more: x, "missing a required argument: 'more'"),
        (lambda x, *, hook: x, "expected hook"),
        (torch.nn.Identity().forward, r"forward\(input"),
    ],
)
def test_a_hook_of_other_arguments_is_refused_before_the_pass(vit, hook, told):
    for how in ({"hooks": {"z": hook}}, {"backward": {"z": hook}}):
        with pytest.raises(HookError, match=told):
            vit.hooks(**how)


def test_a_hook_written_in_c_is_refused_when_it_is_called(vit, image):
    with pytest.raises(HookError, match=r"blocks\.0\.attn\.hook_z cannot be called as hook\(activation, at\): relu"):
        vit.run_with_hooks(image, hooks={("z", 0): torch.relu})


# -------------------------------------------------------------------- copies


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_of_a_model_have_hook_points_of_their_own(vit, image, duplicate):
    vit.hook_points()
    logits, cache = vit.run_with_cache(image)
    twin = duplicate(vit)
    assert list(twin.hook_points()) == list(vit.hook_points())
    assert not set(twin.hook_points().values()) & set(vit.hook_points().values())
    again, copied = twin.run_with_cache(image)
    assert torch.equal(again, logits)
    assert all(torch.equal(copied[name], cache[name]) for name in cache)
    with vit.hooks({"z": lambda x, at: 0 * x}):
        close(twin(image), logits)
    with twin.hooks({"z": lambda x, at: 0 * x}):
        assert not torch.equal(twin(image), logits)
        assert torch.equal(vit(image), vit(image))
