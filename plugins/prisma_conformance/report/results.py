"""Results, certificates and reports of the kit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, ValidationError

from prisma_core.plugin import (
    Facts,
    LoadError,
    PrismaError,
    checked,
    expect,
    format_fields,
    path_of,
    read_text,
    write_text,
)


class CheckFailed(PrismaError):
    """A conformance check did not pass."""


class DeviceFailed(PrismaError):
    """A device broke, and nothing can run on it any more in this process."""


class Measured(Facts):
    """Base of what the kit measures: an error may be infinite, or no number."""

    model_config = ConfigDict(allow_inf_nan=True)


class Precision(Measured):
    """Errors of the logits in one dtype on one device, both sides against float64.

    Attributes:
        error: ours: the root of the mean square, in standard deviations of the logits.
        upstream: upstream's own, over the same inputs.
        equal: whether the two sides are the same to the bit.
        skipped: the reason why there is nothing to compare with.
    """

    dtype: str
    device: str = "cpu"
    error: float | None = None
    upstream: float | None = None
    equal: bool = False
    skipped: str | None = None

    def __str__(self) -> str:
        name = f"{self.dtype} on {self.device}"
        if self.skipped or self.equal:
            return f"{name}: {self.skipped or 'bit-equal'}"
        return f"{name}: errs by {self.error:.1e}, upstream by {self.upstream:.1e}"


class CheckResult(Measured):
    """The outcome of one check on one model.

    Attributes:
        error: the largest error found, in the unit of the bound.
        bound: what it may be at most.
        detail: scope of the check, or the problems.
        skipped: the reason why the check does not apply; it then counts as neither passed nor failed.
        precisions: errors in dtypes other than float64.
    """

    name: str
    passed: bool
    error: float | None = None
    bound: float | None = None
    detail: str = ""
    skipped: str | None = None
    precisions: tuple[Precision, ...] = ()

    def __str__(self) -> str:
        state = "skipped" if self.skipped else "passed" if self.passed else "FAILED"
        numbers = f" error {self.error:.2e}" if self.error is not None else ""
        numbers += f" of at most {self.bound:.0e}" if self.error is not None and self.bound is not None else ""
        why = self.skipped or self.detail
        return f"{self.name}: {state}{numbers}" + (f": {why}" if why else "")


class Certificate(Measured):
    """Results of all checks on one model, with the versions of everything that took part.

    Attributes:
        name: the case, reference or type checked.
        upstream: qualified name of upstream's class.
        library, version: the package it comes from.
        torch, prisma, plugin, python: versions; ``plugin`` is the distribution that brings the adapter, with its
            version. Certificates from before these fields were written lack all but ``torch``.
        device, machine: where the checks ran, and a GPU's name, driver and libraries.
        sizes: of the inputs tried: heights and widths of images, lengths of texts.
        form: ``mapped``: it has no canonical form, and upstream's own module is hooked at the places of a map.
        weights: ``random``: every weight drawn. ``own``: as the model came.
        full: whether upstream was built at its real size.
        facts: a digest of the spec with its sizes left out; equal for models that differ in size alone.
    """

    name: str
    reference: str | None = None
    upstream: str
    library: str
    version: str
    torch: str
    prisma: str = ""
    plugin: str = ""
    python: str = ""
    dtype: str = "float64"
    device: str = "cpu"
    machine: str = ""
    sizes: tuple[tuple[int, ...], ...] = ()
    form: Literal["canonical", "mapped"] = "canonical"
    weights: str = "random"
    full: bool = False
    facts: str = ""
    seconds: float = 0.0
    results: tuple[CheckResult, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no check failed and at least one ran."""
        ran = [result for result in self.results if result.skipped is None]
        return bool(ran) and all(result.passed for result in ran)

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        return tuple(result for result in self.results if not result.passed and result.skipped is None)

    def __getitem__(self, check: str) -> CheckResult:
        return next(result for result in self.results if result.name == check)

    def compact(self) -> str:
        """One line of JSON: numbers and outcomes, without details and times."""

        def rounded(error: float | None) -> float | None:
            return None if error is None else float(f"{error:.1e}")

        results = tuple(
            r.model_copy(
                update={
                    "detail": "",
                    "error": rounded(r.error),
                    "precisions": tuple(
                        p.model_copy(update={"error": rounded(p.error), "upstream": rounded(p.upstream)})
                        for p in r.precisions
                    ),
                }
            )
            for r in self.results
        )
        return self.model_copy(update={"results": results, "seconds": 0.0}).model_dump_json(exclude_defaults=True)


class Report(Measured):
    """Result of ``check``: a certificate for each model checked; one, unless an adapter was given."""

    certificates: tuple[Certificate, ...]

    @property
    def passed(self) -> bool:
        return bool(self.certificates) and all(certificate.passed for certificate in self.certificates)

    @property
    def results(self) -> tuple[CheckResult, ...]:
        return tuple(result for certificate in self.certificates for result in certificate.results)

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        return tuple(result for certificate in self.certificates for result in certificate.failures)

    @property
    def certificate(self) -> Certificate:
        """The only certificate.

        Raises:
            PrismaError: there are several.
        """
        if len(self.certificates) != 1:
            raise PrismaError(f"This report holds {len(self.certificates)} certificates; use report.certificates.")
        return self.certificates[0]

    def raise_for_failures(self) -> None:
        """Raise if anything failed.

        Raises:
            CheckFailed: with every failed check.
        """
        if self.failures:
            lines = [f"{c.name}: {result}" for c in self.certificates for result in c.failures]
            raise CheckFailed("\n".join(lines))

    def __str__(self) -> str:
        lines: list[str] = []
        for certificate in self.certificates:
            lines.append(f"{certificate.name} ({certificate.upstream}, {certificate.library} {certificate.version})")
            lines += [f"  {result}" for result in certificate.results]
        return "\n".join(lines)


@checked
def write_certificates(certificates: Iterable[Certificate], path: str | Path) -> Path:
    """Write certificates, one line of JSON each, sorted by name.

    Raises:
        LoadError: the disk is full, read-only, or refuses in another way.
    """
    each = [expect(one, Certificate, "certificates, as check(...).certificates has them") for one in certificates]
    lines = [certificate.compact() for certificate in sorted(each, key=lambda c: c.name)]
    return write_text(path_of(path), "\n".join(lines) + "\n")


def read_certificates(path: str | Path) -> list[Certificate]:
    """Read certificates from a file that ``write_certificates`` wrote.

    Raises:
        LoadError: a line is not a certificate.
    """
    certificates: list[Certificate] = []
    for number, line in enumerate(read_text(path_of(path)).splitlines(), 1):
        try:
            certificates.append(Certificate.model_validate_json(line))
        except ValidationError as error:
            raise LoadError(f"{path}, line {number}, is not a certificate: {format_fields(error)}.") from error
    return certificates
