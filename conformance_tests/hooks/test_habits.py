"""TransformerLens' habits: what works, what is answered, and that answers cost nothing where no error is raised."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from pathlib import Path

import pytest
import torch

import prisma_core
from prisma_core import HookedModel, HookError, HookPoint, InputError, NotApplicable, UnknownName
from prisma_core.errors.migration import UnknownAttribute, migration_hint
from prisma_core.hooks.point import HookContext, Scope, ScopeContext

OURS = str(Path(prisma_core.__file__).parent)


def frames(work):
    """Return the Python frames of prisma_core that a call enters: file within it, and function."""
    entered = []

    def profile(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(OURS):
            entered.append((frame.f_code.co_filename.removeprefix(OURS + "/"), frame.f_code.co_name))

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return entered


@pytest.fixture
def signatures(monkeypatch):
    """The functions whose signature was looked at."""
    looked_at = []
    monkeypatch.setattr(inspect, "signature", lambda function, **how: looked_at.append(function))
    return looked_at


def test_a_plain_forward_has_no_frame_of_ours_on_the_way_to_a_submodule(variant, image, signatures):
    entered = frames(lambda: variant(image, stop_at_layer=None))
    assert not [each for each in entered if each[1] == "__getattr__"]
    of_hooks = {each for each in entered if each[0].startswith("hooks/")}
    assert of_hooks == {("hooks/model.py", "__call__"), ("hooks/point.py", "__call__"), ("hooks/point.py", "wanted")}
    assert signatures == []


def test_a_cached_run_opens_one_scope_and_walks_the_modules_once(vit, image, monkeypatch):
    walks, opened = [], []
    walk, enter = vit._sites, Scope.open
    monkeypatch.setattr(vit, "_sites", lambda: walks.append(vit) or walk())
    monkeypatch.setattr(Scope, "open", lambda scope: opened.append(scope) or enter(scope))
    hooks = {("z", 0): lambda z, at: 2 * z}
    for how in (
        {"names": "resid_post"},
        {"names": ["embed", ("z", 1)], "output": False, "hooks": hooks},
        {"names": "z", "pos": "cls", "heads": 1, "loss": lambda logits: logits.sum()},
    ):
        walks.clear(), opened.clear()
        vit.run_with_cache(image, **how)
        assert (len(walks), len(opened)) == (1, 1), how
    entered = frames(lambda: vit.run_with_cache(image, names="resid_post"))
    assert entered.count(("hooks/model.py", "_walk")) == len(list(vit.modules()))


def test_signatures_are_not_looked_at_on_a_call_that_is_fine(vit, image, signatures):
    vit.run_with_cache(image, names="z", stop_at_layer=None)
    vit.run_with_hooks(image, stop_at_layer=1)
    with vit.hooks(), vit.caching("z"):
        vit(image, stop_at_layer=None)
    assert signatures == []


# -------------------------------------------------------------------- attributes


@pytest.mark.parametrize("name", ["cfg", "config", "add_hook", "reset_hooks", "hook_dict", "list_hooks", "to_tokens"])
def test_attributes_are_answered_and_do_not_exist(vit, image, name):
    with pytest.raises(AttributeError, match=f"HookedViT.*{name!r}") as caught:
        getattr(vit, name)
    assert str(caught.value).endswith(migration_hint(name))
    assert not hasattr(vit, name)
    assert name not in dir(vit)
    assert getattr(vit, name, None) is None
    for twin in (copy.deepcopy(vit), pickle.loads(pickle.dumps(vit))):
        assert not hasattr(twin, name)


def test_the_answer_is_of_the_model_that_lacks_the_attribute(vit):
    class Mine(type(vit)):
        def attribute_hint(self, name):
            return "look elsewhere" if name == "tail" else migration_hint(name)

    vit.__class__ = Mine
    with pytest.raises(UnknownAttribute, match="Mine has no attribute 'tail': look elsewhere"):
        _ = vit.tail
    with pytest.raises(AttributeError, match=r"model\.spec"):
        _ = vit.cfg
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'$"):
        _ = vit.nothing
    assert str(UnknownAttribute("alone")) == "alone"


def test_a_submodule_may_have_the_name_of_an_answer(make):
    model = make()
    model.config = torch.nn.Linear(2, 3)
    assert model.config.out_features == 3
    assert "config" in dict(model.named_children())


def test_hook_points_and_contexts_answer(vit):
    point, context = vit.hook_embed, HookContext("hook_embed", "batch pos d_model")
    for owner, name, words in (
        (point, "add_hook", r"HookPoint.*'add_hook'.*model\.hooks\("),
        (point, "fwd_hooks", r"model\.open_hooks\(\)"),
        (point, "nothing", "'nothing'"),
        (context, "ctx", r"HookContext.*'ctx'.*seen\[at\.name\]"),
    ):
        with pytest.raises(AttributeError, match=words):
            getattr(owner, name)
        assert not hasattr(owner, name)
        assert isinstance(pickle.loads(pickle.dumps(owner)), HookPoint | HookContext)


def test_a_model_is_exported_and_its_members_listed(make, image):
    model = make(layers=1).requires_grad_(False)
    assert torch.equal(torch.export.export(model, (image,)).module()(image), model(image))
    assert not {"cfg", "add_hook"} & {name for name, _ in inspect.getmembers(model)}


def test_members_of_parts_that_a_model_lacks(make, image):
    lacking = make(layers=1, n_classes=None, mlp=False, pos=False)
    _, cache = lacking.run_with_cache(image)
    for owner, names in (
        (lacking, {"W_gate", "W_U", "b_U", "W_pos", "W_in"}),
        (cache, {"grad", "tower"}),
        (lacking.spec, {"d_mlp", "act_fn"}),
        (make(layers=1).OV[0, 0], {"no_such_name"}),
    ):
        members = {name for name, _ in inspect.getmembers(owner)}
        for name in names:
            assert not hasattr(owner, name)
            assert name not in members
        assert len(members) > 30
    with pytest.raises(NotApplicable, match="no head") as caught:
        lacking.W_U  # noqa: B018
    assert isinstance(caught.value, AttributeError)


def test_a_type_error_of_the_pass_is_not_taken_for_a_keyword(vit, image):
    def broken(x, at):
        return x + None

    with pytest.raises(TypeError, match="NoneType"):
        vit.run_with_hooks(image, hooks={"z": broken}, stop_at_layer=None)
    with pytest.raises(TypeError, match="image"):
        vit()


def test_masks_are_edits_of_the_scores(vit, image):
    for call in (vit, vit.run_with_cache, lambda *args, **mask: vit.run_with_hooks(*args, hooks={}, **mask)):
        with pytest.raises(InputError, match=r"takes no 'attention_mask'.*hooks=.*attn_scores"):
            call(image, attention_mask=torch.ones(1))


def test_a_class_of_modules_is_no_hook(vit, image):
    class Twice(torch.nn.Module):
        def forward(self, x, at):
            return x * 2

    with pytest.raises(HookError, match=r"the class Twice.*hook\(activation, at\)"):
        vit.run_with_hooks(image, hooks={"z": Twice})
    vit.run_with_hooks(image, hooks={"z": Twice()})


def test_a_scope_is_no_decorator(vit, image):
    """A forgotten ``with`` is an error, not a function."""
    scope = vit.hooks({"z": lambda x, at: None})
    assert isinstance(scope, ScopeContext)
    with pytest.raises(prisma_core.HookError, match="no model"):
        scope(image)


# -------------------------------------------------------------------- keys


def test_three_part_keys(vit, image):
    _, cache = vit.run_with_cache(image)
    for key, name in (
        (("scale", 0, "ln1"), "blocks.0.ln1.hook_scale"),
        (("scale", -1, "ln2"), "blocks.1.ln2.hook_scale"),
        (("pattern", 0, "attn"), "blocks.0.attn.hook_pattern"),
        (("pattern", 1, "a"), "blocks.1.attn.hook_pattern"),
        (("post", 1, "m"), "blocks.1.mlp.hook_post"),
        (("resid_pre", 1, "block"), "blocks.1.hook_resid_pre"),
        (("scale", None, "ln_final"), "ln_final.hook_scale"),
        (("scale", None), "ln_final.hook_scale"),
        (("embed", None), "hook_embed"),
        (("z", 1, None), "blocks.1.attn.hook_z"),
    ):
        assert cache.full_name(key) == name
        assert torch.equal(cache[key], cache[name])
        assert key in cache
        assert vit.resolve(key) == [name]
        assert list(vit.run_with_cache(image, names=key)[1]) == [name]
        assert list(vit.run_with_cache(image, names=[key])[1]) == [name]
    output = vit.run_with_hooks(image, hooks={("scale", 0, "ln1"): lambda x, at: 2 * x})
    assert not torch.equal(output, vit(image))


def test_advice_for_an_ambiguous_key_names_one_that_works(vit, image):
    _, cache = vit.run_with_cache(image)
    for key, advised in (("scale", ("scale", 0, "ln1")), (("scale", 1), ("scale", 1, "ln1")), ("z", ("z", 0))):
        with pytest.raises(UnknownName) as caught:
            cache[key]
        assert str(caught.value).endswith(f"as in {advised!r}.")
        assert cache[advised].ndim


@pytest.mark.parametrize("key", [0, None, 2.5])
def test_a_number_is_no_key(vit, image, key):
    _, cache = vit.run_with_cache(image)
    with pytest.raises(UnknownName, match=rf"{key} is no name.*cache\['resid_post', 0\]"):
        cache[key]
    assert key not in cache


def test_none_among_names_is_not_all_of_them(vit, image):
    with pytest.raises(UnknownName, match="None is no name"):
        vit.run_with_cache(image, names=["z", None])
    with pytest.raises(UnknownName, match="None is no name"):
        vit.hooks({None: lambda x, at: x})


def test_full_names_are_transformer_lens(vit):
    """The names that its ``utils.get_act_name`` makes."""
    assert {
        "hook_embed",
        "ln_final.hook_scale",
        "blocks.1.ln1.hook_scale",
        "blocks.1.ln2.hook_normalized",
        "blocks.1.attn.hook_k",
        "blocks.1.attn.hook_z",
        "blocks.0.attn.hook_attn_scores",
        "blocks.1.mlp.hook_pre",
        "blocks.1.mlp.hook_post",
        "blocks.0.hook_mlp_out",
        "blocks.0.hook_resid_mid",
    } <= set(vit.hook_points())


# -------------------------------------------------------------------- arguments


@pytest.mark.parametrize("nothing", [[], torch.zeros(9, dtype=torch.bool), torch.tensor([], dtype=torch.long)])
def test_an_empty_choice_is_refused(vit, image, nothing):
    for how in ({"pos": nothing}, {"heads": nothing}):
        with pytest.raises(InputError, match="at least one position"):
            vit.run_with_cache(image, names="z", **how)
    with pytest.raises(InputError, match=r"slice\(9, None, None\) selects nothing on axis 1"):
        vit.run_with_cache(image, names="z", pos=slice(9, None))
    with pytest.raises(InputError, match="no distillation tokens"):
        vit.run_with_cache(image, names="z", pos="distillation")


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (3, "The loss is 3; expected a function"),
        (lambda logits: None, "must be one number; got NoneType"),
        (lambda logits: 1.5, "must be one number; got float"),
        (lambda logits: logits.detach().sum(), "carries no graph"),
    ],
)
def test_a_loss_that_has_no_gradients(vit, image, loss, words):
    with pytest.raises(prisma_core.HookError, match=words):
        vit.run_with_cache(image, loss=loss)


def test_a_loss_in_inference_mode(vit, image):
    with torch.inference_mode(), pytest.raises(prisma_core.HookError, match="inference_mode"):
        vit.run_with_cache(image, loss=lambda logits: logits.sum())


def test_gradients_of_torch_func_through_a_cache(vit, image):
    def total(image):
        return vit.run_with_cache(image, names=("z", 1), detach=False)[1]["z", 1].sum()

    leaf = image.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(total(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(total)(image), wanted, rtol=1e-11, atol=1e-11)


def test_the_output_of_any_hooked_model_is_not_what_its_cache_holds(image):
    class Passing(HookedModel):
        def __init__(self):
            super().__init__()
            self.hook_in = HookPoint("batch channel row column", "the image")

        def forward(self, image):
            return self.hook_in(image * 2)

    model = Passing()
    with model.caching() as cache:
        model(image).zero_()
    assert torch.equal(cache["in"], 2 * image)
    output, cache = model.run_with_cache(image)
    output.zero_()
    assert torch.equal(cache["in"], 2 * image)
