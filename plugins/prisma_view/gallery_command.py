"""The command ``prisma gallery``."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import prisma_core as prisma
from prisma_core import InputError, Result
from prisma_core.plugin import screen
from prisma_view.command import OPEN, TRAINED, WORDS, wants_browser

if TYPE_CHECKING:
    from prisma_sae import SparseCoder


def gallery(
    source: Annotated[
        str, typer.Argument(help="The folder of a harvest, a file of `prisma harvest top --out`, or a model.")
    ],
    data: Annotated[
        str | None, typer.Option(help="The images, as in `prisma harvest`.", show_default="those of the file")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="The hook point, such as mlp.hook_post:5.", show_default="the harvest's or coder's only one"),
    ] = None,
    coder: Annotated[str | None, typer.Option(help="A sparse coder: its name in the catalogue, or a file.")] = None,
    heads: Annotated[bool, typer.Option("--heads", help="Show heads, by the norm of their output (of z).")] = False,
    k: Annotated[int, typer.Option("-k", min=1, help="Images a unit.")] = 12,
    pos: Annotated[str | None, typer.Option(help="The tokens that are searched.", show_default="all")] = None,
    words: WORDS = None,
    model: Annotated[
        str | None, typer.Option(help="The model of a harvest or file.", show_default="the one it names")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("gallery"),
    batch: Annotated[int, typer.Option(help="Images at once.")] = 32,
    limit: Annotated[int | None, typer.Option(help="Search only so many images.")] = None,
    pretrained: TRAINED = True,
    show: OPEN = None,
) -> None:
    """Write a folder of pages with the top images of every neuron, head or sparse feature; it needs no server.

    `prisma gallery toy:scenes-3l --data samples:128 --name mlp.hook_post:2`
    """
    from prisma_harvest import open_harvest
    from prisma_harvest.options import read_name, read_pos, read_source
    from prisma_sae import open_coder

    from prisma_view.galleries import gallery as write

    screen.check_output(out, folder=True)
    query: Any = None if name is None else read_name(name)
    places: Any = read_pos(pos)
    top, harvest = None, None
    if source.endswith(".safetensors"):
        if limit is not None or pos is not None or name is not None:
            raise InputError(f"{source} is of a search that is done: --name, --pos and --limit are for a new one.")
        top = Result.load(source)
        query, places = top.facts.get("name"), top.facts.get("positions")
        reference = model or top.facts.get("model", {}).get("reference")
        data = data or top.facts.get("data", {}).get("given")
        if top.axes[0] == "direction" or query is None:
            raise InputError(
                f"{source} holds no units of a hook point: prisma_view.gallery takes directions in Python."
            )
        heads = top.axes[0] == "head"
    elif Path(source).is_dir():
        if limit is not None or pos is not None:
            raise InputError(
                f"{source} is a harvest, whose images and tokens are fixed: --pos and --limit do not apply."
            )
        harvest = open_harvest(source)
        reference, places = model or harvest.manifest.model.reference, harvest.manifest.pos
    else:
        if model is not None:
            raise InputError(f"{source} is no harvest and no file, so it is the model itself: leave out --model.")
        reference = source
    if reference is None:
        raise InputError(f"{source} does not say which model it is of: give --model REFERENCE.")
    if data is None:
        raise InputError("The images are not kept: give them with --data, in the same order.")
    loaded = prisma.load(reference, **({} if pretrained else {"pretrained": False}))
    point = None if top is None else loaded.hook_points().get(query)
    if point is not None and "pos" not in point.axes.split():
        places = None  # its tokens are those of its place, whatever was asked for
    images, sparse = read_source(data, reference), None if coder is None else open_coder(coder)
    if harvest is not None:
        top, query = _search(harvest, loaded, query, sparse, heads, k)
    options: dict[str, Any] = {"limit": limit} if limit is not None else {}
    written = write(
        loaded, images, query, out=out, coder=sparse, over="head" if heads else "feature", k=k, pos=places, top=top,
        words=[each.strip() for each in (words or "").split(",") if each.strip()], batch=batch, **options,
    )  # fmt: skip
    for part, reason in written.why.items():
        screen.note("Without", f"{part}: {reason}", "dim")
    screen.note("gallery", f"{written.units} units, {written.bytes / 1e6:.1f} MB.", "green")
    screen.out().print(str(written.path), soft_wrap=True)
    if wants_browser(show):
        webbrowser.open(written.path.resolve().as_uri())


def _search(harvest: Any, model: Any, query: Any, coder: SparseCoder | None, heads: bool, k: int) -> tuple[Result, str]:
    """Return the top examples of a harvest, and the full name of the hook point.

    Raises:
        InputError: the model is another one, or the harvest has several hook points and none was named.
    """
    from prisma_harvest import top_examples

    from prisma_view.gallery_units import Units

    harvest.check_model(model)
    if query is None and coder is None:
        if len(harvest.names) != 1:
            raise InputError(f"Name one of its hook points with --name: {', '.join(harvest.names)}.")
        query = harvest.names[0]
    units = Units.of(model, query, coder, "head" if heads else "feature", None, harvest.manifest.pos)
    return top_examples(harvest, units.name, k, **units.search()), units.name
