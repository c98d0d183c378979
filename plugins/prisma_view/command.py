"""The command ``prisma demo``."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import prisma_core as prisma
from prisma_core import HookedDual, HookedViT, InputError
from prisma_core.plugin import installed, open_picture
from prisma_view import lazy

DEFAULT = "toy:scenes-3l"
PARTS = {
    "lens": "lens.png",
    "layers": "attribution.png",
    "heads": "the heads in attribution.png",
    "patching": "patching.png",
}


def demo(
    image: Annotated[
        Path | None,
        typer.Option(help="A picture of any format and size.", show_default="one the model was made for"),
    ] = None,
    other: Annotated[
        Path | None,
        typer.Option(help="A second picture, whose heads are put into the first.", show_default="another sample"),
    ] = None,
    model: Annotated[str, typer.Option(help="What to look into; `prisma models` lists what there is.")] = DEFAULT,
    out: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("prisma-demo"),
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--no-pretrained", help="Load trained weights, or random ones (no download).")
    ] = True,
    show: Annotated[
        bool | None,
        typer.Option("--open/--no-open", help="Open the page in a browser.", show_default="where there is a screen"),
    ] = None,
) -> None:
    """Look inside a vision transformer: one page with its emoji logit lens, attention, attribution and patching.

    Without options it shows the small model that comes with Prisma, on a picture drawn for it; nothing is downloaded.
    """
    console = Console(stderr=True, highlight=False)
    for path in (image, other):  # what cannot be read is told before anything is loaded or written
        if path is not None:
            open_picture(path)
    with console.status(f"Loading {model}"):
        loaded = prisma.load(model, **({} if pretrained else {"pretrained": False}))
    shown = _with_pages(loaded, model)
    first, second = _pictures(shown, model, image, other)
    _made(out)
    with console.status("Looking"):
        found = lazy.report(shown, first, second, progress=console.is_terminal)
    with console.status("Drawing"):
        page = lazy.write_page(found, out / "index.html", trained=pretrained, command=_command())
        pictures = lazy.write_pictures(found, out, trained=pretrained)
    if not pretrained:
        console.print(f"[bold yellow]Random weights:[/] {model} was not trained, so nothing it says was learned.")
    for part, reason in found.why.items():
        if part == "heads" and "layers" in found.why:  # the whole picture is missing, which was said
            continue
        console.print(f"Without {PARTS[part]}: {reason}", soft_wrap=True, markup=False)
    best = found.symbol(found.best)
    Console(highlight=False).print(
        f"{best.emoji} {model} sees: {best.name} ({lazy.percent(float(found.logits.softmax(-1)[found.best]))})",
        f"page      {page}",
        f"pictures  {', '.join(str(path) for path in pictures)}",
        sep="\n",
        soft_wrap=True,
        markup=False,
    )
    if wants_browser(show):
        webbrowser.open(page.resolve().as_uri())


def _with_pages(loaded: object, reference: str) -> HookedViT:
    """Return the model if there are pages of its kind.

    Raises:
        InputError: there are none; it says what there is instead.
    """
    if isinstance(loaded, HookedDual):
        raise InputError(
            f"{reference} is a pair of towers, which names no classes by itself, and the page is about a classifier. "
            f"`prisma report {reference} --words 'a cat, a dog'` tells words apart; `prisma attention` shows a tower. "
            f"Its vision tower is model.vision: prisma_view.report(model.vision, first, second) takes its output's "
            f"coordinates for classes, and `prisma registers {reference} PICTURE` looks at its tokens."
        )
    if not isinstance(loaded, HookedViT):
        raise InputError(
            f"{reference} is no vision transformer in canonical form, and the page needs one. Its activations can be "
            "read and edited all the same: docs/how-to-other-architectures.md. "
            f"`prisma report {reference}` draws what there is."
        )
    if loaded.spec.n_frames is not None:
        raise InputError(
            f"{reference} takes videos, and the page shows pictures, not videos: `prisma report` and "
            "`prisma attention` take a video with --image FILE."
        )
    return loaded


def _pictures(model: HookedViT, reference: str, image: Path | None, other: Path | None) -> tuple[Any, Any]:
    """Return the two pictures: the user's, or samples, the second one of another class than the first."""
    first: Any = image if image is not None else sample(reference, 0)
    if other is not None:
        return first, other
    best = _guess(model, first)
    for seed in range(1, 9):
        second = sample(reference, seed)
        if _guess(model, second) != best:
            break
    return first, second


def _guess(model: HookedViT, picture: Any) -> int:
    if not model.preprocess:
        raise InputError("This model does not know how to read pictures: set model.preprocess.")
    return int(model(model.preprocess(picture)).argmax())


def sample(reference: str, seed: int) -> Any:
    """Return a sample of the model's own source, or of the first source that has one."""
    sources = installed().sources()
    name, _, rest = reference.partition(":")
    own = [sources[name]] if name in sources else []
    for source in (*own, *sources.values()):
        sample = source.sample(rest if source in own else "", seed)
        if sample is not None:
            return sample
    raise InputError("No installed plugin offers a sample picture: give two, with --image FILE and --other FILE.")


def _made(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot write into {folder}: {error.strerror}. Give another folder with --out.") from error


def _command() -> str:
    return " ".join(["prisma", *sys.argv[1:]]) if sys.argv and Path(sys.argv[0]).stem == "prisma" else "prisma demo"


def wants_browser(show: bool | None) -> bool:
    """Return whether to open a page: as asked, else where there is a screen and somebody before it."""
    if show is not None:
        return show
    headless = sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return sys.stdout.isatty() and not headless and not os.environ.get("CI")
