"""The proof that a mapped model computes what its upstream computes, and that its hooks are live.

from prisma_core.conformance import check

report = check("timm:vit_tiny_patch16_224")
report.passed, report.failures
"""

from prisma_core.conformance.case import Case, Pictures
from prisma_core.conformance.doctor import Diagnosis, diagnose
from prisma_core.conformance.randomise import randomise
from prisma_core.conformance.registry import CHECKS, Check, select
from prisma_core.conformance.results import (
    Certificate,
    CheckFailed,
    CheckResult,
    Report,
    read_certificates,
    write_certificates,
)
from prisma_core.conformance.run import check

__all__ = [
    "check",
    "diagnose",
    "Case",
    "Pictures",
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
