"""Pages and pictures: one self-contained HTML page, and the same panels as PNG.

found = report(model, "cat.jpg", "dog.jpg")
write_page(found, Path("cat.html"))
write_pictures(found, Path("."))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from prisma_core import PluginError, hookimpl

if TYPE_CHECKING:
    import typer

    from prisma_view.findings import Report, report
    from prisma_view.page import write_page
    from prisma_view.pictures import write_pictures
    from prisma_view.symbols import symbol
    from prisma_view.words import percent

__all__ = ["report", "write_page", "write_pictures", "Report", "symbol", "percent", "prisma_commands"]

_HOMES = {
    "report": "findings",
    "Report": "findings",
    "write_page": "page",
    "write_pictures": "pictures",
    "symbol": "symbols",
    "percent": "words",
}


def __getattr__(name: str) -> Any:
    """Import what draws only when it is used: every ``prisma`` command imports this package.

    Raises:
        PluginError: a library for drawing is missing.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        raise PluginError(
            f'Pages need {error.name}, which is not installed: pip install "prisma-interp[view]"'
        ) from error


@hookimpl
def prisma_commands(app: typer.Typer) -> None:
    from prisma_view.command import demo

    app.command()(demo)
