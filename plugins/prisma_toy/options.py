"""Options for the facts that a published toy's file lacks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from prisma_core.plugin import Above, Heads
from prisma_core.plugin import Options as SourceOptions


class Options(SourceOptions):
    """Facts that a file of tensors lacks.

    Attributes:
        act: of the MLP; in the project's words ``gelu_new`` and ``gelu_fast`` are both ``gelu_tanh``.
        eps: of the norms.
        pool: what the head reads, the class ``token`` or the mean of all tokens (``avg``); None reads the class token
            where the positions count one.
        centred: norms without weights of their own stand where others have theirs (``LNPre``).
        key: which state dict of a file with several, such as ``model_state_dict``.
        heads: for files of the older names, whose shapes do not tell it.
    """

    act: Annotated[
        Literal["gelu", "gelu_tanh", "relu", "silu"], Field(description="'gelu', 'gelu_tanh', 'relu' or 'silu'")
    ] = "gelu"
    eps: Annotated[Above, Field(description="a number above 0, such as 1e-6")] = 1e-6
    pool: Annotated[Literal["token", "avg"] | None, Field(description="'token' or 'avg'")] = None
    centred: Annotated[bool, Field(strict=True, description="True or False")] = False
    heads: Heads = None
    key: Annotated[str | None, Field(description="the name of a state dict in the file")] = None
