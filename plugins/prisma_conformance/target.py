"""Targets of a check: a reference, a model, an adapter or a case, resolved to upstream models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from prisma_core import HookedModel, ZooModel, export
from prisma_core.plugin import (
    Adapter,
    Case,
    LoadError,
    PluginError,
    PrismaError,
    Reader,
    Source,
    UnsupportedArchitecture,
    blaming,
    copy_module,
    installed,
    qualified_name,
    returned,
    shown,
)
from prisma_core.zoo import load_upstream, reference_of, spec_of

Target = str | nn.Module | Adapter | Case
LARGE = 1_000_000  # parameters; all checks of a smaller model take well under a minute


@dataclass(frozen=True)
class Resolved:
    """An upstream model to check.

    Attributes:
        case: how it is built and called.
        upstream: the built model.
        adapter: maps it.
        reference: names the model it stands for, if any.
        drawn: whether the weights are to be drawn at random.
        full: whether it has its real size.
        note: for users, about the size of a model that stands for a reference; empty where there is nothing to say.
    """

    case: Case
    upstream: nn.Module
    adapter: Adapter
    reference: str | None = None
    drawn: bool = True
    full: bool = False
    note: str = ""


def resolve(
    target: Target,
    *,
    upstream: nn.Module | None = None,
    adapter: Adapter | None = None,
    full: bool = False,
    pretrained: bool = False,
) -> Iterator[Resolved]:
    """Yield the models that a target stands for: one, or for an adapter one a case.

    Args:
        target, upstream, adapter, full, pretrained: as ``check`` takes them.

    Raises:
        UnknownName: no such reference.
        UnsupportedArchitecture: an adapter without cases, or a model no adapter takes.
        PrismaError: the adapter given takes no models of this type; or a hooked model without an upstream.
    """
    if isinstance(target, Adapter):
        yield from _of_adapter(target, full)
        return
    if isinstance(target, Case):
        model = _of_case(target, adapter, full)
    elif isinstance(target, str):
        model = _of_reference(target, adapter, full, pretrained)
    else:
        model = _of_module(target, upstream, adapter, full)
    yield model


def _of_adapter(adapter: Adapter, full: bool) -> Iterator[Resolved]:
    cases = _cases_of(adapter)
    first = next(cases, None)
    if first is None:
        raise UnsupportedArchitecture(
            ", ".join(adapter.types), "no installed plugin has a conformance case of this type"
        )
    yield _of_case(first, adapter, full)
    for case in cases:
        yield _of_case(case, adapter, full)


def _cases_of(adapter: Adapter, kind: str | None = None) -> Iterator[Case]:
    """Yield the cases whose model an adapter takes, or is of one of its types; its own plugin's, where it has one."""
    kinds = adapter.types if kind is None else (kind,)
    for case, _ in installed().cases(installed().homes(adapter) or None):
        if qualified_name(_built(case)) in kinds:
            yield case


def _of_case(case: Case, adapter: Adapter | None, full: bool) -> Resolved:
    skips = cast("object", case.skips)
    if not isinstance(cast("object", case.name), str) or not case.name.isprintable():
        raise PluginError(f"The name of a case is {case.name!r}; expected text that can be shown.")
    reasons = cast("Mapping[str, object]", skips).values() if isinstance(skips, Mapping) else [None]
    if not all(isinstance(why, str) and why for why in reasons):
        raise PluginError(f"skips of the case {case.name!r} is {shown(skips)}; expected each check with its reason.")
    built = _built(case, full=full)
    return Resolved(case, built, _adapter(built, adapter), full=full)


def _of_module(module: nn.Module, upstream: nn.Module | None, adapter: Adapter | None, full: bool) -> Resolved:
    reference = None
    if isinstance(module, ZooModel):
        reference, module = module.reference, _upstream_of(module, upstream)
    elif isinstance(module, HookedModel):
        raise PrismaError(f"{type(module).__name__} was adapted from no upstream model: there is nothing to compare.")
    case = Case(qualified_name(module), lambda: module)
    return Resolved(case, module, _adapter(module, adapter), reference, drawn=False, full=full)


def _upstream_of(model: ZooModel, upstream: nn.Module | None) -> nn.Module:
    """Build an upstream module with the hooked model's present weights."""
    unknown = (
        "This hooked model does not know its upstream module. Give it: check(model, upstream=module); "
        "or check the upstream module itself."
    )
    try:
        state = export(model)
    except LoadError as error:
        raise PrismaError(unknown) from error
    if upstream is not None:
        built = copy_module(upstream)
    elif model.reference is None or model.reference.startswith("file:"):
        raise PrismaError(unknown)
    else:
        source, rest = reference_of(model.reference)
        built = load_upstream(installed().source(source), rest, pretrained=False).model
    built.load_state_dict(state, strict=True)
    return built


# -------------------------------------------------------------------- references


def _of_reference(reference: str, adapter: Adapter | None, full: bool, pretrained: bool) -> Resolved:
    name, rest = reference_of(reference)
    source = installed().source(name)
    note = ""
    if not (full or pretrained):
        if (case := source.case(rest)) is not None:
            return replace(_of_case(case, adapter, full=False), reference=reference)
        outline, taker = _outline(source, rest, adapter)
        kind, size = qualified_name(outline), sum(parameter.numel() for parameter in outline.parameters())
        if size > LARGE:
            if (case := next(_cases_of(taker, kind), None)) is not None:
                note = (
                    f"the source {name!r} has no small form of {rest}, so the case {case.name!r}, another model of the "
                    f"class {kind}, is checked for it. --full (in Python full=True) checks {reference} itself."
                )
                return replace(_of_case(case, adapter, full=False), reference=reference, note=note)
            note = (
                f"no plugin has a small model of the class {kind}, so {reference} is checked at its real size, "
                f"{size:,} parameters. That takes long; a plugin's prisma_cases can bring a small one."
            )
    built = load_upstream(source, rest, pretrained=pretrained).model
    case = Case(reference, lambda: built)
    return Resolved(case, built, _adapter(built, adapter), reference, drawn=not pretrained, full=True, note=note)


def _outline(source: Source, rest: str, adapter: Adapter | None) -> tuple[nn.Module, Adapter]:
    """Build a reference's model and find its adapter; without numbers if constructor and adapter allow that.

    Raises:
        UnsupportedArchitecture: no adapter takes this very model.
    """

    def build() -> tuple[nn.Module, Adapter]:
        module = load_upstream(source, rest, pretrained=False).model
        taker = _adapter(module, adapter)
        spec_of(taker, Reader(module))
        return module, taker

    try:
        with torch.device("meta"):
            return build()
    except (PluginError, NotImplementedError, RuntimeError):
        return build()


# -------------------------------------------------------------------- parts


def _built(case: Case, *, full: bool = False) -> nn.Module:
    """Build a case's model, at its real size if asked for and if there is one."""
    which, build = ("full", case.full) if full and case.full else ("build", case.build)
    name = f"{which} of the case {case.name!r}"
    with blaming(build, name):
        return returned(name, build(), nn.Module)


def _adapter(upstream: nn.Module, adapter: Adapter | None) -> Adapter:
    """Return the adapter given, or the installed one.

    Raises:
        PrismaError: the adapter given takes no models of this type.
    """
    if adapter is None:
        return installed().adapter(upstream)
    types = cast("object", adapter.types)
    if not isinstance(types, tuple) or not all(isinstance(one, str) for one in cast("tuple[object, ...]", types)):
        name = type(adapter).__name__
        raise PrismaError(f"{name}.types is {shown(types)}; expected a tuple: types = ('package.module.Class',).")
    if qualified_name(upstream) not in adapter.types:
        raise PrismaError(
            f"{type(adapter).__name__} adapts {', '.join(adapter.types) or 'no type'}; what is to be checked is a "
            f"{qualified_name(upstream)}. Give an adapter whose types name it, or none for the installed one."
        )
    return adapter


__all__ = ["Resolved", "Target", "resolve"]
