"""The command with two plugins of its own."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
from cli_runs import Hungry, Ran, Run, Tiny, entry, prisma_commands

from prisma_core import HookedViT
from prisma_core import host as plugins
from prisma_core.cli.app import main
from prisma_core.host import Host


@pytest.fixture
def run(vit: HookedViT, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    found = [
        EntryPoint("conformance", "prisma_conformance.command", "prisma"),
        entry(monkeypatch, "tiny", prisma_sources=lambda: [Tiny(vit), Hungry()]),
        entry(monkeypatch, "greeter", prisma_commands=prisma_commands),
    ]

    def run(*arguments: str, more: tuple[EntryPoint, ...] = ()) -> Ran:
        host = Host([*found, *more])
        monkeypatch.setattr(plugins, "_host", host)
        monkeypatch.setattr("prisma_core.cli.app.installed", lambda: host)
        status = main(arguments)
        return Ran(status, *capsys.readouterr())

    return run
