"""Where commands write: answers on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def out() -> Console:
    """Return the console for answers; wide enough to cut nothing where nobody looks at a screen."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=240)


def note(kind: str, message: str, style: str = "red") -> None:
    """Write one line on stderr."""
    line = Text.assemble((f"{kind}: ", f"bold {style}"), " ".join(message.split()))
    Console(stderr=True, highlight=False).print(line, soft_wrap=True)


def show(shown: Table) -> None:
    """Write a table on stdout: fitted to a screen, or each line as long as it has to be where nobody looks at one."""
    if sys.stdout.isatty():
        out().print(shown)
        return
    console = Console(highlight=False, width=10_000)
    with console.capture() as captured:
        console.print(shown)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def table(*columns: str, title: str | None = None) -> Table:
    """Return an empty table that keeps its first column whole."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        made.add_column(column, no_wrap=index == 0, overflow="fold")
    return made


def show_json(value: Any) -> None:
    """Write JSON, and nothing else, on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
