"""The public names of the package, each imported when it is first used: ``lazy.report`` is ``findings.report``.

Every ``prisma`` command imports the package, and what draws needs libraries that take long or may be missing.
"""

from __future__ import annotations

import importlib
from typing import Any

from prisma_core import PluginError

_HOMES = {
    "plot": "figures",
    "patches": "figures",
    "attention": "figures",
    "Figure": "figures",
    "attention_page": "viewer",
    "AttentionPage": "viewer",
    "overview": "sections",
    "Overview": "sections",
    "gallery": "galleries",
    "Gallery": "galleries",
    "report": "findings",
    "Report": "findings",
    "write_page": "page",
    "write_images": "report_images",
    "symbol": "symbols",
    "percent": "words",
}


def __getattr__(name: str) -> Any:
    """Import a public name.

    Raises:
        PluginError: a library for drawing is missing.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__package__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__package__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        raise PluginError(
            f'Pages need {error.name}, which is not installed: pip install "prisma-interp[view]"'
        ) from error
