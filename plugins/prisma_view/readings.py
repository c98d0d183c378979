"""Sections of models that name something: best guesses, where patches read them, what each layer adds."""

from __future__ import annotations

from prisma_lens import attribute, logit_lens

from prisma_core import NotApplicable, Result
from prisma_view.figures import plot
from prisma_view.panels import Section, Subject
from prisma_view.words import percent

BEST = 5


def guesses(subject: Subject) -> Section:
    """Show the best classes, or the words that fit best, with their probabilities."""
    _, names = _target(subject)
    output = subject.output[0].float()
    chances = (output if subject.words else output.softmax(-1)).topk(len(names)).values
    result = Result(chances, ("class",), {"class": tuple(names)}, technique="best guesses", unit="probability")
    among = "of these words" if subject.words else "of its classes"
    said = f"Best {among}: “{names[0]}”, with a probability of {percent(float(chances[0]))}."
    return Section("Best guesses", said, (plot(result, kind="bars"),))


def lens(subject: Subject) -> Section:
    """Show each patch of the last layer as the head reads it, for the best guesses."""
    target, names = _target(subject)
    read = logit_lens(subject.model, subject.x, target).sel(layer=-1, batch=0)
    words = f"Each patch after the last layer, read as if it were all that the head sees, for {', '.join(names)}."
    figure = subject.patches(read.values.T, "logit lens", read.unit, ("class", tuple(names)))
    return Section("What patches say", words, (figure,))


def layers(subject: Subject) -> Section:
    """Show what each layer adds to the logit of the best guess."""
    target, names = _target(subject)
    result = attribute(subject.model, subject.x, target[:1])
    words = f"What attention and MLP of each layer write towards “{names[0]}”; with what is constant they sum to it."
    return Section("What each layer adds", words, (plot(result, kind="bars"),))


def _target(subject: Subject) -> tuple[list[int] | list[str], list[str]]:
    """Return the classes or texts that are looked at, best first, with their names.

    Raises:
        NotApplicable: the model names no classes.
    """
    model = subject.model
    if not subject.words and getattr(model.spec, "n_classes", None) is None:
        raise NotApplicable("This model has no classification head, so it names no classes.")
    output = subject.output
    if output.ndim != 2:
        raise NotApplicable(f"This model's output is {list(output.shape[1:])} numbers, not one for each class.")
    best = output[0].topk(min(BEST, output.shape[-1])).indices.tolist()
    if subject.words:
        chosen = [subject.words[at] for at in best]
        return chosen, chosen
    return best, [model.labels[at].partition(",")[0] if model.labels else f"class {at}" for at in best]
