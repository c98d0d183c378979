"""Entry point of the plugin: ``prisma check``, ``prisma doctor`` and ``prisma classes``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prisma_core import hookimpl

if TYPE_CHECKING:
    from typer import Typer


@hookimpl
def prisma_commands(app: Typer) -> None:
    """Add ``check``, ``doctor`` and ``classes``."""
    from prisma_conformance import cli  # not above: every load imports entry points, and only the command needs typer

    for command in (cli.check, cli.doctor, cli.classes):
        app.command(rich_help_panel="Commands")(command)
