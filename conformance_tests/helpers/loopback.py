"""A hub on loopback: as much of its protocol as downloads need, with a switch for what goes wrong.

``repositories/{id}`` holds files; ``HEAD`` and ``GET /{id}/resolve/{revision}/{file}`` send them, with the headers that
the hub's library reads, and ``/api/models/{id}`` lists them.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Fault = Literal["break off", "corrupt"]


class Hub:
    """What is served, what goes wrong, and what was asked for.

    Attributes:
        fault: what happens to the next weights that are sent; sending them uses it up, ``faults`` times.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.address = ""
        self.fault: Fault | None = None
        self.faults = 1
        self.asked: list[str] = []

    def repository(self, name: str) -> Path:
        """Return the folder of a repository, made if need be."""
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def take_fault(self, file: Path) -> Fault | None:
        fault = self.fault
        if fault is None or file.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
            return None
        self.faults -= 1
        if self.faults <= 0:
            self.fault, self.faults = None, 1
        return fault


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """Serve a folder of repositories for as long as the block runs."""
    hub = Hub(folder)

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class' name
        return

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.served.asked.append(f"{self.command} {path}")
        if not path:
            return self._send(200, b"a hub", body=body)
        if path.startswith("api/models/"):
            return self._listing(path.removeprefix("api/models/"), body)
        repository, _, rest = path.partition("/resolve/")
        file = self.served.folder / repository / rest.partition("/")[2]
        if not (self.served.folder / repository).is_dir():
            return self._missing("RepoNotFound", body)
        if not rest or not file.is_file():
            return self._missing("EntryNotFound", body)
        return self._file(file, body)

    def _listing(self, path: str, body: bool) -> None:
        repository = path.partition("/revision/")[0].partition("/tree/")[0]
        folder = self.served.folder / repository
        if not folder.is_dir():
            return self._missing("RepoNotFound", body)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if "/tree/" in path:
            found: Any = [
                {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": _sha(file)}
                for file in files
            ]
        else:
            found = {
                "_id": "1",
                "id": repository,
                "modelId": repository,
                "sha": COMMIT,
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": str(file.relative_to(folder))} for file in files],
            }
        return self._send(200, json.dumps(found).encode(), body=body, kind="application/json")

    def _file(self, file: Path, body: bool) -> None:
        data = file.read_bytes()
        headers = {"ETag": f'"{_sha(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if not body:
            return self._send(200, data, headers, body=False)
        start = 0
        if (wanted := self.headers.get("Range", "")).startswith("bytes="):
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        status = 206 if start else 200
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        fault = self.served.take_fault(file)
        if fault == "corrupt":
            middle = len(data) // 2
            data = data[:middle] + bytes(255 - byte for byte in data[middle : middle + 64]) + data[middle + 64 :]
        if fault == "break off":
            self._send(status, data[start:], headers, body=False)
            self.wfile.write(data[start : start + (len(data) - start) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return None
        return self._send(status, data[start:], headers, body=True)

    def _missing(self, code: str, body: bool) -> None:
        self._send(404, b"{}", {"X-Error-Code": code}, body=body)

    def _send(
        self,
        status: int,
        data: bytes,
        headers: dict[str, str] | None = None,
        *,
        body: bool,
        kind: str = "application/octet-stream",
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def _sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
