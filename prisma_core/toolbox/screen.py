"""Output of commands: answers on stdout, everything else on stderr."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prisma_core.errors import InputError, printable
from prisma_core.files.atomic import check_writable

if TYPE_CHECKING:  # imported by the functions that write: loading a model needs neither
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


def console(**options: Any) -> Console:
    """A console that writes texts as they are: names, labels and paths in them are no markup, and steer no terminal.

    What has a style is a ``rich.text.Text``, or is printed with ``style=``. Options are rich's, as ``stderr=True``.
    """
    from rich.console import Console

    class Literal(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            return super().render_str(printable(text), **how)

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would end the process

    return Literal(highlight=False, markup=False, emoji=False, **options)


_lock, _asides = threading.Lock(), list[redirect_stdout[Any]]()


@contextmanager
def aside() -> Generator[None]:
    """Send what other code prints in a block to stderr: stdout is for answers. Blocks of several threads overlap."""
    with _lock:
        _asides.append(redirect_stdout(sys.stdout if _asides else sys.stderr))
        _asides[-1].__enter__()
    try:
        yield
    finally:
        with _lock:
            _asides.pop().__exit__(None, None, None)


def out() -> Console:
    """The console for answers; outside a terminal it is wide enough to cut nothing."""
    return console() if sys.stdout.isatty() else console(width=240)


@contextmanager
def working(what: str) -> Generator[None]:
    """Say on a terminal what is going on, as long as the block runs.

    >>> with working("Loading toy:scenes-3l"):
    ...     pass
    """
    from rich.text import Text

    with console(stderr=True).status(Text(what)):
        yield


def check_output(path: Path | None, ending: str = "", *, folder: bool = False) -> None:
    """Check where a command will write, before it works: what it found would be lost where nothing can be written.

    Args:
        path: of the file or folder; None for none.
        ending: of the file's name, such as ``.html``; '' for any.
        folder: whether it is a folder.

    Raises:
        InputError: the name ends in another way.
        LoadError: the disk refuses, or there is a folder in the place of a file, or the other way round.
    """
    if path is None:
        return
    if path.suffix != ending and ending:
        raise InputError(f"Expected a file that ends in {ending}, got {str(path)!r}.")
    check_writable(path, folder=folder)


def note(kind: str, message: str, style: str = "red") -> None:
    """Write one line on stderr.

    >>> note("Error", "No model matches.")
    """
    from rich.text import Text

    line = Text.assemble((f"{printable(kind)}: ", f"bold {style}"), printable(" ".join(message.split())))
    console(stderr=True).print(line, soft_wrap=True)


def show(rows: Table) -> None:
    """Write a table on stdout: fitted to a terminal, else with lines as long as they have to be."""
    if sys.stdout.isatty():
        out().print(rows)
        return
    wide = console(width=10_000)
    with wide.capture() as captured:
        wide.print(rows)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def table(*columns: str, title: str | Text | None = None) -> Table:
    """An empty table that does not wrap its first column."""
    from rich.table import Table

    rows = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        rows.add_column(column, no_wrap=index == 0, overflow="fold")
    return rows


def show_json(value: Any) -> None:
    """Write JSON, and nothing else, on stdout; of numbers, NaN and the infinite ones are null, for JSON has none."""
    sys.stdout.write(json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in cast("dict[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in cast("list[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value
