"""The contract with plugins: every hook a plugin may implement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import typer

    from prisma_core.contract.adapter import Adapter, Refusal
    from prisma_core.contract.case import Case
    from prisma_core.contract.source import Source

GROUP = "prisma"
hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def prisma_sources() -> Sequence[Source]:  # pyright: ignore[reportReturnType]
    """Return sources: each turns references ``name:rest`` into upstream models."""


@hookspec
def prisma_adapters() -> Sequence[Adapter | Refusal]:  # pyright: ignore[reportReturnType]
    """Return adapters, each of which maps upstream types to Prisma's form; and refusals of types, with the reason."""


@hookspec
def prisma_cases() -> Sequence[Case]:  # pyright: ignore[reportReturnType]
    """Return conformance cases: small random upstream models that cover what the adapters claim."""


@hookspec
def prisma_commands(app: typer.Typer) -> None:
    """Add commands to the ``prisma`` command."""
