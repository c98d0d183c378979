"""References of techniques, models and data: ``prisma cite``.

cited = cite("textspan", "open_clip:ViT-B-32@laion2b_s34b_b79k")
print(cited["textspan"].text())
print(bibtex(cited))

A plugin joins in with a file ``references.bib`` in its package: its techniques name authors and year in the part
``Source:`` of their file's docstring, and the field ``keywords`` of an entry has patterns of models and classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prisma_cite.citing import Citation, bibtex, cite
from prisma_core import hookimpl

if TYPE_CHECKING:
    from typer import Typer


@hookimpl
def prisma_commands(app: Typer) -> None:
    from prisma_cite.command import cite as command

    app.command("cite")(command)


__all__ = ["cite", "Citation", "bibtex"]
