"""The kit as a pytest suite, in three lines.

In the ``conftest.py`` of the root folder, where alone pytest takes plugins from::

    pytest_plugins = ["prisma_conformance.pytest"]

and in a test file::

    from prisma_conformance.pytest import suite
    test_conformance = suite("my_plugin")

Each case and check is a test of its own, such as ``test_conformance[vit_tiny-parity.logits]``; ``-k`` selects them. The
end of the run says how many of how many cases were checked, and ``--certificates FOLDER`` writes certificates.
``--conformance-device cuda`` runs it all on a GPU, whose certificates are files of their own; ``--conformance-dtype
bfloat16`` compares logits in bfloat16 besides float64.
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

from prisma_conformance.devices import dtypes
from prisma_conformance.doctor.diagnosis import examine
from prisma_conformance.finding import Check
from prisma_conformance.registry import select
from prisma_conformance.report.results import Certificate, CheckResult, DeviceFailed, write_certificates
from prisma_conformance.run import certify, run_check
from prisma_conformance.subject import Subject
from prisma_core.plugin import Case, InputError, device_of, installed

PROPERTY = "prisma_certificate"
COUNTS = "prisma_counts"  # a test's property: JSON of a title and of counts by their names; the summary adds them up
_MAX_DIAGNOSES = 3  # a mistake in a part that all share would otherwise be diagnosed once for each architecture


def suite(
    plugin: str,
    *,
    checks: str | Iterable[str] | None = None,
    cases: Sequence[Case] | None = None,
    once: str | Iterable[str] = (),
) -> Callable[..., None]:
    """Make a test over every conformance case of a plugin and every check.

    >>> test_conformance = suite("my_plugin")

    Args:
        plugin: the name under which its cases are counted; the entry point's, unless ``cases`` are given.
        checks: names or globs; None for all but those that run on request only.
        cases: to use instead of those that the plugin's ``prisma_cases`` returns.
        once: names or globs of checks that run on one architecture for each distinct combination of facts. On others
            they are skipped, and counted so; ``--certificates`` runs them on all.

    Raises:
        UnknownName: no such check.
    """
    selected = select(checks)
    rare = {one.name for one in select(once)} if once else set[str]()
    all_cases = list(cases) if cases is not None else [case for case, _ in installed().cases({plugin})]
    parameters = [pytest.param(case, one, id=f"{case.name}-{one.name}") for case in all_cases for one in selected] or [
        pytest.param(None, None, id=plugin)
    ]

    @pytest.mark.parametrize(("case", "one"), parameters)
    def test_conformance(
        case: Case | None,
        one: Check | None,
        request: pytest.FixtureRequest,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> None:
        if case is None or one is None:
            _explain_absence(plugin)
            return
        once_only = one.name in rare and not request.config.getoption("--certificates")
        folder = _shared(tmp_path_factory) if once_only else None
        place = cast("str | None", request.config.getoption("--conformance-device")), _dtypes(request.config)
        _check(plugin, len(all_cases), _subject(case, *place), one, request.node.user_properties, folder)

    return test_conformance


def _explain_absence(plugin: str) -> None:
    for info in installed().plugins():
        if info.name == plugin and info.missing:
            pytest.skip(f"the plugin {plugin!r} needs a library: {info.missing}")
    pytest.fail(f"The plugin {plugin!r} has no conformance cases: implement its hook prisma_cases.", pytrace=False)


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that all workers of this run share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def _taken(folder: Path, name: str) -> bool:
    """Take a name for this test; return whether another test of this run took it before."""
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
    properties: list[tuple[str, object]],
    folder: Path | None = None,
) -> None:
    with _one_thread():
        if folder is not None and _taken(folder, f"{plugin}-{one.name}-{subject.digest()}"):
            result = CheckResult(name=one.name, passed=False, skipped="checked on another one with the same facts")
        else:
            result = _run(one, subject)
        certificate = certify(subject, [result.model_copy(update={"detail": ""})])
        dumped = json.dumps([plugin, of, certificate.model_dump(mode="json", exclude_defaults=True)])
        # Not record_property: it warns in the family of JUnit files that pytest writes, and a warning may be an error.
        properties += [(PROPERTY, dumped), ("device", certificate.device)]
        properties += [(n, x) for n, x in (("error", result.error), ("bound", result.bound)) if x is not None]
        if result.skipped is not None:
            pytest.skip(result.skipped)
        if not result.passed:
            pytest.fail(f"{subject.case.name}: {result}{_explained(subject, one)}", pytrace=False)


@lru_cache(maxsize=2)  # tests of one case follow each other, so each upstream is built once
def _subject(case: Case, device: str | None = None, dtypes: tuple[torch.dtype, ...] = ()) -> Subject:
    return next(Subject.of(case, device=device, dtypes=dtypes))


_failed: list[DeviceFailed] = []  # of this process


def _run(one: Check, subject: Subject) -> CheckResult:
    try:
        if _failed:
            raise _failed[0]
        return run_check(one, subject)
    except DeviceFailed as error:
        _failed[:] = [error]
        pytest.fail(f"not checked: {error}", pytrace=False)


_diagnosed: set[str] = set()  # names of cases


def _explained(subject: Subject, one: Check) -> str:
    """Diagnose a failed parity check, once a case."""
    if not one.name.startswith("parity.") or subject.case.name in _diagnosed or len(_diagnosed) >= _MAX_DIAGNOSES:
        return ""
    _diagnosed.add(subject.case.name)
    return f"\n{examine(subject)}"


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
    group.addoption("--certificates", metavar="FOLDER", help="write certificates into FOLDER")
    group.addoption("--conformance-device", metavar="DEVICE", help="run conformance on DEVICE; cuda for a GPU")
    group.addoption(
        "--conformance-dtype",
        metavar="DTYPE",
        action="append",
        help="compare logits in float32, bfloat16 or float16; may be repeated",
    )


def pytest_configure(config: pytest.Config) -> None:
    try:
        device_of(config.getoption("--conformance-device"))
        _dtypes(config)
    except InputError as error:
        raise pytest.UsageError(str(error)) from error


def _dtypes(config: pytest.Config) -> tuple[torch.dtype, ...]:
    return dtypes(cast("list[str] | None", config.getoption("--conformance-dtype")))


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    collected = _collected(terminalreporter)
    for plugin, (of, certificates) in sorted(collected.items()):
        terminalreporter.section(f"conformance: {plugin}")
        for line in summary(plugin, of, certificates):
            terminalreporter.write_line(line)
        if folder := cast("str | None", config.getoption("--certificates")):
            path = write_certificates(certificates, Path(folder) / file_name(plugin, certificates))
            terminalreporter.write_line(f"certificates: {path}")
    if collected and not torch.cuda.is_available():
        terminalreporter.write_line(
            "nothing ran on a GPU: no CUDA device is here (with one: pytest --conformance-device cuda)"
        )
    for title, counts in sorted(_counted(terminalreporter).items()):
        terminalreporter.section(title)
        for what, count in counts.items():
            terminalreporter.write_line(f"{count} {what}")


def _counted(terminalreporter: Any) -> dict[str, Counter[str]]:
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == COUNTS and report.when == "call":
                    title, counts = json.loads(value)
                    totals[title].update(counts)
    return totals


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
    """File of certificates; those of a GPU have one of their own, such as ``cuda-timm.jsonl``."""
    kinds = {torch.device(certificate.device).type for certificate in certificates} - {"cpu"}
    return "-".join([*sorted(kinds), f"{plugin}.jsonl"])


def summary(plugin: str, of: int, certificates: Sequence[Certificate]) -> list[str]:
    """Lines of a summary: how many of how many architectures passed, and the same for each check."""
    by_check: dict[str, list[CheckResult]] = defaultdict(list)
    for certificate in certificates:
        for result in certificate.results:
            by_check[result.name].append(result)
    passed, unchecked = sum(certificate.passed for certificate in certificates), of - len(certificates)
    combinations = len({certificate.facts for certificate in certificates})
    more = f"; {unchecked} more {'was' if unchecked == 1 else 'were'} not selected" if unchecked else ""
    facts = f"with {combinations} distinct combinations of facts{more}"
    lines = [f"{passed} of {len(certificates)} {plugin} architectures passed, {facts}"]
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
