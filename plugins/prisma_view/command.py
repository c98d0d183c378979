"""The command ``prisma demo``."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path
from typing import Annotated, Any

import typer

import prisma_core as prisma
from prisma_core import HookedViT, InputError
from prisma_core.plugin import VideoPreprocess, installed, open_image, screen
from prisma_view import lazy

DEFAULT = "toy:scenes-3l"
PARTS = {
    "lens": "lens.png",
    "layers": "attribution.png",
    "heads": "the heads in attribution.png",
    "patching": "patching.png",
}

TRAINED = Annotated[
    bool, typer.Option("--pretrained/--no-pretrained", help="Load trained weights, or random ones (no download).")
]
OPEN = Annotated[
    bool | None,
    typer.Option("--open/--no-open", help="Open the result in a browser.", show_default="where there is a screen"),
]
WORDS = Annotated[str | None, typer.Option(help="Texts for a dual encoder, such as 'a cat, a dog'.")]


def demo(
    image: Annotated[
        Path | None,
        typer.Option(help="An image of any format and size.", show_default="one the model was made for"),
    ] = None,
    other: Annotated[
        Path | None,
        typer.Option(help="A second image, whose heads are put into the first.", show_default="another sample"),
    ] = None,
    words: WORDS = None,
    model: Annotated[str, typer.Option(help="What to look into; `prisma models` lists what there is.")] = DEFAULT,
    out: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("prisma-demo"),
    pretrained: TRAINED = True,
    show: OPEN = None,
) -> None:
    """Look inside a model: one page with its emoji logit lens, attention, attribution and patching.

    Models that are no classifiers of images get the page of `prisma report`.

    Without options it shows the small model that comes with Prisma, on an image drawn for it; nothing is downloaded.
    """
    screen.check_output(out, folder=True)
    there = out / "index.html"
    if there.is_file() and "· Prisma</title>" not in there.read_text(encoding="utf-8", errors="replace"):
        raise InputError(f"{there} is no page of Prisma's, and would be replaced: give another folder with --out.")
    for path in (image, other):  # what is not there is told before anything is loaded or written
        if path is not None and not path.is_file():
            open_image(path)
    with screen.working(f"Loading {model}"):
        loaded = prisma.load(model, **({} if pretrained else {"pretrained": False}))
    if not pretrained:
        screen.note("Random weights", f"{model} was not trained, so nothing it says was learned.", "yellow")
    if not _names_classes_of_images(loaded):
        if other is not None:
            raise InputError(f"{model} is no classifier of images, and --other is for their heads. Leave it out.")
        page = overview(loaded, model, image, words, out / "index.html", trained=pretrained)
        if wants_browser(show):
            webbrowser.open(page.resolve().as_uri())
        return
    if words is not None:
        raise InputError(f"{model} has classes of its own: --words is for dual encoders.")
    shown: HookedViT = loaded
    first, second = _images(shown, model, image, other)
    for given in (first, second):
        open_image(given, channels=shown.spec.n_channels)
    out.mkdir(parents=True, exist_ok=True)
    with screen.working("Looking"):
        found = lazy.report(shown, first, second, progress=sys.stderr.isatty())
    with screen.working("Drawing"):
        page = lazy.write_page(found, out / "index.html", trained=pretrained, command=_command())
        images = lazy.write_images(found, out, trained=pretrained)
    for part, reason in found.why.items():
        if part == "heads" and "layers" in found.why:  # the whole figure is missing, which was said
            continue
        screen.note("Without", f"{PARTS[part]}: {reason}", "dim")
    best = found.symbol(found.best)
    screen.console().print(
        f"{best.emoji} {model} sees: {best.name} ({lazy.percent(float(found.logits.softmax(-1)[found.best]))})",
        f"page      {page}",
        f"images    {', '.join(str(path) for path in images)}",
        sep="\n",
        soft_wrap=True,
    )
    if wants_browser(show):
        webbrowser.open(page.resolve().as_uri())


def _names_classes_of_images(model: Any) -> bool:
    """Return whether a model has what the page of a classifier shows: a logit for each class of an image."""
    if not isinstance(model, HookedViT) or model.spec.n_frames is not None:
        return False
    return model.spec.n_classes is not None and model.spec.pool.kind not in ("none", "patches")


def overview(model: Any, reference: str, image: Path | None, words: str | None, out: Path, *, trained: bool) -> Path:
    """Write the overview of any model, say what it lacks, and return its path.

    Args:
        words: texts for a dual encoder, with commas between them.

    Raises:
        InputError: an unreadable image, or no words for a dual encoder.
        LoadError: a path that cannot be written.
    """
    texts = [each.strip() for each in (words or "").split(",") if each.strip()]
    with screen.working("Looking"):
        page = lazy.overview(model, given_or_sample(model, reference, image), texts, title=reference, trained=trained)
    page.save(out)
    for name, reason in page.why.items():
        screen.note("Without", f"{name.lower()}: {reason}", "dim")
    screen.console().print(f"page  {out}", soft_wrap=True)
    return out


def given_or_sample(model: Any, reference: str, image: Path | None) -> Any:
    """Return the image or video that was asked for, or a sample: an image, or the frames of a video.

    Raises:
        InputError: no source has a sample for the model.
    """
    if image is not None:
        return image
    drawn = sample(reference, 0)
    if isinstance(getattr(model, "preprocess", None), VideoPreprocess) != isinstance(drawn, list):
        kind = "images" if isinstance(drawn, list) else "videos"
        raise InputError(f"{reference} takes {kind}: give one with --image FILE.")
    return drawn


def _images(model: HookedViT, reference: str, image: Path | None, other: Path | None) -> tuple[Any, Any]:
    """Return the two images: the user's, or samples, the second one of another class than the first."""
    first: Any = image if image is not None else sample(reference, 0)
    if other is not None:
        return first, other
    best = _guess(model, first)
    for seed in range(1, 9):
        second = sample(reference, seed)
        if _guess(model, second) != best:
            break
    return first, second


def _guess(model: HookedViT, image: Any) -> int:
    if not model.preprocess:
        raise InputError("This model does not know how to read images: set model.preprocess.")
    return int(model(model.preprocess(image)).argmax())


def sample(reference: str, seed: int) -> Any:
    """Return a sample of the model's own source, or of the first source that has one."""
    sources = installed().sources()
    name, _, rest = reference.partition(":")
    own = [sources[name]] if name in sources else []
    for source in (*own, *sources.values()):
        sample = source.sample(rest if source in own else "", seed)
        if sample is not None:
            return sample
    raise InputError("No installed plugin offers a sample image: give two, with --image FILE and --other FILE.")


def _command() -> str:
    return " ".join(["prisma", *sys.argv[1:]]) if sys.argv and Path(sys.argv[0]).stem == "prisma" else "prisma demo"


def wants_browser(show: bool | None) -> bool:
    """Return whether to open a page: as asked, else where there is a screen and somebody before it."""
    if show is not None:
        return show
    headless = sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return sys.stdout.isatty() and not headless and not os.environ.get("CI")
