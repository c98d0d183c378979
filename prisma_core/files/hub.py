"""Download files from the Hugging Face Hub: cache first, one probe of the connection, SHA-256 verification.

The hub's library retries an unreachable host many times, and does not verify the bytes of a download. One short probe
saves the first, a checksum adds the second. The environment, timeouts and offline mode of the process stay as they are.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from prisma_core.errors import LoadError, UnknownName
from prisma_core.files.atomic import file_digest

SECONDS = 5.0
INSTEAD = "A local file needs no network."
Result = TypeVar("Result")


def fetch(
    repository: str, names: Sequence[str], *, revision: str | None = None, reference: str, instead: str = INSTEAD
) -> Path:
    """Return the first of these files that a repository has, downloaded if need be, with the hub library's own bar.

    Args:
        repository: its id on the hub.
        names: of files, the one to prefer first.
        revision: a branch, tag or commit.
        reference: what the user asked for, for messages.
        instead: what else one may do, for messages.

    Raises:
        UnknownName: no such repository or revision, or it has none of these files.
        LoadError: the hub cannot be reached, or what came is broken; then the next try downloads it again.
    """
    from huggingface_hub import errors, hf_hub_download  # pyright: ignore[reportUnknownVariableType]

    if (path := cached(repository, names, revision=revision)) is not None:
        return path
    reach(reference, instead=instead)
    for name in names:
        try:
            download = partial(hf_hub_download, repository, name, revision=revision)
            return _checked(Path(asking(reference, download)))
        except errors.EntryNotFoundError:
            continue
    raise UnknownName(f"{reference}: the repository {repository} on the hub has none of {', '.join(names)}.")


def cached(repository: str, names: Sequence[str], *, revision: str | None = None) -> Path | None:
    """Return the first of these files in the hub's cache, or None."""
    from huggingface_hub import errors, try_to_load_from_cache

    for name in names:
        try:
            path = try_to_load_from_cache(repository, name, revision=revision)
        except errors.HFValidationError:  # not a repository's name: asking the hub raises the error
            return None
        if isinstance(path, str):
            return Path(path)
    return None


def snapshot(
    repository: str,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    reference: str,
    needs: Sequence[str] = (),
    instead: str = INSTEAD,
) -> Path:
    """Return a folder with a repository's top-level files of these patterns, downloaded if need be.

    Args:
        repository, revision, reference, instead: as in ``fetch``.
        patterns: globs of files.
        needs: files that make a snapshot in the cache complete, any one of them; without them it is asked for anew.

    Raises:
        UnknownName: no such repository or revision.
        LoadError: as in ``fetch``.
    """
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]

    if needs and (cached_file := cached(repository, needs, revision=revision)) is not None:
        return cached_file.parent
    reach(reference, instead=instead)
    how: dict[str, Any] = {"revision": revision, "allow_patterns": list(patterns), "ignore_patterns": ["*/*"]}
    folder = Path(asking(reference, partial(snapshot_download, repository, **how)))
    for path in sorted(folder.iterdir()):
        _checked(path)
    return folder


def asking(reference: str, download: Callable[[], Result]) -> Result:
    """Run a download of the hub's library, and turn its errors into ours, of one line.

    Raises:
        UnknownName: no such repository or revision.
        LoadError: anything else, but for a single file that is not there.
    """
    from huggingface_hub import errors

    of_http = cast("type[Exception]", getattr(errors, "HTTPError", OSError))  # by the library's version
    try:
        return download()
    except errors.GatedRepoError as error:
        raise LoadError(
            f"{reference} is for those who accepted its terms: do so on its page on the hub, then run `hf auth login`."
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise UnknownName(
            f"{reference}: the hub has no such repository or revision. Check the spelling; `hf auth login` if private."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise LoadError(f"{reference} is not in the cache, and the hub does not send it: {_sentence(error)}") from error
    except errors.EntryNotFoundError:
        raise
    except (OSError, RuntimeError, of_http) as error:
        raise LoadError(
            f"The download of {reference} broke off: {_sentence(error)} Try again: it goes on from there."
        ) from error


def forget(path: Path) -> bool:
    """Remove a file from the hub's cache if it is not what the hub sent; return whether it was removed."""
    blob = path.resolve()
    named = re.fullmatch(r"[0-9a-f]{64}", blob.name) is not None and blob.is_file()  # after its checksum
    if not named or file_digest(blob) == blob.name:
        return False
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)
    return True


def _checked(path: Path) -> Path:
    if forget(path):
        raise LoadError(f"{path.name} came corrupted: its checksum is not the hub's. It was removed; try again.")
    return path


def reach(reference: str, *, address: str | None = None, instead: str = INSTEAD) -> None:
    """Probe a server once, before the hub's library retries.

    Args:
        reference, instead: as in ``fetch``.
        address: of the server; default the hub.

    Raises:
        LoadError: offline mode is on, or nothing answers within seconds.
    """
    if address is None:
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise LoadError(f"{reference} is on the hub, not in the cache, and HF_HUB_OFFLINE is set. {instead}")
        address = constants.ENDPOINT
    if problem := _probe(address):
        raise LoadError(f"{reference} is at {address}, and not in the cache: no answer there ({problem}). {instead}")


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if text.endswith(".") else f"{text}."


def _probe(address: str) -> str | None:
    """Return the reason why no server answers at an address; None if one does."""
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
