"""Images of a folder in other forms: their paths, a torch data set, tar shards."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset


def images(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.png"))


class Map(Dataset[Any]):
    def __init__(self, folder: Path):
        self.paths = images(folder)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, torch.Tensor]:
        return Image.open(self.paths[index]), torch.tensor(index % 7)


def tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
