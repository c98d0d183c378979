"""A bar with rate and time left, for passes over data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.1f} images/s")


@contextmanager
def counting(what: str, total: int | None, done: int, shown: bool | None) -> Iterator[Callable[[int], None]]:
    """Yield a function that counts images on, and show a bar on stderr meanwhile.

    Args:
        what: the words before the bar.
        total: how many images there are, if that is known.
        done: how many were done before.
        shown: None shows the bar on a terminal.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    disabled = not (sys.stderr.isatty() if shown is None else shown)
    with Progress(*columns, console=Console(stderr=True), disable=disabled, transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda n: bar.advance(task, n)
