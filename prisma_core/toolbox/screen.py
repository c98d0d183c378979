"""Output of commands: answers on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported by the functions that write: loading a model needs neither
    from rich.console import Console
    from rich.table import Table


def out() -> Console:
    """The console for answers; outside a terminal it is wide enough to cut nothing."""
    from rich.console import Console

    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=240)


def note(kind: str, message: str, style: str = "red") -> None:
    """Write one line on stderr.

    >>> note("Error", "No model matches.")
    """
    from rich.console import Console
    from rich.text import Text

    line = Text.assemble((f"{kind}: ", f"bold {style}"), " ".join(message.split()))
    Console(stderr=True, highlight=False).print(line, soft_wrap=True)


def show(rows: Table) -> None:
    """Write a table on stdout: fitted to a terminal, else with lines as long as they have to be."""
    from rich.console import Console

    if sys.stdout.isatty():
        out().print(rows)
        return
    console = Console(highlight=False, width=10_000)
    with console.capture() as captured:
        console.print(rows)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table that does not wrap its first column."""
    from rich.table import Table

    rows = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        rows.add_column(column, no_wrap=index == 0, overflow="fold")
    return rows


def show_json(value: Any) -> None:
    """Write JSON, and nothing else, on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
