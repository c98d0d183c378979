"""Runs of the checks on a reference, a model, an adapter or a case."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version

import torch
from torch import nn

from prisma_conformance import devices
from prisma_conformance.finding import Check
from prisma_conformance.registry import select
from prisma_conformance.report.results import Certificate, CheckResult, DeviceFailed, Report
from prisma_conformance.subject import Subject
from prisma_conformance.target import Target
from prisma_core import Size
from prisma_core.plugin import (
    Adapter,
    NotApplicable,
    check_call,
    installed,
    qualified_name,
)

SHOWN_PROBLEMS = 6  # in one result; a mistake in a part that all layers share has one a layer


def check(
    target: Target,
    *,
    checks: str | Iterable[str] | None = None,
    upstream: nn.Module | None = None,
    adapter: Adapter | None = None,
    device: torch.device | str | None = None,
    dtypes: Iterable[torch.dtype | str] | torch.dtype | str | None = None,
    full: bool = False,
    pretrained: bool = False,
    seed: int = 0,
    starting: Callable[[Subject, Check], None] | None = None,
    progress: Callable[[str, CheckResult], None] | None = None,
) -> Report:
    """Prove that a model computes what its upstream computes, and that its hooks are live.

    >>> report = check("timm:vit_tiny_patch16_224", checks=["parity.*", "algebra"])
    >>> report.passed, report.certificate["parity.logits"].error

    Args:
        target: a reference (``timm:vit_tiny_patch16_224``), a case or an adapter (all its cases), whose weights are
            drawn; or an upstream module or hooked model, with the weights it has. The target is never changed.
        checks: names or globs; None for all but those that run on request only.
        upstream: the module a hooked model was adapted from, where it came from no reference.
        adapter: to use instead of the installed one.
        device: where to run. None runs on the CPU, and parity.logits on a GPU too where there is one.
        dtypes: what parity.logits compares in besides float64. None for float32, and on a GPU half precision too; every
            other check is about float64.
        full: build a reference or case at its real size. Otherwise a small model of its class is checked where a plugin
            has one, and the log says so where it has none.
        pretrained: check a reference's real weights (downloads them), not drawn ones.
        seed: of weights and images.
        starting: called before each check with the subject and the check.
        progress: called after each check with the model's name and the result.

    Raises:
        UnknownName: no such check, reference or model.
        InputError: no such device or dtype.
        PrismaError: the adapter given takes no models of this type.
        UnsupportedArchitecture: the model cannot be represented, so there is nothing to check.
    """
    for name, function in (("starting", starting), ("progress", progress)):
        if function is not None:
            check_call(function, 2, name, "a function of two arguments")
    selected = select(checks)
    certificates: list[Certificate] = []
    for subject in Subject.of(
        target,
        upstream=upstream,
        adapter=adapter,
        device=device,
        dtypes=devices.dtypes(dtypes),
        full=full,
        pretrained=pretrained,
        seed=seed,
    ):
        if subject.note:
            logging.getLogger(__name__).warning(subject.note)
        start = time.monotonic()
        results: list[CheckResult] = []
        for one in selected:
            if starting is not None:
                starting(subject, one)
            result = run_check(one, subject)
            results.append(result)
            if progress is not None:
                progress(subject.case.name, result)
        certificates.append(certify(subject, results, seconds=time.monotonic() - start))
    return Report(certificates=tuple(certificates))


def run_check(one: Check, subject: Subject) -> CheckResult:
    """Run one check. Whatever the adapter or the model raises is a failure, ``NotApplicable`` a skip.

    Raises:
        DeviceFailed: the device broke, and nothing can run on it any more.
    """
    if reason := subject.case.skips.get(one.name):
        return CheckResult(name=one.name, passed=False, skipped=reason)
    try:
        with devices.exact():
            finding = one.run(subject)
    except torch.OutOfMemoryError as error:
        subject.free()
        torch.cuda.empty_cache()
        detail = f"{subject.device} has not enough memory for this model: {str(error).partition('. ')[0]}"
        return CheckResult(name=one.name, passed=False, detail=detail)
    except torch.AcceleratorError as error:
        # Whatever runs on this device from now on fails the same way, and would count as a mistake of other models.
        detail = f"{subject.device} failed in {one.name} of {subject.case.name}, and stays unusable in this process"
        raise DeviceFailed(f"{detail}: {str(error).partition(chr(10))[0]}") from error
    except NotApplicable as reason:
        return CheckResult(name=one.name, passed=False, skipped=str(reason))
    except Exception as problem:  # noqa: BLE001  # whatever a broken adapter or model raises is the finding
        return CheckResult(name=one.name, passed=False, detail=f"{type(problem).__name__}: {problem}")
    problems = list(finding.problems[:SHOWN_PROBLEMS])
    if len(finding.problems) > SHOWN_PROBLEMS:
        problems.append(f"and {len(finding.problems) - SHOWN_PROBLEMS} more")
    return CheckResult(
        name=one.name,
        passed=finding.passed,
        error=finding.error,
        bound=finding.bound,
        detail="; ".join(problems) or finding.detail,
        precisions=finding.precisions,
    )


def certify(subject: Subject, results: Sequence[CheckResult], *, seconds: float = 0) -> Certificate:
    """Write the certificate of results."""
    kind = qualified_name(subject.base)
    library = kind.split(".", 1)[0]
    sizes, facts = _sizes_and_facts(subject)
    return Certificate(
        name=subject.case.name,
        reference=subject.reference,
        upstream=kind,
        library=library,
        version=_version(library),
        torch=torch.__version__,
        prisma=version("prisma-interp"),
        plugin=_plugin(subject.adapter),
        python=platform.python_version(),
        device=str(subject.device),
        machine=devices.machine(str(subject.second_device or subject.device)),
        sizes=sizes,
        form=subject.form,
        weights="random" if subject.drawn else "own",
        full=subject.full,
        facts=facts,
        seconds=round(seconds, 2),
        results=tuple(results),
    )


def _sizes_and_facts(subject: Subject) -> tuple[tuple[Size, ...], str]:
    try:
        return tuple(subject.sizes()), subject.digest()
    except torch.OutOfMemoryError:  # the checks have reported it; nothing is known of what could not be built
        return (), ""


@cache  # looking through everything that is installed takes as long as several checks
def _version(package: str) -> str:
    names = packages_distributions().get(package) or [package]
    try:
        return version(names[0])
    except PackageNotFoundError:
        return "unknown"


def _plugin(adapter: Adapter) -> str:
    """Return the distribution, with version, of the plugin that brings an adapter; empty if none does."""
    infos = {info.name: info for info in installed().infos.values()}
    return next((infos[name].distribution for name in sorted(installed().homes(adapter)) if name in infos), "")


__all__ = ["certify", "check", "run_check"]
