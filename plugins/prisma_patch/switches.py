"""The cat-dog switch: the smallest set of heads whose outputs, taken from another image, flip the prediction.

Equation:
    Heads are ranked by how far each alone moves logit(b) - logit(a) towards b when its output is taken from the other
    image; they are added in that order until argmax is b, then those that are not needed are taken out one by one.
Cost:
    One sweep over all heads, then a pass for each head that is added, and one for each that is left in every round of
    taking out; the last round takes none out.
Misleads:
    Greedy: the set cannot be made smaller by taking one head out, but another set may be smaller still.
Source:
    The Prisma project's main demo (border collie and tabby cat), Joseph and Nanda 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from prisma_lens.inputs import as_inputs, points_of
from prisma_lens.metrics import Class, class_of, logit_difference
from torch import Tensor

from prisma_core import HookContext, HookedModel, InputError, NotApplicable, Result
from prisma_core.plugin import BriefRepr, Query, checked, layer_of
from prisma_patch.passes import Inputs
from prisma_patch.patching import activation_patch, variants_of
from prisma_patch.places import Places, Positions, layout_at


@dataclass(frozen=True, repr=False)
class Switch(BriefRepr):
    """A set of heads that flips a prediction.

    Attributes:
        heads: ``(layer, head)`` of each, the strongest first; heads of attentions side by side follow each other.
        before, after: the predicted class, as label or index.
        margin: ``logit(b) - logit(a)`` after the switch.
        flipped: whether the prediction became ``b``; False where all heads together do not flip it.
        effects: what each head does alone, ``[layer head batch]``.
    """

    heads: tuple[tuple[int, int], ...]
    before: str
    after: str
    margin: float
    flipped: bool
    effects: Result


@checked
def switch(
    model: HookedModel,
    clean: Tensor | Inputs,
    other: Tensor | Inputs,
    a: Class,
    b: Class,
    *,
    at: Query = "z",
    pos: Positions = None,
    progress: bool = False,
) -> Switch:
    """Return the smallest set of heads found whose outputs, taken from ``other``, flip the prediction from a to b.

    >>> import prisma_core as prisma
    >>> from prisma_toy import sample_scene
    >>> model = prisma.load("toy:scenes-3l")
    >>> image, other = (model.preprocess(sample_scene(seed).image) for seed in (0, 3))
    >>> switched = switch(model, image, other, "🟣 purple circle", "🔴 red circle")
    >>> switched.heads, switched.flipped
    (((1, 1),), True)

    Args:
        model: a classifier, or a dual encoder whose texts are the classes.
        clean, other: one image each, ``[1 channel height width]``; with the tokens of the texts for a dual encoder.
        a, b: the predicted class of ``clean``, and the one to flip to: indices or labels.
        at: the heads' outputs; of a dual encoder ``"vision.*hook_z"``.
        pos: tokens whose outputs are taken from ``other``, such as ``"cls"``; None for all.
        progress: show a bar.

    Raises:
        InputError: ``clean`` is not predicted as ``a``, the batch is larger than one, or both are one class.
        UnknownName: no such class.
        NotApplicable: the model's output is no number for each class.
    """
    ours, others = as_inputs(model, clean), as_inputs(model, other)
    first, second = class_of(model, a), class_of(model, b)
    if first == second:
        raise InputError(f"{a!r} and {b!r} are one class, so there is nothing to flip.")
    metric = logit_difference(second, first)
    with torch.no_grad():
        output = model(*ours)
    if output.ndim != 2:
        raise NotApplicable(f"This model returns {list(output.shape)}, so no class is predicted that could flip.")
    predicted = int(output[0].argmax())
    if ours[0].shape[0] != 1 or predicted != first:
        raise InputError(
            f"Expected one image that the model takes for {a!r}; it takes it for {_name(model, predicted)!r}."
        )
    effects = activation_patch(model, clean, other, metric, at=at, over="layer head", pos=pos, progress=progress)
    names = [name for name in points_of(model, at) if layer_of(name) is not None]
    _, theirs = model.run_with_cache(*others, names=names, output=False)
    places = Places(model, names, ["layer", "head"], layout_at(model, names, *ours), pos, None, None)
    heads = variants_of(places, names, theirs, theirs)
    n_heads = effects.shape["head"]
    order = effects.values[..., 0].flatten().argsort(descending=True).tolist()

    def run(chosen: list[int]) -> Tensor:
        def put(x: Tensor, at: HookContext) -> None:
            for each in chosen:
                if heads[each].name == at.name:
                    heads[each].apply(x)

        with torch.no_grad():
            return model.run_with_hooks(*ours, hooks=dict.fromkeys({heads[each].name for each in chosen}, put))

    chosen: list[int] = []
    flipped = False
    for each in order:
        chosen.append(each)
        if int(run(chosen)[0].argmax()) == second:
            flipped = True
            break
    size = 0 if flipped else len(chosen)
    while size != len(chosen):  # a head that was needed may not be once another is out
        size = len(chosen)
        for each in list(chosen):
            fewer = [other for other in chosen if other != each]
            if fewer and int(run(fewer)[0].argmax()) == second:
                chosen = fewer
    after = run(chosen)
    return Switch(
        tuple((each // n_heads, each % n_heads) for each in chosen),
        _name(model, predicted),
        _name(model, int(after[0].argmax())),
        float(metric(after)),
        flipped,
        effects,
    )


def _name(model: HookedModel, index: int) -> str:
    labels = getattr(model, "labels", None)
    return labels[index] if labels else str(index)
