"""An overview of any model on an image: a page of figures that fit what the model is.

Every section is asked for; one that does not apply is named at the end with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs
from prisma_lens.inputs import vision_of
from torch import Tensor

from prisma_core import HookedDual, HookedModel, HookedText, InputError, NotApplicable
from prisma_core.plugin import checked
from prisma_view import insides, readings, reconstruction
from prisma_view.drawing import FIT
from prisma_view.figures import figure_json
from prisma_view.images import data_uri
from prisma_view.pages import framed, rendered, saved
from prisma_view.panels import Section, Subject, enlarged
from prisma_view.viewer import prepare
from prisma_view.words import facts

GUESSES = "Best guesses"
PARTS: dict[str, Callable[[Subject], Section]] = {
    GUESSES: readings.guesses,
    "What patches say": readings.lens,
    "What each layer adds": readings.layers,
    "Reconstruction by layer": reconstruction.by_layer,
    "Reconstruction along training": reconstruction.by_checkpoint,
    "Patches by their principal components": insides.components,
    "Where heads look": insides.attention,
    "Feature maps": insides.features,
}


@dataclass(frozen=True, repr=False)
class Overview:
    """Sections of a page, and why others are left out.

    Attributes:
        sections: in the order of the page.
        why: the reason, by the title of each section that is left out.
        facts: of the model, for the last lines of the page.
        wide: images are rows of frames.
    """

    title: str
    image: str
    sections: tuple[Section, ...]
    why: dict[str, str]
    trained: bool = True
    facts: tuple[tuple[str, str], ...] = ()
    wide: bool = False

    @property
    def lead(self) -> str:
        """The sentence below the title."""
        first = self.sections[0]
        if first.title == GUESSES:
            return first.words
        titles = [section.title[0].lower() + section.title[1:] for section in self.sections]
        return f"This model names no classes. Shown here: {', '.join(titles)}."

    @checked
    def save(self, path: str | Path) -> Path:
        """Write the page: one file that needs no network."""
        return saved(path, self.html)

    @property
    def html(self) -> str:
        """The page as text."""
        figures = [figure for section in self.sections for figure in section.figures]
        return rendered(
            "overview.html.j2",
            page=self,
            plotly=get_plotlyjs(),
            fit=FIT,
            figures=[figure_json(each) for each in figures],
        )

    def _repr_html_(self) -> str:
        return framed(self.html, self.title, 52)

    def __repr__(self) -> str:
        return f"Overview({self.title!r}: {', '.join(section.title for section in self.sections)})"


@checked
def overview(
    model: HookedModel, image: Any, words: Sequence[str] = (), *, title: str = "", trained: bool = True
) -> Overview:
    """Return an overview of a model on an image.

    Classifiers: their best guesses, where patches read them, and what each layer adds. Dual encoders: the same against
    ``words``. Masked autoencoders: what hidden patches are filled in with by layer, and by checkpoint where the model's
    source has some. All with patches or feature maps: their first three principal components by layer, where heads
    look, and the size of feature maps.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> overview(model, torch.zeros(1, 3, 96, 96)).sections[0].title
    'Best guesses'

    Args:
        model: any hooked model that sees images.
        image: what ``model.preprocess`` takes, or its result.
        words: texts for a dual encoder to tell apart.
        title: by default the model's reference.
        trained: False states on the page that the weights are random.

    Raises:
        InputError: an unreadable image, words for a model that reads none, or a dual encoder without words.
        NotApplicable: nothing of this applies to the model.
    """
    if isinstance(model, HookedText):
        raise InputError("This model reads texts: `prisma attention --text`, or prisma_view.attention_page(text=...).")
    if isinstance(model, HookedDual) != bool(words):
        expected = (
            "words to tell apart, such as words=['a cat', 'a dog'] (--words 'a cat, a dog')"
            if not words
            else "no words: it reads no texts, and names classes of its own if it has some"
        )
        raise InputError(f"{type(model).__name__} takes {expected}.")
    x, seen = prepare(vision_of(model), image)
    subject = Subject(model, x, seen, tuple(words))
    sections, why = [], {}
    for name, part in PARTS.items():
        try:
            sections.append(part(subject))
        except (NotApplicable, InputError) as error:
            why[name] = str(error)
    if not sections:
        raise NotApplicable(f"Nothing of an overview applies to this model. {' '.join(why.values())}")
    name = title or getattr(model, "reference", None) or type(getattr(model, "upstream", model)).__name__
    wide = subject.layout is not None and subject.layout.frames > 1
    return Overview(name, data_uri(_shown(seen)), tuple(sections), why, trained, tuple(facts(model)), wide)


def _shown(seen: Any) -> Any:
    """Return what the model sees as an image, frames of a video side by side."""
    if not isinstance(seen, Tensor):
        return seen
    return enlarged(seen[0].movedim(-3, -1).cpu())
