"""The commands ``prisma attention`` and ``prisma report``."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

import prisma_core as prisma
from prisma_core import InputError
from prisma_core.plugin import screen
from prisma_view import lazy
from prisma_view.command import OPEN, TRAINED, WORDS, given_or_sample, overview, wants_browser

IMAGE = Annotated[Path | None, typer.Option(help="An image, or a video for models of videos.", show_default="a sample")]


def attention(
    reference: Annotated[str, typer.Argument(help="The model; `prisma models` lists what there is.")],
    image: IMAGE = None,
    text: Annotated[str | None, typer.Option(help="A text, for the text tower of a dual encoder.")] = None,
    layers: Annotated[str | None, typer.Option(help="Some layers only, such as 0,5,11.", show_default="all")] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("attention.html"),
    pretrained: TRAINED = True,
    show: OPEN = None,
) -> None:
    """Write a page with the attention of every layer, head and token on an image, a video or a text."""
    if image is not None and text is not None:
        raise InputError("Expected --image or --text, not both: a page shows one tower.")
    screen.check_output(out, ".html")
    wanted = None if layers is None else _numbers(layers)
    with screen.working(f"Loading {reference}"):
        model = prisma.load(reference, **({} if pretrained else {"pretrained": False}))
    with screen.working("Looking"):
        given = None if text is not None else given_or_sample(model, reference, image)
        page = lazy.attention_page(
            model, given, text=text, layers=wanted, title=reference, trained=pretrained
        )  # fmt: skip
    path = page.save(out)
    screen.console().print(
        f"page  {path}  ({len(page.html) / 1e6:.1f} MB; shares within {page.pattern_error:.1g} of the model's)",
        soft_wrap=True,
    )  # fmt: skip
    if wants_browser(show):
        webbrowser.open(path.resolve().as_uri())


def report(
    reference: Annotated[str, typer.Argument(help="The model; `prisma models` lists what there is.")],
    image: IMAGE = None,
    words: WORDS = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    pretrained: TRAINED = True,
    show: OPEN = None,
) -> None:
    """Write an overview of any model on an image or video: what it names, fills in, attends to and tells apart."""
    screen.check_output(out, ".html")
    with screen.working(f"Loading {reference}"):
        model = prisma.load(reference, **({} if pretrained else {"pretrained": False}))
    page = overview(model, reference, image, words, out, trained=pretrained)
    if wants_browser(show):
        webbrowser.open(page.resolve().as_uri())


def _numbers(layers: str) -> list[int]:
    try:
        return [int(each) for each in layers.split(",")]
    except ValueError as error:
        raise InputError(f"Expected layers such as 0,5,11, got {layers!r}.") from error
