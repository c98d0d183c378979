"""Run the checks on a reference, a model, an adapter or a case."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version

import torch
from torch import nn

from prisma_conformance import devices
from prisma_conformance.checks import algebra, audit, live, maps, parity, running, tensors
from prisma_conformance.registry import Check, NotApplicable, select
from prisma_conformance.report.results import Certificate, CheckResult, DeviceFailed, Report
from prisma_conformance.subject import Subject
from prisma_core.errors import PrismaError, UnsupportedArchitecture, ask, called
from prisma_core.hooks.model import HookedModel
from prisma_core.maps.reader import qualified_name
from prisma_core.model import Size
from prisma_core.plugin.adapter import Adapter, MapAdapter
from prisma_core.plugin.case import Case, Pictures
from prisma_core.plugin.host import host
from prisma_core.plugin.source import Loaded
from prisma_core.transformer import ZooModel
from prisma_core.upstream.model import HookedUpstream
from prisma_core.zoo import export, split_reference

REGISTERED = (parity, tensors, live, algebra, audit, running)  # importing a module registers its checks

Target = str | nn.Module | Adapter | Case


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
    progress: Callable[[str, CheckResult], None] | None = None,
) -> Report:
    """Prove that a model computes what its upstream computes, and that its hooks are live.

    Args:
        target: a reference (``timm:vit_tiny_patch16_224``), a case or an adapter (all its cases), whose weights are
            drawn; or an upstream module or hooked model, with the weights it has. The target is never changed.
        checks: names or globs; None for all but those that are too slow to run unasked.
        upstream: the module a hooked model was adapted from, where it came from no reference.
        adapter: to use instead of the installed one.
        device: where to run. None runs on the CPU, and parity.logits on a GPU too where there is one.
        dtypes: what parity.logits compares in besides float64. None for float32, and on a GPU half precision too; every
            other check is about float64.
        full: build a reference or case at its real size; else references that a plugin has a small case for use that.
        pretrained: check a reference's real weights (downloads them), not drawn ones.
        seed: of weights and images.
        progress: called with the model's name and each result as it comes.

    Raises:
        UnknownName: no such check, reference or model.
        InputError: no such device or dtype.
        PrismaError: the adapter given takes no models of this type.
        UnsupportedArchitecture: the model cannot be represented, so there is nothing to check.
    """
    selected = select(checks)
    devices.usable(device)
    wanted = devices.dtypes(dtypes)
    certificates: list[Certificate] = []
    for subject, reference in subjects(
        target,
        upstream=upstream,
        adapter=adapter,
        device=device,
        dtypes=wanted,
        full=full,
        pretrained=pretrained,
        seed=seed,
    ):
        start = time.monotonic()
        results: list[CheckResult] = []
        for one in selected:
            result = run_check(one, subject)
            results.append(result)
            if progress is not None:
                progress(subject.case.name, result)
        certificates.append(certify(subject, results, reference=reference, full=full, seconds=time.monotonic() - start))
    return Report(certificates=tuple(certificates))


def run_check(one: Check, subject: Subject) -> CheckResult:
    """Return the result of one check."""
    if reason := subject.case.skips.get(one.name):
        return CheckResult(name=one.name, passed=False, skipped=reason)
    try:
        with devices.exact():
            found = maps.run(one, subject) if isinstance(subject.adapter, MapAdapter) else one.run(subject)
    except torch.OutOfMemoryError as error:
        subject.forget()
        torch.cuda.empty_cache()
        told = f"{subject.device} has not enough memory for this model: {str(error).partition('. ')[0]}"
        return CheckResult(name=one.name, passed=False, detail=told)
    except torch.AcceleratorError as error:
        # Whatever runs on this device from now on fails the same way, and would be blamed on other models.
        told = f"{subject.device} failed in {one.name} of {subject.case.name}, and stays unusable in this process"
        raise DeviceFailed(f"{told}: {str(error).partition(chr(10))[0]}") from error
    except NotApplicable as reason:
        return CheckResult(name=one.name, passed=False, skipped=str(reason))
    except Exception as problem:  # noqa: BLE001  # whatever a broken adapter or model raises is the finding
        return CheckResult(name=one.name, passed=False, detail=f"{type(problem).__name__}: {problem}")
    more = [f"and {len(found.problems) - 6} more"] if len(found.problems) > 6 else []
    detail = "; ".join([*found.problems[:6], *more])
    return CheckResult(
        name=one.name,
        passed=found.passed,
        error=found.error,
        bound=found.bound,
        detail=detail or found.detail,
        precisions=found.precisions,
    )


def certify(
    subject: Subject,
    results: Sequence[CheckResult],
    *,
    reference: str | None = None,
    full: bool = False,
    seconds: float = 0,
) -> Certificate:
    """Return the certificate of results."""
    kind = qualified_name(subject.base)
    sizes, facts = _told(subject)
    library = kind.split(".", 1)[0]
    return Certificate(
        name=subject.case.name,
        reference=reference,
        upstream=kind,
        library=library,
        version=_version(library),
        torch=torch.__version__,
        device=str(subject.device),
        machine=devices.machine(str(subject.also or subject.device)),
        sizes=sizes,
        form="mapped" if isinstance(subject.adapter, MapAdapter) else "canonical",
        weights="random" if subject.drawn else "own",
        full=full,
        facts=facts,
        seconds=round(seconds, 2),
        results=tuple(results),
    )


def _told(subject: Subject) -> tuple[tuple[Size, ...], str]:
    try:
        return tuple(subject.sizes()), subject.facts()
    except torch.OutOfMemoryError:  # the checks have said so; nothing is known of what could not be built
        return (), ""


def subjects(
    target: Target,
    *,
    upstream: nn.Module | None = None,
    adapter: Adapter | None = None,
    device: torch.device | str | None = None,
    dtypes: Sequence[torch.dtype] = (),
    full: bool = False,
    pretrained: bool = False,
    seed: int = 0,
) -> Iterator[tuple[Subject, str | None]]:
    """Yield what there is to check, next to its reference.

    Raises:
        UnknownName: no such reference.
        UnsupportedArchitecture: an adapter without cases, or a model no adapter takes.
    """
    if isinstance(target, Adapter):
        found = [(case, _built(case)) for case, _ in host().cases(host().homes(target) or None)]
        mine = [(case, built) for case, built in found if qualified_name(built) in target.types]
        if not mine:
            raise UnsupportedArchitecture(
                ", ".join(target.types), "no installed plugin has a conformance case of this type"
            )
        for case, built in mine:
            whole = _built(case, full=True) if full and case.full else built
            yield Subject(case, target, whole, seed=seed, device=device, dtypes=dtypes), None
        return
    case, reference, draw = _case(target, upstream, full=full, pretrained=pretrained)
    built = _built(case, full=full)
    if adapter is not None and qualified_name(built) not in adapter.types:
        raise PrismaError(
            f"{type(adapter).__name__} adapts {', '.join(adapter.types) or 'no type'}; what is to be checked is a "
            f"{qualified_name(built)}. Give an adapter whose types name it, or none for the installed one."
        )
    found = adapter or host().adapter(built)
    yield Subject(case, found, built, draw=draw, seed=seed, device=device, dtypes=dtypes), reference


def _built(case: Case, *, full: bool = False) -> nn.Module:
    """Return a case's model, at its real size if asked for and if there is one."""
    which, build = ("full", case.full) if full and case.full else ("build", case.build)
    return called(f"{which} of the case {case.name!r}", build, gives=nn.Module)


def _case(
    target: str | nn.Module | Case, upstream: nn.Module | None, *, full: bool, pretrained: bool
) -> tuple[Case, str | None, bool]:
    if isinstance(target, Case):
        return target, None, True
    if isinstance(target, str):
        return *_referenced(target, full=full, pretrained=pretrained), not pretrained
    if isinstance(target, ZooModel):
        module = _rebuilt(target, upstream)
        return Case(qualified_name(module), lambda: module), target.reference, False
    if isinstance(target, HookedModel):
        raise PrismaError(f"{type(target).__name__} was adapted from no upstream model: there is nothing to compare.")
    return Case(qualified_name(target), lambda: target), None, False


def _referenced(reference: str, *, full: bool, pretrained: bool) -> tuple[Case, str]:
    name, rest = split_reference(reference)
    if not (full or pretrained) and (case := host().source(name).case(rest)) is not None:
        return case, reference
    loaded: list[Loaded] = []

    def build() -> nn.Module:
        loaded.append(ask(host().source(name), "load", rest, gives=Loaded, pretrained=pretrained))
        return loaded[-1].model

    return Case(reference, build), reference


def _rebuilt(model: ZooModel, upstream: nn.Module | None) -> nn.Module:
    """Return an upstream module with the hooked model's present weights."""
    if upstream is not None:
        built = copy.deepcopy(upstream)
    elif not _known(model) or model.reference is None or model.reference.startswith("file:"):
        raise PrismaError(
            "This hooked model does not know its upstream module. Give it: check(model, upstream=module); "
            "or check the upstream module itself."
        )
    else:
        source, _, rest = model.reference.partition(":")
        built = host().source(source).load(rest, pretrained=False).model
    built.load_state_dict(export(model), strict=True)
    return built


def _known(model: ZooModel) -> bool:
    return model.origin is not None or isinstance(model, HookedUpstream)


@cache  # looking through everything that is installed takes as long as several checks
def _version(library: str) -> str:
    names = packages_distributions().get(library) or [library]
    try:
        return version(names[0])
    except PackageNotFoundError:
        return "unknown"


__all__ = ["Pictures", "certify", "check", "run_check", "subjects"]
