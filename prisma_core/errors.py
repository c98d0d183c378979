"""Every error Prisma raises on purpose.

Each message says what was expected, what came, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PrismaError(Exception):
    """Base class: catching it catches every error Prisma raises on purpose."""


class UnknownName(PrismaError):
    """A hook point, source, model, plugin or label that does not exist."""


class HookError(PrismaError):
    """A hook that cannot run as asked, or returned something unusable."""


class UnsupportedArchitecture(PrismaError):
    """An upstream fact that the canonical transformer cannot represent.

    Args:
        module: qualified name of the upstream module that holds the fact.
        feature: the feature itself, in the field's words.
    """

    def __init__(self, module: str, feature: str):
        self.module = module
        self.feature = feature
        super().__init__(f"{module} is not supported: {feature}. Nothing was made, so no number is wrong.")


class WeightMapError(PrismaError):
    """Upstream and canonical tensors do not account for each other."""


class NotApplicable(PrismaError):
    """A decomposition or rewrite that does not hold for this model."""


class LoadError(PrismaError):
    """A model, file or checkpoint that cannot be read."""


class InputError(PrismaError):
    """A picture or tensor that the model cannot take."""


class PluginError(PrismaError):
    """A plugin that failed to import or breaks the contract."""


def suggest(name: str, options: Iterable[str], n: int = 3) -> str:
    """Return a sentence that names the nearest options, or an empty string.

    >>> suggest("tim", ["timm", "toy"])
    ' Did you mean timm?'
    """
    given = list(options)
    # What is being typed comes first: by likeness alone a short beginning is far from every long name.
    begun = sorted((option for option in given if name and option.startswith(name)), key=len)
    near = list(dict.fromkeys(begun + difflib.get_close_matches(name, given, n=n, cutoff=0.5)))[:n]
    return f" Did you mean {' or '.join(near)}?" if near else ""
