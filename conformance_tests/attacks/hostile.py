"""Makers of files that harm: halves of files, pickles that run commands, configurations that bring code along."""

from __future__ import annotations

import json
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


def with_own_code(folder: Path, mark: Path, file: str = "config.json", **settings: Any) -> Path:
    """Write a configuration of transformers, with ``own.py`` beside it, which leaves a mark when it is imported."""
    folder.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(settings), encoding="utf-8")
    code = f"""
        import pathlib, transformers
        pathlib.Path({str(mark)!r}).touch()
        class Config(transformers.PretrainedConfig):
            model_type = "its_own"
        class Model(transformers.PreTrainedModel):
            config_class = Config
        class Words(transformers.PreTrainedTokenizerFast):
            pass
        class Images(transformers.BaseImageProcessor):
            pass
    """
    (folder / "own.py").write_text("\n".join(line[8:] for line in code.splitlines()), encoding="utf-8")
    return folder
