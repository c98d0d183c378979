"""Every measure of a coder, worked out in numpy from the activations and logits alone; batches change none of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from coders import drawn, standard
from models import build
from prisma_sae import CoderFacts, SparseCoder, evaluate, monosemanticity, splice
from prisma_toy import sample_scene
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import prisma_core as prisma
from prisma_core import HookedModel, InputError, Result

RESID, D, N_FEATURES = "blocks.0.hook_resid_post", 18, 40
IMAGES = 7


def coder(d: int = D, hook: str = RESID, hook_out: str | None = None, tokens: Any = "all") -> SparseCoder:
    kind: Any = "standard" if hook_out is None else "transcoder"
    tensors = {name: 0.2 * tensor for name, tensor in standard(3, d, N_FEATURES).items()}
    if hook_out is not None:
        tensors |= drawn(4, W_skip=(d, d))
    about = {"d_in": d, "d_sae": N_FEATURES, "d_out": d, "hook": hook, "hook_out": hook_out, "tokens": tokens}
    return SparseCoder(CoderFacts(kind=kind, **about), tensors).double()


def softmax_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    shifted = logits - logits.max(1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return float(-logs[np.arange(len(labels)), labels].mean())


def by_hand(model: HookedModel, one: SparseCoder, inputs: Any, labels: Tensor, scale: float, embed: str) -> Any:
    """Return the measures, from what caches and plain edits of the passes say."""
    reads = one.facts.hook
    writes = one.facts.hook_out or reads
    prefix = "vision." if isinstance(model, prisma.HookedDual) else ""
    _, cache = model.run_with_cache(*inputs, names=[prefix + reads, prefix + writes, embed])
    u, x, e = (cache[name].detach().double().numpy() for name in (prefix + reads, prefix + writes, embed))
    layout = (model.vision if prefix else model).layout_for(inputs[0])
    at = {"all": slice(None), "cls": slice(0, layout.cls), "patches": slice(layout.n_prefix, None)}[one.facts.tokens]
    u, x = (each[:, at] for each in (u, x))
    w = {name: tensor.double().numpy() for name, tensor in one.tensors().items()}
    f = np.maximum((u - w.get("b_in", 0)) @ w["W_enc"] + w["b_enc"], 0)
    y = f @ w["W_dec"] + w["b_dec"] + (u @ w["W_skip"].T if "W_skip" in w else 0)
    f2, x2, y2 = (each.reshape(-1, each.shape[-1]) for each in (f, x, y))
    residual, spread = ((x2 - y2) ** 2).sum(1), ((x2 - x2.mean(0)) ** 2).sum(1)
    on = (f2 > 0).mean(0)

    def losses(edit: Any) -> list[float]:
        with torch.no_grad():
            out = model.run_with_hooks(*inputs, hooks={prefix + writes: edit}).double().numpy()
        return [softmax_loss(out, labels.numpy()), softmax_loss(out / scale, labels.numpy())]

    def put(value: Any) -> Any:
        def edit(activation: Tensor, context: Any) -> None:
            activation[:, at] = torch.as_tensor(value).to(activation)

        return edit

    clean, spliced, zero = losses(lambda x, at: None), losses(put(y)), losses(put(np.zeros_like(y)))
    images = f.reshape(len(f), -1, f.shape[-1]).mean(1)
    span = images.max(0) - images.min(0)
    a = (images - images.min(0)) / np.where(span == 0, 1, span)
    e = e / np.linalg.norm(e, axis=1, keepdims=True)
    above, below = np.zeros(f.shape[-1]), np.zeros(f.shape[-1])
    for i in range(len(a)):
        for j in range(i):
            above, below = above + a[i] * a[j] * (e[i] @ e[j]), below + a[i] * a[j]
    scores = above[below > 1e-12] / below[below > 1e-12]
    measures = {
        "l0": (f2 > 0).sum(1).mean(),
        "explained_variance": 1 - (residual / spread).mean(),
        "explained_variance_total": 1 - residual.sum() / spread.sum(),
        "cosine": ((x2 * y2).sum(1) / np.linalg.norm(x2, axis=1) / np.linalg.norm(y2, axis=1)).mean(),
        "dead": (on == 0).mean(),
        "dense": (on >= 0.5).mean(),
        "monosemanticity": scores.mean(),
    }
    if one.facts.tokens == "all":
        measures["l0_cls"] = (f[:, : layout.cls] > 0).sum(-1).mean()
    for index, suffix in enumerate(("", "_no_scale")):
        measures |= {f"loss{suffix}": clean[index], f"loss_spliced{suffix}": spliced[index]}
        measures |= {f"loss_zero{suffix}": zero[index]}
        measures[f"loss_recovered{suffix}"] = (zero[index] - spliced[index]) / (zero[index] - clean[index])
    return measures


def measured(result: Result) -> dict[str, float]:
    return dict(zip(result.names("measure"), result.values.tolist(), strict=True))


PLACES: dict[str, dict[str, Any]] = {
    "all tokens": {},
    "class token": {"tokens": "cls"},
    "patches": {"tokens": "patches"},
    "transcoder": {"hook": "blocks.1.ln2.hook_normalized", "hook_out": "blocks.1.hook_mlp_out"},
    "transcoder of patches": {"hook": "hook_full_embed", "hook_out": "blocks.0.hook_mlp_out", "tokens": "patches"},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("batch", [1, 3, IMAGES])
def test_measures_of_a_classifier(place: str, batch: int) -> None:
    model = build(registers=1).double()
    images = model.sample_inputs(IMAGES, generator=torch.Generator().manual_seed(0))[0].double()
    labels = torch.tensor([0, 3, 6, 2, 1, 1, 4])
    one = coder(**PLACES[place])
    expected = by_hand(model, one, (images,), labels, 1.0, "hook_pooled")
    result = evaluate(model, one, images, labels, batch=batch, dense=0.5)
    assert measured(result) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("tokens", ["all", "patches"])
def test_measures_of_a_dual_encoder(tokens: str) -> None:
    model = prisma.load("toy:clip-scenes").double()
    texts = model.tokens(["a red circle", "a blue square", "a green triangle"])
    images = model.preprocess([sample_scene(seed).image for seed in range(IMAGES)]).double()
    labels = torch.tensor([0, 1, 2, 0, 2, 1, 1])
    scale = model.logit_scale.exp().item()
    assert abs(scale - 1) > 1
    one = coder(d=96, tokens=tokens)
    expected = by_hand(model, one, (images, texts), labels, scale, "hook_image_embed")
    for batch in (2, IMAGES):
        result = evaluate(model, one, images, labels, texts=texts, batch=batch, dense=0.5)
        assert measured(result) == pytest.approx(expected, rel=1e-6)
    assert expected["loss_recovered"] != pytest.approx(expected["loss_recovered_no_scale"], abs=1e-3)


def test_a_pair_of_towers_is_measured_on_images_and_has_no_loss_without_texts() -> None:
    model = prisma.load("toy:clip-scenes")
    texts = model.tokens(["a red circle", "a blue square", "a green triangle"])
    images = model.preprocess([sample_scene(seed).image for seed in range(3)])
    place = {"hook": "blocks.1.ln2.hook_normalized", "hook_out": "blocks.1.hook_mlp_out"}
    short = coder(d=96, **place)
    full = coder(d=96, **{key: f"vision.{hook}" for key, hook in place.items()})
    assert measured(evaluate(model, full, images)) == pytest.approx(measured(evaluate(model, short, images)))
    with pytest.raises(InputError, match="texts= too"):  # not numbers of the embedding as if they were classes
        evaluate(model, full, images, torch.tensor([0, 1, 2]))
    words = coder(d=96, hook="text.blocks.0.hook_resid_post")
    with pytest.raises(InputError, match=r"evaluate\(model\.text"):
        evaluate(model, words, images, torch.tensor([0, 1, 2]), texts=texts)
    alone = evaluate(model.text, words.with_facts(hook="blocks.0.hook_resid_post"), texts)
    assert alone.facts["tokens"] == texts.numel()


def test_batches_come_in_any_form_that_gives_pairs() -> None:
    model = build(registers=1).double()
    images = model.sample_inputs(IMAGES, generator=torch.Generator().manual_seed(0))[0].double()
    labels = torch.tensor([0, 3, 6, 2, 1, 1, 4])
    expected = measured(evaluate(model, coder(), images, labels))
    pairs = list(zip(images.split(3), labels.split(3), strict=True))
    loader = DataLoader(TensorDataset(images, labels), batch_size=2)
    for batches in (pairs, iter(pairs), loader, [*pairs, (images[:0], labels[:0])]):
        assert measured(evaluate(model, coder(), batches)) == pytest.approx(expected, rel=1e-9)


def test_one_token_has_no_variance_to_explain() -> None:
    model = build(registers=1).double()
    image = model.sample_inputs(1, generator=torch.Generator().manual_seed(0))[0].double()
    for images in (image, image.repeat(3, 1, 1, 1)):
        found = measured(evaluate(model, coder(tokens="cls"), images))
        assert np.isnan(found["explained_variance"])
        assert np.isnan(found["explained_variance_total"])
        assert np.isfinite(found["cosine"])


def test_a_zero_embedding_is_like_no_other() -> None:
    a, e = torch.tensor([[1.0], [1.0], [0.0], [1.0]]), torch.tensor([[1.0, 0], [0.6, 0.8], [0, 1], [0, 0]])
    assert monosemanticity(a, e).item() == pytest.approx((0.6 + 0 + 0) / 3)
    whole = monosemanticity(a.long(), e)
    assert whole.item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.tensor([-100, 3, 6, 2, 1]), "from -100"),  # torch's mark for a label to leave out
        (torch.tensor([0.0, 3, 6, 2, 1]), "float64|float32"),
        (torch.eye(7)[:5], r"\[5, 7\]"),
    ],
)
def test_labels_that_are_no_classes(labels: Tensor, said: str) -> None:
    model = build(registers=1).double()
    images = model.sample_inputs(5, generator=torch.Generator().manual_seed(0))[0].double()
    with pytest.raises(InputError, match=said):
        evaluate(model, coder(), images, labels)


def test_what_would_be_left_out_is_refused() -> None:
    model = build(registers=1).double()
    images = model.sample_inputs(5, generator=torch.Generator().manual_seed(0))[0].double()
    labels = torch.tensor([0, 3, 6, 2, 1])
    with pytest.raises(InputError, match=r"batches have theirs"):
        evaluate(model, coder(), [images], labels)
    with pytest.raises(InputError, match="others have none"):
        evaluate(model, coder(), [(images[:2], labels[:2]), images[2:]])
    with pytest.raises(InputError, match=r"1 images, got .*\[4, 3\]"):
        evaluate(model, coder(), images[:1], embeddings=torch.ones(4, 3))
    with pytest.raises(InputError, match=r"embeddings.*NaN"):
        evaluate(model, coder(), images, embeddings=torch.full((5, 3), torch.nan))
    damaged = coder()
    damaged.W_dec[3, 0] = torch.nan
    with pytest.raises(InputError, match=r"NaN or infinite.*damaged"):
        evaluate(model, damaged, images)
    with splice(model, coder()), pytest.raises(InputError, match="same images"):
        monosemanticity(torch.ones(0, 2), torch.ones(0, 2))
