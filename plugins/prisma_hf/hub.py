"""Where a reference's files are: in a folder, in the hub's cache, or on the hub, after one knock on its door.

The hub's library tries an unreachable host again and again; one short probe spares that. Nothing that other code in
this process relies on (environment, timeouts, offline mode) is changed.
"""

from __future__ import annotations

import os
import socket
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prisma_core.errors import LoadError

SECONDS = 5.0
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Place:
    """Where a model is.

    Attributes:
        name: a folder, or the name of a repository on the hub.
        revision: of the repository: a branch, tag or commit.
    """

    name: str
    folder: bool
    revision: str | None = None

    def __str__(self) -> str:
        return f"hf:{self.name}" + (f"@{self.revision}" if self.revision else "")

    def arguments(self, *, weights: bool) -> dict[str, Any]:
        """Return what transformers' loaders need to know, once it is clear that the files can be had.

        Args:
            weights: whether they are wanted, or the configuration alone.

        Raises:
            LoadError: nothing answers where the files are.
        """
        if self.folder:
            return {"local_files_only": True}
        named = {"revision": self.revision} if self.revision else {}
        if self.cached(CONFIG) and (not weights or any(map(self.cached, WEIGHTS))):
            return {"local_files_only": True, **named}
        self._probe()
        return named

    def cached(self, file: str) -> bool:
        """Return whether a file lies in the hub's cache."""
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(self.name, file, revision=self.revision), str)

    def _probe(self) -> None:
        from huggingface_hub import constants

        instead = "It is not in the cache. A folder that save_pretrained wrote needs no network: hf:./FOLDER."
        if constants.HF_HUB_OFFLINE:
            raise LoadError(f"{self} is on the hub, and HF_HUB_OFFLINE is set. {instead}")
        if problem := _knock(constants.ENDPOINT):
            raise LoadError(f"{self} is at {constants.ENDPOINT}: no answer there ({problem}). {instead}")


def place(rest: str) -> Place:
    """Return where a reference points: ``ORGANISATION/NAME``, ``ORGANISATION/NAME@REVISION``, or a folder.

    Raises:
        LoadError: it looks like a folder, and there is none with a configuration.
    """
    path = Path(rest).expanduser()
    if (path / CONFIG).is_file():
        return Place(str(path), folder=True)
    if path.is_dir() or path.is_absolute() or rest.startswith((".", "~")):
        what = f"holds no {CONFIG}" if path.is_dir() else "is not there"
        raise LoadError(f"The folder {path} {what}: expected one that save_pretrained wrote.")
    name, _, revision = rest.partition("@")
    return Place(name, folder=False, revision=revision or None)


def _knock(address: str) -> str | None:
    """Return why nothing answers at an address, or None if something does."""
    answer: list[str | None] = []
    # Looking up a name has no timeout of its own, so a thread waits for it.
    thread = threading.Thread(target=lambda: answer.append(_ask(address)), daemon=True)
    thread.start()
    thread.join(SECONDS + 1)
    return answer[0] if answer else f"no answer in {SECONDS:.0f} seconds"


def _ask(address: str) -> str | None:
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS).close()
    except urllib.error.HTTPError:
        return None  # an answer
    except urllib.error.URLError as error:
        # Other reasons, such as a certificate only the hub library knows, are left for it to judge.
        return str(error.reason) if isinstance(error.reason, ConnectionError | TimeoutError | socket.gaierror) else None
    except (ConnectionError, TimeoutError) as error:
        return str(error) or type(error).__name__
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    return None
