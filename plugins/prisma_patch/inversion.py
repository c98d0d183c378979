"""Textual inversion: a word learned for a few images, and what it changes inside the text tower, layer by layer.

Equation:
    v = argmin_v mean_i -log softmax_w(s(x_i, t_i(w)))[v], over the word v and the words w that it is told from; without
    such words v = argmax_v mean_i s(x_i, t_i(v)). s(x, t) is the dual encoder's logit of image x and text t, t_i(w) the
    template of image i with w in it; all weights are fixed, and v stands where the word's token is embedded.
    reading[l, w, p] = cos(h_l(v)_p - m_lp, h_l(w)_p - m_lp), h_l the activation at l and m_l its mean over the words.
Cost:
    One pass of the vision tower; in each step a pass of the text tower and its gradient, a text for each template.
Misleads:
    A free vector may go where no word lies: it fits the images and means nothing else. Try it on further images, in
    templates it was not learned in, and against words it was not told from. Few images share more than what is meant
    (a ground, a colour), which the word then says too.
Source:
    Gal et al. 2023, "An image is worth one word" (textual inversion); Cohen et al. 2022 (words learned for CLIP).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from prisma_lens.inputs import as_input
from pydantic import Field
from torch import Tensor

from prisma_core import HookContext, HookedDual, HookedModel, InputError, NotApplicable, Result
from prisma_core.plugin import Above, Count, Query, checked, layer_of, taking_gradients
from prisma_patch.interventions import Scope
from prisma_patch.sweeps import bar

TEMPLATE = "a photo of a {}."


@checked
def learn_word(
    model: HookedModel,
    images: Any,
    word: str,
    template: str | Sequence[str] = TEMPLATE,
    *,
    against: Sequence[str] = (),
    start: str | None = None,
    steps: Count = 100,
    lr: Above = 0.1,
    progress: bool = False,
) -> Result:
    """Return the token embedding that makes a word fit a few images: ``[d_model]``.

    >>> import prisma_core as prisma
    >>> from prisma_toy import draw_captions, normalise
    >>> model = prisma.load("toy:clip-scenes")
    >>> images = normalise(draw_captions(4, seed=0).image)
    >>> learned = learn_word(model, images, "wug", "a {}", steps=5)
    >>> learned.axes, learned.facts["word"], learned.tensors["loss"].shape
    (('d_model',), 'wug', torch.Size([5]))

    Args:
        model: a dual encoder in canonical form, with its tokenizer; it stays as it is.
        images: ``[batch channel height width]``, as the model takes them.
        word: what to call it: a single token of the tokenizer, which means the learned word inside ``use_word``.
        template: a sentence with ``{}`` where the word goes, or one for each image.
        against: words that the images are told from in the same templates; none makes the texts like the images alone.
        start: the word whose embedding learning starts from; None starts from the mean of the vocabulary.
        steps: of Adam.
        lr: its learning rate, in standard deviations of the vocabulary's embeddings.
        progress: show a bar.

    Returns:
        The embedding; ``tensors["loss"]`` before each step, ``facts`` the word, its token and the templates.

    Raises:
        NotApplicable: the model is no dual encoder in canonical form.
        InputError: the word is no single token, or stands among ``against``; a template without ``{}``, or of another
            number than the images.
    """
    own = _dual(model)
    images = as_input(own.vision, images)
    templates = [template] * len(images) if isinstance(template, str) else list(template)
    distinct = list(dict.fromkeys(templates))
    if len(templates) != len(images) or not all("{}" in each for each in distinct):
        raise InputError(
            f"Expected a sentence with {{}} where the word goes, or one for each of {len(images)} images, "
            f"got {template!r}."
        )
    if isinstance(against, str) or word in against or steps < 1:
        raise InputError(
            f"Expected a list of other words than {word!r} in against= and at least one step, got {against!r}, {steps}."
        )
    token, table = token_of(own, word), own.text.W_E.detach()
    tokens = _texts(own, word, distinct, token)
    row = torch.tensor([distinct.index(each) for each in templates], device=table.device)
    vector = (table.mean(0) if start is None else table[token_of(own, start)]).clone().requires_grad_()
    solver = torch.optim.Adam([vector], lr=lr * float(table.std()))
    every, losses = torch.arange(len(images), device=table.device), list[Tensor]()
    with torch.no_grad():
        seen = own.vision(images)
        others = [own.compare(seen, own.encode_text([t.replace("{}", w) for t in distinct])) for w in against]
        fixed = torch.stack([x[every, row] for x in others], 1) if others else None
    for _ in bar(range(steps), "Steps", progress):
        with taking_gradients(), _spoken(own, token, vector):
            fits = own.compare(seen, own.text(tokens))[every, row]
            loss = -fits.mean() if fixed is None else -torch.cat([fits[:, None], fixed], 1).log_softmax(1)[:, 0].mean()
            (vector.grad,) = torch.autograd.grad(loss, [vector])
        solver.step()
        losses.append(loss.detach())
    return Result(
        vector,
        ("d_model",),
        technique="learn_word",
        unit="token embedding",
        baseline=f"the embedding of {start!r}" if start else "the mean of the vocabulary",
        tensors={"loss": torch.stack(losses)},
        facts={"word": word, "token": token, "templates": distinct, "against": [*against], "images": len(images)},
    )


@checked
def use_word(model: HookedModel, learned: Result) -> Scope:
    """Return a scope in which a learned word means what it was learned for.

    All that reads texts runs inside it: ``classify``, ``encode_text``, ``attribute``, ``activation_patch``.

    >>> import prisma_core as prisma
    >>> from prisma_toy import draw_captions, normalise
    >>> clip = prisma.load("toy:clip-scenes")
    >>> images = normalise(draw_captions(4, seed=0).image)
    >>> learned = learn_word(clip, images, "wug", "a {}", steps=5)
    >>> with use_word(clip, learned):
    ...     clip.encode_text(["a wug"]).shape
    torch.Size([1, 96])

    Args:
        model: the model that it was learned with, or one with the same tokenizer and width.
        learned: the result of ``learn_word``.

    Raises:
        NotApplicable: as in ``learn_word``.
        InputError: the result is another technique's, or of another width.
    """
    own = _dual(model)
    _check_learned(own, learned)
    return _spoken(own, int(learned.facts["token"]), learned.values)


@checked
@torch.no_grad()
def read_word(
    model: HookedModel,
    learned: Result,
    words: Annotated[Sequence[str], Field(min_length=2)],
    *,
    template: str | None = None,
    at: Query = "resid_post",
) -> Result:
    """Return how like some words a learned one is inside the text tower: cosines ``[layer word pos]``.

    What all the words share is taken out first. Tokens in front of the word know nothing of it: 0.

    >>> import prisma_core as prisma
    >>> from prisma_toy import draw_captions, normalise
    >>> clip = prisma.load("toy:clip-scenes")
    >>> images = normalise(draw_captions(4, seed=0).image)
    >>> learned = learn_word(clip, images, "wug", "a {}", steps=5)
    >>> read_word(clip, learned, ["circle", "star"]).axes
    ('layer', 'word', 'pos')

    Args:
        model: as in ``use_word``.
        learned: the result of ``learn_word``.
        words: to compare with, each a single token; at least two.
        template: the sentence to read; None for the first it was learned in.
        at: hook points of the text tower with an axis of tokens, such as ``attn_out``; the token embedding comes first.

    Returns:
        The cosines; in ``tensors`` the ``size`` of what the learned word does at each place, over the mean size of the
        words ``[layer pos]``, and the cosines of the whole texts' vectors, ``output`` ``[word]``.

    Raises:
        NotApplicable: as in ``learn_word``.
        InputError: fewer than two words, one of several tokens, or a hook point without tokens.
    """
    own = _dual(model)
    _check_learned(own, learned)
    sentence = learned.facts["templates"][0] if template is None else template
    text, word = own.text, learned.facts["word"]
    token = int(learned.facts["token"])
    tokens = torch.cat([_texts(own, each, [sentence], token_of(own, each)) for each in words])
    names = ["hook_embed", *(name for name in text.resolve(at) if name != "hook_embed")]
    points = text.hook_points()
    if bare := [each for each in names[1:] if not points[each].axes.startswith("batch pos")]:
        raise InputError(f"{bare[0]} ({points[bare[0]].axes}) has no activation for each token.")
    plain, others = text.run_with_cache(tokens, names=names)
    with use_word(own, learned):
        said, mine = text.run_with_cache(_texts(own, word, [sentence], token), names=names)
    end = int((tokens != tokens[0]).any(0).nonzero().max()) + 1  # behind the words' token, to the last that is read
    end = max(end, int(text.shares(tokens[:1])[0].nonzero().max()) + 1)
    rows, sizes = list[Tensor](), list[Tensor]()
    for name in names:
        theirs, ours = (cache[name][:, :end].flatten(2) for cache in (others, mine))
        cosines, size = _centred(ours[0], theirs)
        rows.append(cosines)
        sizes.append(size)
    output, _ = _centred(said[0][None], plain[:, None])
    return Result(
        torch.stack(rows),
        ("layer", "word", "pos"),
        {"layer": _labels(names), "word": tuple(words)},
        technique="read_word",
        unit="cosine",
        baseline="the mean of the words",
        tensors={"size": torch.stack(sizes), "output": output[:, 0]},
        facts={"word": word, "template": sentence, "at": int((tokens != tokens[0]).any(0).nonzero().min())},
    )


def _check_learned(own: HookedDual, learned: Result) -> None:
    if learned.technique != "learn_word" or learned.values.shape != (own.text.W_E.shape[1],):
        raise InputError(
            f"Expected the result of learn_word, an embedding [{own.text.W_E.shape[1]}], "
            f"got {learned.technique or 'a Result'} of {list(learned.values.shape)}."
        )


def token_of(model: HookedDual, word: str) -> int:
    """Return the token of a word.

    Raises:
        InputError: the tokenizer makes several of it, or none.
    """
    whole, bare = model.tokens([word, ""])
    differ = (whole != bare).nonzero()[:, 0]
    at = int(differ[0]) if len(differ) else len(whole)
    if at == len(whole) or not torch.equal(whole[at + 1 :], bare[at:-1]):
        raise InputError(
            f"Expected a word that this model's tokenizer makes a single token of, got {word!r}: take another."
        )
    return int(whole[at])


# -------------------------------------------------------------------- parts


def _dual(model: HookedModel) -> HookedDual:
    if not isinstance(model, HookedDual):
        raise NotApplicable(
            "A word is learned from images by a dual encoder in canonical form, and this model is none."
        )
    return model


def _texts(model: HookedDual, word: str, templates: Sequence[str], token: int) -> Tensor:
    """Return tokens of the templates with a word in them ``[text pos]``."""
    tokens = model.tokens([each.replace("{}", word) for each in templates])
    if not bool((tokens == token).any(1).all()):
        raise InputError(
            f"In {templates[0]!r} the word {word!r} is not the token {token} that it is alone: try others."
        )
    return tokens


def _spoken(model: HookedDual, token: int, vector: Tensor) -> Scope:
    """Return a scope in which a token is embedded as a vector."""
    row = model.text.W_E.detach()[token]

    def speak(x: Tensor, at: HookContext) -> Tensor:
        return torch.where((x == row.to(x)).all(-1, keepdim=True), vector.to(x), x)

    return model.hooks({"text.hook_embed": speak})


def _centred(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines ``[word pos]`` and sizes ``[pos]`` of ``[pos d]`` and ``[word pos d]``, less the words' mean."""
    mean = theirs.mean(0)
    mine, each = ours - mean, theirs - mean
    typical = each.norm(dim=-1).mean(0)
    alive = typical > 1e-6 * mean.norm(dim=-1)  # tokens in front of the word are the same in all texts
    cosines = F.cosine_similarity(mine[None], each, dim=-1) * alive
    return cosines, torch.where(alive, mine.norm(dim=-1) / typical.clamp_min(1e-30), torch.zeros_like(typical))


def _labels(names: Sequence[str]) -> tuple[str, ...]:
    """Return ``L0`` for a hook point of layer 0, and the names themselves where a layer has several."""
    layers = [layer_of(name) for name in names]
    short = [name if layer is None else f"L{layer}" for name, layer in zip(names, layers, strict=True)]
    return tuple(short if len({*short}) == len(short) else names)
