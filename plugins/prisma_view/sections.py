"""An overview of any model on an image: a page of figures that fit what the model is.

Every section is asked for; one that does not apply is named at the end with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from plotly.offline import get_plotlyjs
from prisma_lens import attribute, logit_lens
from torch import Tensor

from prisma_core import HookedDual, HookedModel, InputError, NotApplicable, Result
from prisma_core.plugin import layer_of
from prisma_view.figures import Figure, figure_json, plot
from prisma_view.images import as_image, data_uri
from prisma_view.viewer import prepare

STAGES = 3
BEST = 5


@dataclass(frozen=True)
class Section:
    """A heading, a sentence, and figures or images (as data URIs, with what they show in words)."""

    title: str
    words: str
    figures: tuple[Figure, ...] = ()
    images: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Overview:
    """Sections of a page, and why others are left out.

    Attributes:
        sections: in the order of the page.
        why: the reason, by the title of each section that is left out.
    """

    title: str
    image: str
    sections: tuple[Section, ...]
    why: dict[str, str]
    trained: bool = True

    def save(self, path: str | Path) -> Path:
        """Write the page: one file that needs no network."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("prisma_view"), autoescape=True, undefined=jinja2.StrictUndefined
        )
        figures = [figure for section in self.sections for figure in section.figures]
        text = environment.get_template("overview.html.j2").render(
            page=self, plotly=get_plotlyjs(), figures=[figure_json(figure) for figure in figures]
        )
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path


def overview(
    model: HookedModel, image: Any, words: Sequence[str] = (), *, title: str = "", trained: bool = True
) -> Overview:
    """Return an overview of a model on an image.

    Classifiers: their best guesses, where patches read them, and what each layer adds. Dual encoders: the same against
    ``words``. All with tokens, the self-supervised too: the first three principal components of the patches by layer.
    Hooked upstreams: the size of their feature maps by stage.

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
    if isinstance(model, HookedDual) != bool(words):
        expected = (
            "words to tell apart, such as words=['a cat', 'a dog']" if not words else "no words: it reads no texts"
        )
        raise InputError(f"{type(model).__name__} takes {expected}.")
    x, seen = prepare(model.vision if isinstance(model, HookedDual) else model, image)
    parts: dict[str, Callable[[], Section]] = {
        "Best guesses": lambda: _guesses(model, x, words),
        "What patches say": lambda: _lens(model, x, words, seen),
        "What each layer adds": lambda: _layers(model, x, words),
        "Patches by their principal components": lambda: _components(model, x),
        "Feature maps": lambda: _features(model, x),
    }
    sections, why = [], {}
    for name, part in parts.items():
        try:
            sections.append(part())
        except (NotApplicable, InputError) as error:
            why[name] = str(error)
    if not sections:
        raise NotApplicable(f"Nothing of an overview applies to this model. {' '.join(why.values())}")
    first = seen if not isinstance(seen, Tensor) else as_image(seen[0, 0] if seen.ndim == 5 else seen)
    name = title or getattr(model, "reference", None) or type(model).__name__
    return Overview(name, data_uri(first), tuple(sections), why, trained)


def _target(model: Any, x: Tensor, words: Sequence[str]) -> tuple[Any, list[str]]:
    """Return the classes or texts that are looked at, best first, with their names."""
    if isinstance(model, HookedDual):
        order = model.classify(x, list(words), template="{}")[0].argsort(descending=True)[:BEST].tolist()
        return [words[i] for i in order], [words[i] for i in order]
    if getattr(model.spec, "n_classes", None) is None:
        raise NotApplicable("This model has no classification head, so it names no classes.")
    with torch.no_grad():
        best = model(x)[0].topk(min(BEST, model.spec.n_classes)).indices.tolist()
    return best, [model.labels[i] if model.labels else f"class {i}" for i in best]


def _guesses(model: Any, x: Tensor, words: Sequence[str]) -> Section:
    target, names = _target(model, x, words)
    if isinstance(model, HookedDual):
        chances = model.classify(x, target, template="{}")[0].detach()
    else:
        with torch.no_grad():
            chances = model(x)[0].softmax(-1)[target]
    result = Result(chances.float(), ("class",), {"class": tuple(names)}, technique="chances", unit="probability")
    among = "of these words" if words else "of all classes"
    return Section("Best guesses", f"{names[0]}, {float(chances[0]):.0%} {among}.", (plot(result, kind="bars"),))


def _lens(model: Any, x: Tensor, words: Sequence[str], seen: Any) -> Section:
    target, names = _target(model, x, words)
    lens = logit_lens(model, x, target).sel(layer=-1, batch=0)
    figure = plot(lens, kind="patches", image=None if isinstance(seen, Tensor) and seen.ndim == 5 else seen)
    return Section("What patches say", f"Each patch read after the last layer, for {', '.join(names)}.", (figure,))


def _layers(model: Any, x: Tensor, words: Sequence[str]) -> Section:
    target, names = _target(model, x, words)
    result = attribute(model, x, target[:1])
    return Section("What each layer adds", f"Direct attribution of “{names[0]}”.", (plot(result, kind="bars"),))


def _components(model: Any, x: Tensor) -> Section:
    tower = model.vision if isinstance(model, HookedDual) else model
    layout = tower.layout_for(x)
    names = [name for name in tower.hook_points() if name.endswith("hook_resid_post")]
    names = [name for name in names if tower.hook_points()[name].axes == "batch pos d_model"]
    if layout is None or not names:
        raise NotApplicable("This model has no stream of patches with a layout.")
    chosen = sorted({names[round(i * (len(names) - 1) / (STAGES - 1))] for i in range(STAGES)}, key=names.index)
    with torch.no_grad():
        _, cache = tower.run_with_cache(x, names=chosen, output=False)
    images = []
    for name in chosen:
        grid = layout.grid(cache[name][0].float().cpu(), axis=0)
        colours, share = principal_colours(grid)
        rows = torch.cat(list(colours), 1) if colours.ndim == 4 else colours  # frames side by side
        big = as_image(rows.movedim(-1, 0)).resize((rows.shape[1] * 16, rows.shape[0] * 16), 0)
        images.append((data_uri(big), f"after layer {layer_of(name)}: {share:.0%} of the variance"))
    words = (
        "Patches of one colour are alike to the model: red, green and blue are the first three principal components."
    )
    return Section("Patches by their principal components", words, images=tuple(images))


def principal_colours(grid: Tensor) -> tuple[Tensor, float]:
    """Return the first three principal components of patches ``[... d]``, in 0..1, and their share of the variance.

    Signs are fixed: the largest entry of each component's direction is positive.
    """
    x = grid.flatten(0, -2)
    x = x - x.mean(0)
    _, sizes, directions = torch.linalg.svd(x, full_matrices=False)
    n = min(3, len(sizes))
    largest = directions[:n].abs().argmax(-1, keepdim=True)
    axes = directions[:n] * directions[:n].gather(1, largest).sign()
    parts = x @ axes.T
    low, high = parts.amin(0), parts.amax(0)
    scaled = (parts - low) / (high - low).clamp_min(1e-12)
    scaled = torch.nn.functional.pad(scaled, (0, 3 - n))
    share = float((sizes[:n] ** 2).sum() / (sizes**2).sum().clamp_min(1e-30))
    return scaled.reshape(*grid.shape[:-1], 3), share


def _features(model: Any, x: Tensor) -> Section:
    points = model.hook_points()
    names = [name for name in points if {"row", "column"} <= set(points[name].axes.split())]
    names = [name for name in names if name.endswith("hook_resid_post")] or names
    if not names:
        raise NotApplicable("This model has no activations with rows and columns.")
    chosen = sorted({names[round(i * (len(names) - 1) / 5)] for i in range(6)}, key=names.index)
    with torch.no_grad():
        _, cache = model.run_with_cache(x, names=chosen, output=False)
    figures = []
    for name in chosen:
        axes = points[name].axes.split()
        rest = [at for at, axis in enumerate(axes) if axis not in ("row", "column")]
        sizes = torch.linalg.vector_norm(cache[name].float(), dim=rest)
        order = ("row", "column") if axes.index("row") < axes.index("column") else ("column", "row")
        figures.append(plot(Result(sizes, order, technique=name, unit="norm over channels")))
    return Section("Feature maps", "The size of activations at each place, stage by stage.", tuple(figures))
