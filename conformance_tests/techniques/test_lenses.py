"""The logit lens with every readout, and the tuned lens, each against a planted truth and a broken twin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import RELAY, marked, planted
from planted_dual import WORDS, planted_dual, relayed_at_the_class_token
from prisma_lens import TunedLens, fit_tuned_lens, lens_kl, logit_lens, probe, unembed_hash
from torch import Tensor
from twins import rejects

from prisma_core import HookedViT, InputError, LoadError, NotApplicable, UnknownName

BRIGHT, DARK = marked(1.0), marked(-1.0)
EXACT = {"rtol": 1e-9, "atol": 1e-9}


# -------------------------------------------------------------------- readouts


@pytest.mark.parametrize("bias", [False, True])
def test_words_read_of_the_class_token_at_the_end_what_the_dual_encoder_says(bias: bool) -> None:
    def truth(lens: Any) -> None:
        clip = planted_dual(ln_final=True, logit_bias=bias)
        images = torch.cat([BRIGHT, DARK])
        seen = lens(clip, images, list(WORDS))
        torch.testing.assert_close(seen.values[-1, :, 0], clip(images, clip.tokens(list(WORDS))), **EXACT)
        assert seen.labels["class"] == tuple(WORDS)
        assert seen.sel(layer="final_post", pos="cls", batch=0).top(1, by_size=False)[0][0] == ("a bright mark",)
        assert seen.sel(layer="final_post", pos="cls", batch=1).top(1, by_size=False)[0][0] == ("a dark mark",)

    rejects(truth, logit_lens, "outputs = token_outputs(own, stream)", "outputs = own.head(stream)")  # no final norm


def test_the_answer_is_read_after_the_layer_that_writes_it_and_no_earlier() -> None:
    lens = logit_lens(planted(), BRIGHT, "a bright mark", against="a dark mark")
    assert lens.labels["class"] == ("a bright mark - a dark mark",)
    before, after = (lens.sel(layer=layer, pos="cls").values.item() for layer in ("1_pre", "final_post"))
    assert abs(before) < 1 < after


def test_directions_classes_and_no_target_agree() -> None:
    model = planted()
    whole = logit_lens(model, BRIGHT)
    one = logit_lens(model, BRIGHT, [2, "nothing"])
    torch.testing.assert_close(whole.values[..., [2, 0]], one.values)
    assert one.labels["class"] == ("a dark mark", "nothing")
    directions = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    along = logit_lens(model, BRIGHT, directions, labels=("one", "two"))
    torch.testing.assert_close(along.values, whole.values @ directions.T)
    assert along.labels["class"] == ("one", "two")


def test_chunks_and_top_k_are_those_of_the_whole() -> None:
    model, images = planted(), torch.cat([BRIGHT, DARK])
    whole = logit_lens(model, images)
    torch.testing.assert_close(logit_lens(model, images, chunk=3).values, whole.values)
    top = logit_lens(model, images, topk=2, chunk=3)
    values, classes = whole.values.topk(2)
    torch.testing.assert_close(top.values, values)
    assert torch.equal(top.tensors["classes"], classes)
    assert top.facts["labels"] == list(model.labels or ())


def test_a_probe_is_a_readout_of_the_stream_it_was_fitted_on() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    model = planted()
    data = [
        (torch.cat([marked(0.4, 2 * seed, 8), marked(-0.4, 2 * seed + 1, 8)]), torch.tensor([1] * 8 + [0] * 8))
        for seed in range(4)
    ]
    fitted = probe(model, data, names=["resid_post"], tokens="cls", labels=("dark", "bright"), control=False)
    lens = logit_lens(model, torch.cat([BRIGHT, DARK]), fitted)
    assert lens.labels["layer"] == ("L0", "L1")
    assert lens.labels["class"] == ("bright",)
    bright, dark = lens.sel(layer="L1", pos="cls").values[:, 0].tolist()
    assert bright > 0 > dark
    _, cache = model.run_with_cache(BRIGHT)
    name = "blocks.1.hook_resid_post"
    by_hand = cache[name] @ fitted.tensors[f"{name}/weight"].double().T + fitted.tensors[f"{name}/bias"]
    torch.testing.assert_close(lens.values[1, :1], by_hand, **EXACT)


def test_what_a_lens_cannot_read_is_said() -> None:
    model, clip = planted(), planted_dual()
    _, cache = planted(seed=1).run_with_cache(BRIGHT)
    with pytest.raises(InputError, match="another model"):
        logit_lens(model, cache)
    with pytest.raises(UnknownName, match="a bright mark"):
        logit_lens(model, BRIGHT, "a brigth mark")
    with pytest.raises(InputError, match=r"\[class 8\]"):
        logit_lens(clip, BRIGHT, torch.zeros(5, dtype=torch.float64))
    with pytest.raises(InputError, match="no classes"):
        logit_lens(clip, BRIGHT, 3)
    with pytest.raises(InputError, match="2 directions and 1"):
        logit_lens(model, BRIGHT, [0, 1], labels=["x"])
    with pytest.raises(InputError, match="probe"):
        logit_lens(model, BRIGHT, logit_lens(model, BRIGHT))


# -------------------------------------------------------------------- tuned lens


def batches(n: int, first: int) -> list[Tensor]:
    """Batches of images with bright and dark marks of several strengths."""
    return [
        torch.cat([marked(sign * size, first + 8 * at, batch=4) for sign in (1, -1) for size in (0.05, 0.15)])
        for at in range(n)
    ]


@pytest.fixture(scope="module")
def model() -> HookedViT:
    return relayed_at_the_class_token()


@pytest.fixture(scope="module")
def lens(model: HookedViT) -> TunedLens:
    return fit_tuned_lens(model, batches(8, 0), tokens="cls", epochs=40, lr=0.03)


def test_data_that_are_used_up_are_said(model: HookedViT) -> None:
    with pytest.raises(InputError, match="epoch 2 of 2"):
        fit_tuned_lens(model, iter(batches(2, 0)), epochs=2)
    with pytest.raises(InputError, match="no batches"):
        fit_tuned_lens(model, [])


def test_the_tuned_lens_learns_the_planted_translation_and_nothing_where_there_is_nothing(model: HookedViT) -> None:
    held_out = batches(3, 1000)

    def truth(fit: Any) -> None:
        fitted = fit(model, batches(8, 0), tokens="cls", epochs=40, lr=0.03)
        kl = lens_kl(model, held_out, fitted, tokens="cls")
        assert kl.sel(layer="1_pre", lens="tuned").values < 0.1 * kl.sel(layer="1_pre", lens="logit").values
        assert kl.sel(layer="0_pre", lens="tuned").values > 0.3 * kl.sel(layer="0_pre", lens="logit").values

    rejects(truth, fit_tuned_lens, "read(lens.translate(x, at))).mean()", "read(lens.translate(x, 0))).mean()")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("_kl(final, read(each)).double()", "_kl(read(each), final).double()"),
        ("total / n,", "total / (n + 1),"),
        ("[x] if tuned is None else [x, tuned.translate(x, at)]", "[x] if tuned is None else [x, x]"),
    ],
)
def test_how_far_a_lens_is_from_the_end_is_the_divergence_by_hand(
    model: HookedViT, lens: TunedLens, right: str, wrong: str
) -> None:
    held_out = batches(2, 500)

    def truth(measure: Any) -> None:
        found = measure(model, held_out, lens, tokens="cls")
        assert found.facts["n_tokens"] == 2 * len(held_out[0])
        images = torch.cat(held_out)
        final = model(images).softmax(-1)  # it reads the class token
        for kind, tuned in (("logit", None), ("tuned", lens)):
            for at in range(2):
                early = logit_lens(model, images, tuned=tuned).sel(pos="cls", layer=f"{at}_pre").values
                expected = torch.nn.functional.kl_div(early.log_softmax(-1), final, reduction="batchmean")
                torch.testing.assert_close(found.sel(lens=kind, layer=f"{at}_pre").values, expected, **EXACT)
        assert found.sel(lens="logit", layer="1_pre").values > 0.05, "there is something to measure"

    rejects(truth, lens_kl, right, wrong)


def test_the_tuned_lens_reads_the_answer_one_block_earlier(model: HookedViT, lens: TunedLens) -> None:
    image = marked(0.3, 77)
    plain, tuned = (
        logit_lens(model, image, "a bright mark", against="a dark mark", tuned=each) for each in (None, lens)
    )
    assert tuned.technique == "tuned_lens"
    final = plain.sel(layer="final_post", pos="cls").values.item()
    assert abs(plain.sel(layer="1_pre", pos="cls").values.item()) < 0.1 * final
    assert tuned.sel(layer="1_pre", pos="cls").values.item() > 0.5 * final
    torch.testing.assert_close(tuned.values[-1], plain.values[-1])
    untrained = logit_lens(model, image, "a bright mark", against="a dark mark", tuned=TunedLens.of(model))
    torch.testing.assert_close(untrained.values, plain.values)


def test_fitting_leaves_the_model_as_it_was(model: HookedViT) -> None:
    before = {name: x.clone() for name, x in model.named_parameters()}
    fit_tuned_lens(model, batches(1, 0))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(x, before[name]) for name, x in model.named_parameters())


def test_a_fit_goes_on_from_a_lens(model: HookedViT, lens: TunedLens) -> None:
    held_out = batches(2, 1000)
    again = fit_tuned_lens(model, batches(1, 0), tokens="cls", lr=1e-4, start=lens)
    before, after = (lens_kl(model, held_out, each, tokens="cls").sel(lens="tuned", layer=1) for each in (lens, again))
    assert after.values.item() == pytest.approx(before.values.item(), rel=0.2)
    fresh = lens_kl(model, held_out, TunedLens.of(model), tokens="cls").sel(lens="tuned", layer=1)
    assert fresh.values > 5 * after.values
    assert not torch.equal(again.layer_translators[0].weight, lens.layer_translators[0].weight)
    with pytest.raises(InputError, match="unembed_hash"):
        fit_tuned_lens(_with_head(2.0), batches(1, 0), start=lens)


@pytest.mark.parametrize("safetensors", [False, True])
def test_a_tuned_lens_is_a_folder_of_tuned_lens_layout(
    model: HookedViT, lens: TunedLens, tmp_path: Path, safetensors: bool
) -> None:
    folder = lens.save(tmp_path / "lens", safetensors=safetensors)
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        f"params.{'safetensors' if safetensors else 'pt'}",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["unembed_hash"] == unembed_hash(model)
    assert {"base_model_name_or_path", "d_model", "num_hidden_layers", "bias", "lens_type"} <= set(config)
    if not safetensors:
        state = torch.load(folder / "params.pt", weights_only=True)
        assert set(state) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    again = TunedLens.load(folder)
    stream = torch.randn(2, 3, model.spec.d_model, dtype=torch.float64)
    torch.testing.assert_close(again.translate(stream, 1), lens.translate(stream, 1), rtol=1e-6, atol=1e-6)


def test_a_folder_of_tuned_lens_own_class_is_read(model: HookedViT, lens: TunedLens, tmp_path: Path) -> None:
    theirs = pytest.importorskip("tuned_lens.nn.lenses", reason="tuned-lens is not installed")
    unembed = theirs.Unembed.__new__(theirs.Unembed)
    torch.nn.Module.__init__(unembed)
    unembed.final_norm, unembed.unembedding = torch.nn.Identity(), model.head
    assert unembed.unembedding_hash() == unembed_hash(model)
    read = theirs.TunedLens.from_unembed_and_pretrained(unembed, str(lens.save(tmp_path / "ours")))
    stream = torch.randn(2, model.spec.d_model, dtype=torch.float64)
    torch.testing.assert_close(read.transform_hidden(stream, 1), lens.translate(stream, 1))
    read.save(tmp_path / "theirs")
    torch.testing.assert_close(
        TunedLens.load(tmp_path / "theirs").translate(stream, 0), lens.translate(stream, 0), rtol=1e-6, atol=1e-6
    )


def test_a_lens_of_another_head_and_broken_folders_are_refused(
    model: HookedViT, lens: TunedLens, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="unembed_hash"):
        lens.check(_with_head(2.0))
    with pytest.raises(InputError, match="unembed_hash"):
        logit_lens(_with_head(2.0), BRIGHT, tuned=lens)
    with pytest.raises(LoadError, match=r"config\.json"):
        TunedLens.load(tmp_path)
    folder = lens.save(tmp_path / "lens")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(LoadError, match=r"4 tensors, and config\.json describes 3 translators"):
        TunedLens.load(folder)
    with pytest.raises(InputError, match="no batches"):
        fit_tuned_lens(model, [])
    with pytest.raises(NotApplicable, match="target="):
        fit_tuned_lens(planted_dual(), batches(1, 0))


def test_a_dual_encoders_stream_is_tuned_to_what_words_say() -> None:
    clip = planted_dual()
    kl = lens_kl(clip, batches(1, 0), target=["a bright mark", "a dark mark"], tokens="cls")
    assert kl.shape == {"layer": 2, "lens": 1}
    fitted = fit_tuned_lens(clip, batches(1, 0), target=["a bright mark", "a dark mark"], tokens="cls")
    assert fitted.config["unembed_hash"] == unembed_hash(clip.vision)
    assert logit_lens(clip, BRIGHT, ["a cat"], tuned=fitted).sel(pos=RELAY).shape == {
        "layer": 3,
        "batch": 1,
        "class": 1,
    }


def _with_head(factor: float) -> HookedViT:
    model = relayed_at_the_class_token()
    with torch.no_grad():
        model.head.weight *= factor
    return model
