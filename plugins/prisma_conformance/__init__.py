"""The proof that a mapped model computes what its upstream computes, and that its hooks are live.

from prisma_conformance import check

report = check("timm:vit_tiny_patch16_224")
report.passed, report.failures
"""

from prisma_conformance.doctor.diagnosis import Diagnosis, diagnose
from prisma_conformance.randomise import randomise
from prisma_conformance.registry import CHECKS, Check, select
from prisma_conformance.report.results import (
    Certificate,
    CheckFailed,
    CheckResult,
    Report,
    read_certificates,
    write_certificates,
)
from prisma_conformance.run import check
from prisma_core.plugin.case import Case, Pictures

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
