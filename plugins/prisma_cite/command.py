"""The command ``prisma cite``."""

from __future__ import annotations

from typing import Annotated

import typer

from prisma_core.plugin import screen


def cite(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Techniques (attribute), models (timm:vit_base_patch16_224), data sets (dsprites).",
            show_default="prisma",
        ),
    ] = None,
    as_bibtex: Annotated[bool, typer.Option("--bibtex", help="Write BibTeX.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Show what to cite for a technique, a model, a data set, or for Prisma itself."""
    from prisma_cite.citing import bibtex
    from prisma_cite.citing import cite as references

    cited = references(*(names or ["prisma"]))
    for each in cited.values():
        if not each.entries:
            screen.note("Note", f"no reference of {each.name!r} is known. {each.source}".strip(), "yellow")
    if as_json:
        screen.show_json({each.name: dict(zip(each.entries, each.text(), strict=True)) for each in cited.values()})
    elif as_bibtex:
        screen.out().print(bibtex(cited), soft_wrap=True, end="")
    else:
        for each in cited.values():
            screen.out().print(f"{each.name}:", style="bold")
            for line in each.text():
                screen.out().print(f"  {line}", soft_wrap=True)
