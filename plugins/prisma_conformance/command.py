"""Entry point of the plugin: ``prisma check``, ``doctor``, ``classes`` and ``new-plugin``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prisma_core import hookimpl

if TYPE_CHECKING:
    from typer import Typer


@hookimpl
def prisma_commands(app: Typer) -> None:
    """Add ``check``, ``doctor``, ``classes`` and ``new-plugin``."""
    # Not above: every load imports entry points, and only the command needs typer.
    from prisma_conformance import cli
    from prisma_conformance.new_plugin import new_plugin

    for command in (cli.check, cli.doctor, cli.classes, new_plugin):
        app.command(rich_help_panel="Commands")(command)
