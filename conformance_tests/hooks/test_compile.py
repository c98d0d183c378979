"""A compiled model honours a scope as an eager one does, and forgets it afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from prisma_core import HookError, ModelSpec
from prisma_core.transformer.embed import check_image

pytestmark = pytest.mark.filterwarnings("ignore")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model(make):
    return make(scale=True, registers=1, layers=1).requires_grad_(False)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def compiled(model, backend="eager"):
    return torch.compile(model, fullgraph=True, backend=backend)


def halve(x, at):
    return x / 2


def silence(x, at):
    x[:, 0] = 0


@pytest.mark.parametrize(
    ("facts", "backend"),
    [
        ({"rope": True, "gated": True}, "eager"),
        ({"pool": "avg", "ln_pool": True, "n_parallel": 2}, "aot_eager"),
        ({"kind": "res_post", "kv_heads": 2}, "eager"),
    ],
)
def test_a_full_cache_equals_the_eager_one(make, image, facts, backend):
    model = make(layers=1, **facts).requires_grad_(False)
    logits, eager = model.run_with_cache(image)
    run = compiled(model, backend)
    with model.caching() as cache:
        output = run(image)
    torch.testing.assert_close(output, logits, **CLOSE)
    assert set(cache) == set(eager)
    for name in eager:
        torch.testing.assert_close(cache[name], eager[name], **CLOSE, msg=name)


@pytest.mark.parametrize("pos", ["cls", [1, -1]])
def test_rows_of_patterns(model, image, pos):
    names = ["attn_scores", "pattern"]
    logits, eager = model.run_with_cache(image, names=names, pos=pos)
    with model.caching(names, pos=pos) as cache:
        output = compiled(model)(image)
    torch.testing.assert_close(output, logits, **CLOSE)
    for name in eager:
        torch.testing.assert_close(cache[name], eager[name], **CLOSE)


def test_derived_points(model, image):
    names = ["result", "q_input", "k_input", "v_input"]
    _, eager = model.run_with_cache(image, names=names)
    with model.caching(names) as cache:
        compiled(model)(image)
    assert set(cache) == set(eager)
    for name in eager:
        torch.testing.assert_close(cache[name], eager[name], **CLOSE)


@pytest.mark.parametrize(
    ("name", "hook"),
    [("embed", silence), ("z", halve), ("attn_scores", silence), ("ln1.scale", halve), ("result", silence)],
)
def test_edits_equal_eager_ones_and_are_forgotten(model, image, hook, name):
    plain = model(image)
    run = compiled(model)
    torch.testing.assert_close(run(image), plain, **CLOSE)
    wanted = model.run_with_hooks(image, hooks={name: hook})
    with model.hooks({name: hook}):
        torch.testing.assert_close(run(image), wanted, **CLOSE)
    assert (wanted - plain).abs().max() > 1e-6
    torch.testing.assert_close(run(image), plain, **CLOSE)


def test_edits_and_caches_and_slices_together(model, image):
    run = compiled(model)
    _, eager = model.run_with_cache(image, names=["z", "logits"], hooks={"q": halve}, pos=[0, -1], heads=1)
    with model.hooks({"q": halve}), model.caching(["z", "logits"], pos=[0, -1], heads=1) as cache:
        run(image)
    for name in eager:
        torch.testing.assert_close(cache[name], eager[name], **CLOSE)


def test_scopes_of_the_same_hooks_share_a_graph(model, image):
    run = compiled(model)
    run(image)
    assert graphs() == 1
    for _ in range(3):
        with model.hooks({("z", 0): halve}):
            run(image)
        with model.caching("resid_post") as cache:
            run(image)
        assert len(cache) == 1
    assert graphs() == 3
    for _ in range(3):
        run(image)
    assert graphs() == 3


def test_another_hook_is_never_mistaken_for_the_last(model, image):
    """Same place, same code, other numbers: each pass is by its own hook."""
    run = compiled(model)
    for factor in (0.0, 2.0, -1.0):

        def hook(x, at, factor=factor):
            return factor * x

        with model.hooks({("z", 0): hook}):
            output = run(image)
        torch.testing.assert_close(output, model.run_with_hooks(image, hooks={("z", 0): hook}), **CLOSE)


def test_each_scope_fills_its_own_cache(model, image):
    run = compiled(model)
    caches = []
    for shift in (0, 1, 2):
        with model.caching("resid_post") as cache:
            run(image + shift)
        caches.append(cache)
    for shift, cache in enumerate(caches):
        _, wanted = model.run_with_cache(image + shift, names="resid_post")
        torch.testing.assert_close(cache["resid_post", 0], wanted["resid_post", 0], **CLOSE)


def test_gradients_flow_through_a_compiled_edit(make, image):
    model = make(layers=1)
    run = compiled(model, "aot_eager")
    wanted = torch.autograd.grad(model.run_with_hooks(image, hooks={"z": halve}).sum(), model.embed.proj.weight)
    with model.hooks({"z": halve}):
        found = torch.autograd.grad(run(image).sum(), model.embed.proj.weight)
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_a_model_compiled_in_place(model, image):
    logits, eager = model.run_with_cache(image, names=["z", "resid_post"])
    model.compile(fullgraph=True, backend="eager")
    output, cache = model.run_with_cache(image, names=["z", "resid_post"])
    torch.testing.assert_close(output, logits, **CLOSE)
    for name in eager:
        torch.testing.assert_close(cache[name], eager[name], **CLOSE)
    wanted = model.run_with_hooks(image, hooks={"z": halve})
    assert (wanted - logits).abs().max() > 1e-6
    _, stopped = model.run_with_cache(image, names="z", output=False)
    torch.testing.assert_close(stopped["z", 0], eager["z", 0], **CLOSE)
    assert graphs() > 0


@pytest.mark.parametrize("part", ["", "blocks.0", "blocks.0.mlp"])
def test_gradients_by_activations_of_what_is_compiled_in_place(make, image, part):
    """What a compiled graph gives out does not depend on what else it gives out, so such points run eagerly."""
    model, plain = (make(layers=1, scale=True) for _ in range(2))
    model.get_submodule(part).compile(backend="aot_eager")
    asked = {"loss": lambda logits: logits[:, 0].sum(), "names": ["resid_mid", "mlp.post"]}
    for _ in range(2):
        _, cache = model.run_with_cache(image, **asked)
        _, eager = plain.run_with_cache(image, **asked)
        for name in eager:
            assert eager.grad[name].any()
            torch.testing.assert_close(cache.grad[name], eager.grad[name], **CLOSE)
        model(image)


def test_what_cannot_be_compiled_is_an_error_not_a_silence(model, image):
    run = compiled(model)
    errors = (HookError, torch._dynamo.exc.Unsupported)
    with model.hooks(backward={"z": halve}), pytest.raises(errors, match="cannot run in a compiled model"):
        run(image)
    with model.caching("z"):
        run(image)
        with pytest.raises(errors, match="fired twice"):
            run(image)
    with (
        model.hooks({"z": lambda x, at: x[:, :1]}),
        pytest.raises(errors, match=r"attn.hook_z returned \[3, 1, 4, 6\]"),
    ):
        run(image)
    torch.testing.assert_close(run(image), model(image), **CLOSE)


ASKING = {
    "hooks": lambda model, x: model.run_with_hooks(x, hooks={("z", 0): halve}),
    "cache": lambda model, x: model.run_with_cache(x, names="z")[1]["z", 1],
}


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("what", ASKING)
def test_hooks_and_caches_asked_for_inside_of_a_compiled_function(make, image, what):
    """Where the function must be one graph, a sentence; else it breaks there, and the numbers are the same."""
    model = make(layers=2).requires_grad_(False)
    asking = ASKING[what]
    expected, plain = asking(model, image), model(image)
    with pytest.raises((HookError, torch._dynamo.exc.Unsupported), match="open the scope around it"):
        torch.compile(asking, backend="eager", fullgraph=True)(model, image)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(asking, backend="eager")(model, image), expected, **CLOSE)
    assert model.open_hooks() == {}
    torch.testing.assert_close(model(image), plain, **CLOSE)


def test_a_scope_of_several_passes_shares_a_graph_and_tells_what_they_missed(model, image):
    run = compiled(model)
    with model.hooks({("z", 0): halve}):
        outputs = [run(image + shift) for shift in range(3)]
    assert graphs() == 1
    for shift, output in enumerate(outputs):
        wanted = model.run_with_hooks(image + shift, hooks={("z", 0): halve})
        torch.testing.assert_close(output, wanted, **CLOSE)
    with pytest.raises(HookError, match=r"blocks\.0\.attn\.hook_z was not reached"), model.hooks({"z": halve}):
        run(image, stop_at_layer=0)
    with pytest.raises(HookError, match="hook_logits was not reached"), model.caching("logits"):
        run(image, stop_at_layer=0)


def test_a_replaced_submodule_of_a_compiled_model(model, image):
    run = compiled(model)
    with model.hooks({("z", 0): halve}):
        run(image)
    model.blocks[0] = copy.deepcopy(model.blocks[0])
    model.blocks[0].attn.W_O.mul_(2)
    with model.hooks({("z", 0): halve}), model.caching("z") as cache:
        output = run(image)
    wanted, eager = model.run_with_cache(image, names="z", hooks={("z", 0): halve})
    torch.testing.assert_close(output, wanted, **CLOSE)
    torch.testing.assert_close(cache["z", 0], eager["z", 0], **CLOSE)
    assert (wanted - model(image)).abs().max() > 1e-6


def breaking(x, at):
    torch._dynamo.graph_break()  # as printing, .item() or numpy do: what follows is compiled in parts, block by block
    return x / 2


def looking(x, at):
    return x * 2 if x.sum().item() > 0 else x / 2


@pytest.mark.parametrize(
    "hooks",
    [
        {("resid_post", 0): breaking},
        {("pattern", 0): looking},
        {("resid_pre", 1): breaking, ("z", 2): halve},
        {"z": looking, ("mlp_out", 1): breaking},
        {"ln1.scale": breaking, ("resid_mid", -1): silence},
    ],
)
def test_hooks_that_cannot_be_traced_run_at_their_own_points(make, image, hooks):
    model = make(layers=3).requires_grad_(False)
    run = torch.compile(model, backend="eager")
    wanted, eager = model.run_with_cache(image, names=["resid_pre", "z"], hooks=hooks)
    with model.hooks(hooks):
        torch.testing.assert_close(run(image), wanted, **CLOSE)
    with model.hooks(hooks), model.caching(["resid_pre", "z"]) as cache:
        torch.testing.assert_close(run(image), wanted, **CLOSE)
    for name in eager:
        torch.testing.assert_close(cache[name], eager[name], **CLOSE)
    torch.testing.assert_close(run(image), model(image), **CLOSE)


def test_inductor(model, image):
    """The default backend, once."""
    model, image = model.float(), image.float()
    run = torch.compile(model, fullgraph=True)
    logits, eager = model.run_with_cache(image, names=["resid_post", "pattern"], hooks={"z": silence})
    with model.hooks({"z": silence}), model.caching(["resid_post", "pattern"]) as cache:
        output = run(image)
    torch.testing.assert_close(output, logits, rtol=1e-3, atol=1e-3)
    for name in eager:
        torch.testing.assert_close(cache[name], eager[name], rtol=1e-3, atol=1e-3)


def test_a_size_that_the_compiler_holds_open():
    """As that of a second model is: a text of it was made at each pass, which no compiler can trace."""
    checked = compiled(lambda x, spec: (check_image(x, spec), x + 1)[1])
    for rows in (8, 12, 16):
        spec = ModelSpec.plain(layers=1, image=(rows, 8), patch=4, d_model=16, heads=2, d_mlp=20, n_classes=3)
        assert checked(torch.zeros(1, 3, rows, 8), spec).shape == (1, 3, rows, 8)
