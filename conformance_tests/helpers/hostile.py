"""Makers of files that harm: halves of files, pickles that run commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class RunsCommand:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def truncate(path: Path) -> None:
    """Cut a file to its first half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
