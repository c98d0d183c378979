"""Proof that a mapped model computes the same numbers as its upstream, and that its hook points are live.

from prisma_conformance import check

report = check("timm:vit_tiny_patch16_224")
report.passed, report.failures
"""

import importlib
from typing import TYPE_CHECKING, Any

from prisma_conformance.randomise import randomise
from prisma_core.plugin import Case, Images

if TYPE_CHECKING:
    from prisma_conformance.doctor.diagnosis import Diagnosis, diagnose
    from prisma_conformance.finding import Check
    from prisma_conformance.registry import CHECKS, select
    from prisma_conformance.report.results import (
        Certificate,
        CheckFailed,
        CheckResult,
        Report,
        read_certificates,
        write_certificates,
    )
    from prisma_conformance.run import check

# The kit has fifteen more modules. They are imported when a name is used, because every `prisma.load` imports this
# package: it holds the entry point that brings the commands.
_MODULES = {
    "check": "run",
    "diagnose": "doctor.diagnosis",
    "Diagnosis": "doctor.diagnosis",
    "CHECKS": "registry",
    "select": "registry",
    "Check": "finding",
    "Report": "report.results",
    "Certificate": "report.results",
    "CheckResult": "report.results",
    "CheckFailed": "report.results",
    "read_certificates": "report.results",
    "write_certificates": "report.results",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


__all__ = [
    "check",
    "diagnose",
    "Case",
    "Images",
    "Report",
    "Certificate",
    "CheckResult",
    "CheckFailed",
    "Diagnosis",
    "CHECKS",
    "Check",
    "select",
    "randomise",
    "read_certificates",
    "write_certificates",
]
