"""Locations of a reference's files: a folder, or the hub and its cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prisma_core.plugin import LoadError, check_merged, hub, read_json

CONFIG, ADAPTER = "config.json", "adapter_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
INSTEAD = "A folder needs no network: hf:FOLDER. Nor does a class with random weights: hf:ViTModel, pretrained=False."


@dataclass(frozen=True)
class Place:
    """Location of a model.

    Attributes:
        name: a folder, or the name of a repository on the hub.
        revision: of the repository: a branch, tag or commit.
    """

    name: str
    local: bool
    revision: str | None = None

    def __str__(self) -> str:
        return f"hf:{self.name}" + (f"@{self.revision}" if self.revision else "")

    def folder(self, *, weights: bool) -> Path:
        """Return a folder with the model's files, downloaded if need be.

        Args:
            weights: whether they are wanted, or the configuration alone.

        Raises:
            UnknownName: the hub has no such repository.
            LoadError: the hub cannot be reached, what came is broken, or it holds LoRA weights alone.
        """
        if self.local:
            return Path(self.name)
        config = hub.fetch(self.name, [CONFIG, ADAPTER], revision=self.revision, reference=str(self), instead=INSTEAD)
        if config.name == ADAPTER:
            check_merged(config.parent)
        file = hub.cached(self.name, WEIGHTS, revision=self.revision)
        if not weights or (file is not None and _whole(file)):
            return config.parent
        main = hub.fetch(self.name, WEIGHTS, revision=self.revision, reference=str(self), instead=INSTEAD)
        patterns = ["*.json", "*.py"]  # code is not run unless the user says so
        if main.suffix == ".json":  # an index: the weights are in several files
            patterns.append("model-*.safetensors" if "safetensors" in main.name else "pytorch_model-*.bin")
        return hub.snapshot(self.name, patterns, revision=self.revision, reference=str(self), instead=INSTEAD)

    def cached_config(self) -> Path | None:
        """Return the folder of a configuration that needs no download, or None."""
        if self.local:
            return Path(self.name)
        file = hub.cached(self.name, [CONFIG], revision=self.revision)
        return None if file is None else file.parent

    def forget_broken(self, folder: Path) -> bool:
        """Remove from the hub's cache what is not as the hub sent it; return whether something was."""
        removed = [] if self.local else [path for path in folder.iterdir() if hub.forget(path)]
        return bool(removed)


def _whole(main: Path) -> bool:
    """Return whether weights are all there: the file itself, or every file that it lists."""
    if main.suffix != ".json":
        return True
    try:
        names = set(read_json(main)["weight_map"].values())
    except (LoadError, KeyError, AttributeError, TypeError):
        return False
    return all((main.parent / name).is_file() for name in names)


def place(rest: str) -> Place:
    """Return where a reference points: ``ORGANISATION/NAME``, ``ORGANISATION/NAME@REVISION``, or a folder.

    Raises:
        LoadError: it looks like a folder, and there is none with a configuration.
    """
    path = Path(rest).expanduser()
    if (path / CONFIG).is_file():
        return Place(str(path), local=True)
    if path.is_dir() or path.is_absolute() or rest.startswith((".", "~")):
        what = f"holds no {CONFIG}" if path.is_dir() else "is not there"
        raise LoadError(f"The folder {path} {what}: expected one that save_pretrained wrote.")
    name, _, revision = rest.partition("@")
    return Place(name, local=False, revision=revision or None)
