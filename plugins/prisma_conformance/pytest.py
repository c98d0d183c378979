"""The kit as a pytest suite, in three lines.

In ``conftest.py``::

    pytest_plugins = ["prisma_conformance.pytest"]

and in a test file::

    from prisma_conformance.pytest import suite
    test_conformance = suite("my_plugin")

Each case and check is a test of its own, such as ``test_conformance[vit_tiny-parity.logits]``; ``-k`` selects them. The
end of the run says how many of how many cases were checked, and ``--certificates FOLDER`` writes what was proven.
``--conformance-device cuda`` runs it all on a GPU, whose certificates are files of their own; ``--conformance-dtype
bfloat16`` says what logits are compared in besides float64.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from prisma_conformance.devices import dtypes, usable
from prisma_conformance.doctor.diagnosis import examine
from prisma_conformance.registry import Check, select
from prisma_conformance.report.results import Certificate, CheckResult, DeviceFailed, write_certificates
from prisma_conformance.run import certify, run_check, subjects
from prisma_conformance.subject import Subject
from prisma_core.errors import InputError
from prisma_core.plugin.case import Case
from prisma_core.plugin.host import host

PROPERTY = "prisma_certificate"
COUNTS = "prisma_counts"  # a test's property: JSON of a title and of numbers by what they count; the end adds them up
_DOCTOR_VISITS = 3  # a mistake in a part that all share would otherwise be explained once for each architecture


def suite(
    plugin: str,
    *,
    checks: str | Iterable[str] | None = None,
    cases: Sequence[Case] | None = None,
    once: str | Iterable[str] = (),
) -> Callable[..., None]:
    """Return a test over every conformance case of a plugin and every check.

    Args:
        plugin: the name under which its cases are counted; the entry point's, unless ``cases`` are given.
        checks: names or globs; None for all that do not have to be asked for.
        cases: to use instead of those that the plugin's ``prisma_cases`` returns.
        once: names or globs of checks that run on one architecture for each distinct combination of facts. On others
            they are skipped, and counted so; ``--certificates`` runs them on all.

    Raises:
        UnknownName: no such check.
    """
    selected = select(checks)
    rare = {one.name for one in select(once)} if once else set[str]()
    found = list(cases) if cases is not None else [case for case, _ in host().cases({plugin})]
    parameters = [pytest.param(case, one, id=f"{case.name}-{one.name}") for case in found for one in selected] or [
        pytest.param(None, None, id=plugin)
    ]

    @pytest.mark.parametrize(("case", "one"), parameters)
    def test_conformance(
        case: Case | None,
        one: Check | None,
        record_property: Callable[[str, object], None],
        request: pytest.FixtureRequest,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> None:
        if case is None or one is None:
            _explain_absence(plugin)
            return
        spare = one.name in rare and not request.config.getoption("--certificates")
        folder = _shared(tmp_path_factory) if spare else None
        place = cast("str | None", request.config.getoption("--conformance-device")), _dtypes(request.config)
        _check(plugin, len(found), _subject(case, *place), one, record_property, folder)

    return test_conformance


def _explain_absence(plugin: str) -> None:
    for info in host().plugins():
        if info.name == plugin and info.missing:
            pytest.skip(f"the plugin {plugin!r} needs a library: {info.missing}")
    pytest.fail(f"The plugin {plugin!r} has no conformance cases: implement its hook prisma_cases.", pytrace=False)


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all workers of this run share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def _taken(folder: Path, name: str) -> bool:
    """Return whether another test of this run has taken this name; if not, it is ours."""
    try:
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return True
    return False


def _check(
    plugin: str,
    of: int,
    subject: Subject,
    one: Check,
    record_property: Callable[[str, object], None],
    folder: Path | None = None,
) -> None:
    with _one_thread():
        if folder is not None and _taken(folder, f"{plugin}-{one.name}-{subject.facts()}"):
            result = CheckResult(name=one.name, passed=False, skipped="checked on another one with the same facts")
        else:
            result = _run(one, subject)
        certificate = certify(subject, [result.model_copy(update={"detail": ""})])
        record_property(PROPERTY, json.dumps([plugin, of, certificate.model_dump(mode="json", exclude_defaults=True)]))
        if result.skipped is not None:
            pytest.skip(result.skipped)
        if not result.passed:
            pytest.fail(f"{subject.case.name}: {result}{_explained(subject, one)}", pytrace=False)


@lru_cache(maxsize=2)  # tests of one case follow each other, so each upstream is built once
def _subject(case: Case, device: str | None = None, dtypes: tuple[torch.dtype, ...] = ()) -> Subject:
    return next(subjects(case, device=device, dtypes=dtypes))[0]


_failed: list[DeviceFailed] = []  # of this process


def _run(one: Check, subject: Subject) -> CheckResult:
    try:
        if _failed:
            raise _failed[0]
        return run_check(one, subject)
    except DeviceFailed as error:
        _failed[:] = [error]
        pytest.fail(f"not checked: {error}", pytrace=False)


_visits: Counter[str] = Counter()


def _explained(subject: Subject, one: Check) -> str:
    if not one.name.startswith("parity.") or (subject.case.name not in _visits and len(_visits) >= _DOCTOR_VISITS):
        return ""
    _visits[subject.case.name] += 1
    return f"\n{examine(subject)}" if _visits[subject.case.name] == 1 else ""


@contextmanager
def _one_thread() -> Generator[None]:
    # The models are tiny: threads only wait for each other, all the more beside other workers.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -------------------------------------------------------------------- what pytest calls


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("prisma")
    group.addoption("--certificates", metavar="FOLDER", help="write what was proven into FOLDER")
    group.addoption("--conformance-device", metavar="DEVICE", help="run conformance there; cuda for a GPU")
    group.addoption(
        "--conformance-dtype",
        metavar="DTYPE",
        action="append",
        help="compare logits in float32, bfloat16 or float16; may be repeated",
    )


def pytest_configure(config: pytest.Config) -> None:
    try:
        usable(cast("str | None", config.getoption("--conformance-device")))
        _dtypes(config)
    except InputError as error:
        raise pytest.UsageError(str(error)) from error


def _dtypes(config: pytest.Config) -> tuple[torch.dtype, ...]:
    return dtypes(cast("list[str] | None", config.getoption("--conformance-dtype")))


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    found = _collected(terminalreporter)
    for plugin, (of, certificates) in sorted(found.items()):
        terminalreporter.section(f"conformance: {plugin}")
        for line in summary(plugin, of, certificates):
            terminalreporter.write_line(line)
        if folder := cast("str | None", config.getoption("--certificates")):
            path = write_certificates(certificates, Path(folder) / file_name(plugin, certificates))
            terminalreporter.write_line(f"certificates: {path}")
    if found and not torch.cuda.is_available():
        told = "nothing ran on a GPU: no CUDA device is here (with one: pytest --conformance-device cuda)"
        terminalreporter.write_line(told)
    for title, counts in sorted(_counted(terminalreporter).items()):
        terminalreporter.section(title)
        for what, count in counts.items():
            terminalreporter.write_line(f"{count} {what}")


def _counted(terminalreporter: Any) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == COUNTS and report.when == "call":
                    title, counts = json.loads(value)
                    found[title].update(counts)
    return found


def _collected(terminalreporter: Any) -> dict[str, tuple[int, list[Certificate]]]:
    merged: dict[str, dict[str, Certificate]] = defaultdict(dict)
    totals: dict[str, int] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name != PROPERTY or report.when != "call":
                    continue
                plugin, of, dumped = json.loads(value)
                certificate = Certificate.model_validate(dumped)
                totals[plugin] = max(of, totals.get(plugin, 0))  # several suites may share a name
                before = merged[plugin].get(certificate.name)
                results = (before.results if before else ()) + certificate.results
                ordered = tuple(sorted(results, key=lambda result: result.name))
                merged[plugin][certificate.name] = certificate.model_copy(update={"results": ordered})
    return {plugin: (totals[plugin], list(certificates.values())) for plugin, certificates in merged.items()}


def file_name(plugin: str, certificates: Sequence[Certificate]) -> str:
    """Return where certificates go: those of a GPU beside those of the CPU, not over them."""
    kinds = {torch.device(certificate.device).type for certificate in certificates} - {"cpu"}
    return "-".join([*sorted(kinds), f"{plugin}.jsonl"])


def summary(plugin: str, of: int, certificates: Sequence[Certificate]) -> list[str]:
    """Return lines that say how many of how many were checked, by check."""
    by_check: dict[str, list[CheckResult]] = defaultdict(list)
    for certificate in certificates:
        for result in certificate.results:
            by_check[result.name].append(result)
    passed = sum(certificate.passed for certificate in certificates)
    combinations = len({certificate.facts for certificate in certificates})
    lines = [f"{passed} of {of} {plugin} architectures passed, with {combinations} distinct combinations of facts"]
    for name, results in sorted(by_check.items()):
        ran = [result for result in results if result.skipped is None]
        # Bounds may differ between architectures (see tolerances): the worst is the one nearest to its own.
        shares = [(r.error / r.bound, r.error, r.bound) for r in ran if r.error is not None and r.bound]
        line = f"  {name}: {sum(result.passed for result in ran)} of {len(ran)}"
        if shares:
            _, error, bound = max(shares)
            line += f", worst error {error:.1e} of at most {bound:.0e}"
        for reason, count in Counter(result.skipped for result in results if result.skipped is not None).items():
            line += f"; {count} skipped: {reason}"
        lines.append(line)
    return lines
