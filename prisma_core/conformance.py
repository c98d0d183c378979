"""The old import path of the conformance kit, which is ``prisma_conformance`` now; gone with the next release."""

import importlib
import sys
import warnings

warnings.warn(
    "prisma_core.conformance is prisma_conformance now: import from there. The old path goes with the next release.",
    DeprecationWarning,
    stacklevel=2,
)
_kit = importlib.import_module("prisma_conformance")
# Modules of the kit that third-party test suites import by name.
for _old, _new in {
    "case": "prisma_core.contract.case",
    "pytest": "prisma_conformance.pytest",
    "randomise": "prisma_conformance.randomise",
    "registry": "prisma_conformance.registry",
    "run": "prisma_conformance.run",
    "subject": "prisma_conformance.subject",
}.items():
    sys.modules[f"{__name__}.{_old}"] = importlib.import_module(_new)


def __getattr__(name: str) -> object:
    return getattr(_kit, name)
