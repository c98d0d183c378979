"""A progress bar on stderr, for what takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def bar(items: Iterable[T], description: str, progress: bool | None) -> Iterable[T]:
    """Go through items and show how far it is.

    Args:
        items: what is gone through.
        description: stands before the bar.
        progress: show it; None shows it on a terminal.
    """
    shown = sys.stderr.isatty() if progress is None else progress
    return track(items, description, transient=True, disable=not shown, console=Console(stderr=True))
