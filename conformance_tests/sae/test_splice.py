"""Coders spliced into models: exactness, hook points, tokens, transcoders, and where they do not belong."""

from __future__ import annotations

import threading
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from coders import drawn, standard
from models import build
from prisma_conformance.checks.live import live
from prisma_patch import ablate, activation_patch
from prisma_sae import CoderFacts, SparseCoder, feature_attribution, splice
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prisma_core import HookedViT, HookError, InputError, UnknownName

HOOK = "blocks.0.hook_resid_post"
D = 18  # d_model of the small model


def facts(d_in: int = D, d_sae: int = 40, **about: Any) -> CoderFacts:
    return CoderFacts(**({"kind": "standard", "d_in": d_in, "d_sae": d_sae, "d_out": d_in, "hook": HOOK} | about))


def coder(seed: int = 0, scale: float = 0.2, **about: Any) -> SparseCoder:
    tensors = {name: scale * tensor for name, tensor in standard(seed, D, 40).items()}
    return SparseCoder(facts(**about), tensors).double()


def perfect(d: int = D, **about: Any) -> SparseCoder:
    """A coder that reconstructs everything: the positive and the negative part of each direction."""
    eye = torch.eye(d, dtype=torch.float64)
    tensors = {"W_enc": torch.cat([eye, -eye], 1), "b_enc": torch.zeros(2 * d), "W_dec": torch.cat([eye, -eye])}
    return SparseCoder(facts(d, 2 * d, **about), tensors).double()


@pytest.fixture(scope="module")
def model() -> HookedViT:
    made = build(registers=1).double()
    assert made.spec.d_model == D
    return made


@pytest.fixture(scope="module")
def image(model: HookedViT) -> Tensor:
    return model.sample_inputs(3, generator=torch.Generator().manual_seed(0))[0].double()


def test_a_perfect_coder_leaves_the_logits_equal_and_another_does_not(model: HookedViT, image: Tensor) -> None:
    clean = model(image)
    with splice(model, perfect()):
        assert torch.equal(model(image), clean)
    with splice(model, coder()):
        assert (model(image) - clean).abs().max() > 1e-3


def test_with_the_error_term_any_coder_leaves_the_logits_equal_to_the_bit(model: HookedViT, image: Tensor) -> None:
    clean = model(image)
    two = {HOOK: coder(0), "blocks.1.hook_mlp_out": coder(1, hook="blocks.1.hook_mlp_out")}
    with splice(model, two, error_term=True):
        assert torch.equal(model(image), clean)
        _, cache = model.run_with_cache(image, names=["sae.features", "sae.error", HOOK])
        assert torch.equal(model.run_with_hooks(image, hooks={"sae.features": lambda x, at: x}), clean)
    assert cache["sae.error", 0].abs().max() > 0.1


def test_features_are_what_the_coder_encodes_and_edits_of_them_do_what_the_decoder_says(
    model: HookedViT, image: Tensor
) -> None:
    one = coder()
    _, clean = model.run_with_cache(image, names=HOOK)
    name = f"{HOOK}.sae.hook_features"
    with splice(model, one, error_term=True):
        _, cache = model.run_with_cache(image, names=name)
        torch.testing.assert_close(cache[name], one.encode(clean[HOOK]))
        with ablate(model, name, neurons=5):
            _, without = model.run_with_cache(image, names=HOOK)
    removed = clean[HOOK] - cache[name][..., [5]] * one.W_dec[5]
    assert cache[name][..., 5].any()
    torch.testing.assert_close(without[HOOK], removed)


def test_patching_takes_features_like_any_other_activation(model: HookedViT, image: Tensor) -> None:
    name = f"{HOOK}.sae.hook_features"
    with splice(model, coder(), error_term=True):
        effects = activation_patch(model, image[:1], image[1:2], 2, at=name, over="feature")
        _, other = model.run_with_cache(image[1:2], names=name)

        def put(x: Tensor, at: object) -> None:
            x[..., 7] = other[name][..., 7]

        by_hand = model.run_with_hooks(image[:1], hooks={name: put})[0, 2] - model(image[:1])[0, 2]
    torch.testing.assert_close(effects.values.flatten()[7], by_hand.detach().to(effects.values))


@pytest.mark.parametrize(("tokens", "axis", "count"), [("cls", "cls", 1), ("patches", "patch", None)])
def test_a_coder_of_some_tokens_leaves_the_others_alone(
    model: HookedViT, image: Tensor, tokens: str, axis: str, count: int | None
) -> None:
    _, clean = model.run_with_cache(image, names=HOOK)
    with splice(model, coder(tokens=tokens)):
        name = f"{HOOK}.sae.hook_features"
        assert model.hook_points()[name].axes == f"batch {axis} feature"
        _, cache = model.run_with_cache(image, names=[HOOK, name])
    where = model.layout.slice(tokens)
    changed = (cache[HOOK] != clean[HOOK]).any(-1).any(0)
    expected = torch.zeros_like(changed)
    expected[where] = True
    assert torch.equal(changed, expected)
    assert cache[name].shape[1] == (count or model.layout.n_patches)


def test_a_transcoder_reads_one_place_and_writes_another(model: HookedViT, image: Tensor) -> None:
    d_in, d_out = D, D
    reads, writes = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
    tensors = drawn(3, W_enc=(d_in, 40), b_enc=(40,), W_dec=(40, d_out), b_dec=(d_out,), W_skip=(d_out, d_in))
    one = SparseCoder(facts(kind="transcoder", hook=reads, hook_out=writes), tensors).double()
    _, clean = model.run_with_cache(image, names=[reads, writes])
    with splice(model, one):
        _, cache = model.run_with_cache(image, names=["sae.features", writes])
        torch.testing.assert_close(cache[writes], one(clean[reads]))
        # What hooks make of the place that is read is what the transcoder reads.
        _, halved = model.run_with_cache(image, names=writes, hooks={reads: lambda x, at: x / 2})
        torch.testing.assert_close(halved[writes], one(clean[reads] / 2))
    plain = model(image)
    with splice(model, one, error_term=True):
        assert torch.equal(model(image), plain)
        assert torch.equal(model.run_with_cache(image, names=writes)[1][writes], clean[writes])


@pytest.mark.parametrize("how", ["stopped by a cache", "stopped at a layer", "failed"])
def test_a_transcoder_takes_nothing_from_a_pass_that_ended_before_it(model: HookedViT, image: Tensor, how: str) -> None:
    about = facts(kind="transcoder", hook="blocks.0.hook_resid_mid", hook_out="blocks.1.hook_mlp_out")
    one = SparseCoder(about, {**standard(0, D, 40)}).double()
    other = image.flip(0)
    _, cache = model.run_with_cache(other, names=("resid_pre", 1))
    with splice(model, one):
        expected = model(other)
        if how == "stopped by a cache":
            model.run_with_cache(image, names=("resid_pre", 1), output=False)
        elif how == "stopped at a layer":
            model(image, stop_at_layer=1)
        else:
            with pytest.raises(ZeroDivisionError):
                model.run_with_hooks(image, hooks={("resid_pre", 1): lambda x, at: 1 / 0})
        with pytest.raises(HookError, match=r"reads blocks.0.hook_resid_mid, which this pass did not go by"):
            model(cache["resid_pre", 1], start_at_layer=1)
        assert torch.equal(model(other), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_transcoder_across_what_is_checkpointed(
    model: HookedViT, image: Tensor, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = facts(kind="transcoder", hook="blocks.0.ln2.hook_normalized", hook_out="blocks.1.hook_mlp_out")
    one = SparseCoder(about, standard(0, D, 40)).double()

    def gradient(run: Any) -> Tensor:
        x = image.clone().requires_grad_()
        with splice(model, one):
            run(x).square().sum().backward()
        assert x.grad is not None
        return x.grad

    expected = gradient(model)
    torch.testing.assert_close(gradient(lambda x: checkpoint(model, x, use_reentrant=reentrant)), expected)
    for block in model.blocks:
        again = partial(checkpoint, block.forward, use_reentrant=reentrant)
        monkeypatch.setitem(vars(block), "forward", again)  # undone, it leaves none behind
    with pytest.raises(HookError, match=r"blocks\.0\.ln2.*checkpoint the model as a whole"):
        gradient(model)


def test_heads_are_one_vector_to_a_coder_of_z(model: HookedViT, image: Tensor) -> None:
    n = model.spec.blocks[0].attn.n_heads * model.spec.blocks[0].attn.d_head
    one = perfect(n, hook="blocks.0.attn.hook_z")
    plain = model(image)
    with splice(model, one):
        assert torch.equal(model(image), plain)
        _, cache = model.run_with_cache(image, names=["sae.features", "z"])
    _, clean = model.run_with_cache(image, names="z")
    assert torch.equal(cache["z", 0], clean["z", 0])
    assert cache["sae.features", 0].shape == (3, model.layout.n_tokens, 2 * n)


def test_threads_do_not_mix_what_a_transcoder_reads(model: HookedViT, image: Tensor) -> None:
    import contextvars

    reads, writes = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
    tensors = drawn(3, W_enc=(D, 40), b_enc=(40,), W_dec=(40, D))
    one = SparseCoder(facts(kind="transcoder", hook=reads, hook_out=writes), tensors).double()
    alone, together = {}, {}
    with splice(model, one):
        for index in range(3):
            alone[index] = model(image[[index]])
        context = contextvars.copy_context

        def run(index: int) -> None:
            for _ in range(5):
                together[index] = model(image[[index]])

        threads = [threading.Thread(target=context().run, args=(run, index)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(alone[index], together[index]) for index in range(3))


def test_features_pass_the_kits_check_of_liveness(model: HookedViT, image: Tensor) -> None:
    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    subject: Any = SimpleNamespace(fresh_model=lambda: model, inputs=lambda n=2: (image[:n],), generator=generator)
    two = {HOOK: coder(0), "blocks.1.hook_mlp_out": coder(1, hook="blocks.1.hook_mlp_out")}
    for error_term in (False, True):
        with splice(model, two, error_term=error_term):
            assert live(subject).problems == ()


# -------------------------------------------------------------------- where it does not belong


@pytest.mark.parametrize(
    ("about", "options", "words"),
    [
        ({"model": "timm:vit_base_patch16_224"}, {}, ["timm:vit_base_patch16_224", "toy:small"]),
        ({"weights": "0" * 64, "model": "toy:small"}, {}, ["other weights"]),
        ({"hook": "blocks.1.hook_resid_post"}, {}, ["blocks.1.hook_resid_post", HOOK]),
        ({"tokens": "cls"}, {"tokens": "all"}, ["'cls'", "'all'"]),
    ],
)
def test_another_model_place_or_scope_is_an_error_that_says_what_differs(
    model: HookedViT, image: Tensor, about: dict[str, Any], options: dict[str, Any], words: list[str]
) -> None:
    model.reference = "toy:small"
    try:
        with pytest.raises(InputError, match="force=True") as error:
            splice(model, {HOOK: coder(**about)}, **options)
        assert all(word in str(error.value) for word in words)
        with splice(model, {HOOK: coder(**about)}, **options, force=True):
            model(image)
    finally:
        model.reference = None


@pytest.mark.parametrize("known", ["weights", "model", ""])
def test_a_model_with_more_than_its_weights_is_another(model: HookedViT, image: Tensor, known: str) -> None:
    from prisma_sae.binding import model_digest

    about = {"weights": {"weights": model_digest(model)}, "model": {"model": "toy:small"}, "": {}}[known]
    model.reference = "toy:small"
    handle = model.blocks[0].mlp.register_forward_hook(lambda module, args, output: output * 2)
    try:
        if known:
            with pytest.raises(InputError, match=r"hook of torch's at 'blocks\.0\.mlp'.*force=True"):
                splice(model, {HOOK: coder(**about)})
        with splice(model, {HOOK: coder(**about)}, force=bool(known)):
            model(image)
    finally:
        handle.remove()
        model.reference = None
    splice(model, {HOOK: coder(**({"weights": model_digest(model)}))})


def test_the_same_weights_under_another_name_are_the_same_model(model: HookedViT) -> None:
    from prisma_sae.binding import model_digest

    model.reference = "file:somewhere"
    try:
        splice(model, {HOOK: coder(model="toy:small", weights=model_digest(model))})
        splice(model, {HOOK: coder(model="toy:small", also=("file:somewhere",))})
    finally:
        model.reference = None


def test_what_cannot_be_attached_at_all_is_refused(model: HookedViT, image: Tensor) -> None:
    with pytest.raises(InputError, match="does not say where"):
        splice(model, coder(hook=None))
    with pytest.raises(UnknownName, match="2 hook points"):
        splice(model, {"resid_post": coder()})
    with pytest.raises(InputError, match="Two coders"):
        splice(model, [coder(), coder(1)])
    with pytest.raises(InputError, match=r"'cls'.*attn.hook_pattern|layout"):
        splice(model, {"blocks.0.attn.hook_pattern": coder(tokens="cls", hook=None)})
    with pytest.raises(InputError, match=r"\[\.\.\. 10\]"), splice(model, {HOOK: perfect(10)}):
        model(image)
    with pytest.raises(InputError, match="kindd"):
        coder().with_facts(kindd="topk")
    with pytest.raises(InputError, match=r"coder on meta: coder\.to\('cpu'\)"), splice(model, coder().to("meta")):
        model(image)


# -------------------------------------------------------------------- attribution


def test_attribution_between_features_is_the_derivative_through_the_model(model: HookedViT, image: Tensor) -> None:
    later = "blocks.1.hook_resid_post"
    coders = {HOOK: coder(0), later: coder(1, hook=later, scale=0.3)}
    source, target = f"{HOOK}.sae.hook_features", f"{later}.sae.hook_features"
    effects = feature_attribution(model, image, coders, [3, 11])
    assert effects.shape == {"target": 2, "source": 40, "batch": 3}
    step = 1e-6
    with splice(model, coders, error_term=True):
        for place, index in enumerate((3, 11)):
            i = int(effects.values[place].abs().sum(-1).argmax())

            def scaled(factor: float, i: int = i, index: int = index) -> Tensor:
                def edit(x: Tensor, at: object) -> None:
                    x[..., i] *= factor

                _, cache = model.run_with_cache(image, names=target, hooks={source: edit})
                return cache[target][..., index].sum(1)

            slope = (scaled(1 + step) - scaled(1 - step)) / (2 * step)
            assert slope.abs().max() > 1e-4
            torch.testing.assert_close(effects.values[place, i], slope, rtol=1e-4, atol=1e-7)
    with pytest.raises(InputError, match="0 to 39"):
        feature_attribution(model, image, coders, 40)
    pooled = coder(1, hook="hook_pooled")
    assert feature_attribution(model, image, [coders[HOOK], pooled], [3]).shape["target"] == 1
    with pytest.raises(InputError, match=r"hook_pooled\.sae\.hook_features has no tokens"):
        feature_attribution(model, image, [coders[HOOK], pooled], [0], pos=0)
    with pytest.raises(InputError, match="two coders"):
        feature_attribution(model, image, [coder()], 0)


def test_attribution_is_of_the_later_coder_by_the_earlier_whatever_their_order(model: HookedViT, image: Tensor) -> None:
    later = "blocks.1.hook_resid_post"
    first, second = coder(0), coder(1, hook=later)
    there = feature_attribution(model, image, [first, second], 4)
    back = feature_attribution(model, image, [second, first], 4)
    assert torch.equal(there.values, back.values)
    assert there.facts["source"].startswith(HOOK)
