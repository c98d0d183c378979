"""Proof of a hook map: its equations hold, and no hook point could hold other numbers unnoticed."""

from __future__ import annotations

import fnmatch

import torch

from prisma_conformance import tolerances
from prisma_conformance.checks.axes import misnamed
from prisma_conformance.checks.equations import MapEquations
from prisma_conformance.finding import Finding
from prisma_conformance.subject import Subject


@torch.no_grad()
def proven(subject: Subject) -> Finding:
    """Evaluate what rows and adapter say of each hook point, then add noise to each: some equation has to fail."""
    equations = MapEquations(subject)
    errors, problems = equations.evaluate(equations.rows)
    own = equations.of_adapter(equations.clean.after)
    wrong = {text: e for text, e in own.items() if not e <= tolerances.FLOAT64 and equations.reason(text) is None}
    problems += [f"{text}: off by {error:.1e}" for text, error in wrong.items()]
    errors |= {text: error for text, error in own.items() if equations.reason(text) is None}
    provers = {point: equations.prover(point) for point in equations.scope.rows}
    unproven = [point for point, prover in provers.items() if prover is None]
    exempt = [point for point in unproven if equations.reason(point) is not None]
    if len(unproven) > len(exempt):
        problems.append(_unproven([point for point in unproven if point not in exempt], equations))
    problems += misnamed(equations.scope.rows, equations.clean.after, equations.inputs[0])
    problems += _idle_exemptions(equations, provers, own)
    detail = f"{len(provers) - len(unproven)} of {len(provers)} hook points proven by equations"
    if exempt:
        detail += f"; exempt: {', '.join(exempt)}"
    if equations.prose:
        detail += f"; {len(equations.prose)} rows explain their hook point in prose"
    return Finding(max(errors.values(), default=0.0), tolerances.FLOAT64, tuple(problems), detail)


def _unproven(points: list[str], equations: MapEquations) -> str:
    named = [f"{point} ({equations.prose[point]})" if point in equations.prose else point for point in points]
    return (
        f"{len(points)} hook points could hold anything, for no equation fails when they are changed: "
        f"{', '.join(named)}. Write a formula behind '=' in the row, or equations(), or a reason in exempt()"
    )


def _idle_exemptions(equations: MapEquations, provers: dict[str, str | None], own: dict[str, float]) -> list[str]:
    """Problems of exemptions that name nothing, or nothing that needs them."""
    fails: dict[str, bool] = {text: not error <= tolerances.FLOAT64 for text, error in own.items()}
    for equation in (*equations.rows, *equations.everywhere):
        try:
            fails[str(equation)] = not equation.error(*equations.clean) <= tolerances.FLOAT64
        except Exception:  # noqa: BLE001  # it does not hold, in its own way
            fails[str(equation)] = True
    problems: list[str] = []
    for key in equations.exempt:
        points, texts = fnmatch.filter(provers, key), fnmatch.filter(fails, key)
        if not points and not texts:
            problems.append(f"exempt() names {key!r}, which is no hook point and no equation of this model")
        elif not any(fails[text] for text in texts) and not any(provers[point] is None for point in points):
            by = f" by {provers[points[0]]!r}" if points else ""
            problems.append(f"exempt() names {key!r}, which {'is proven' + by if points else 'holds'}: take it out")
    return problems


__all__ = ["proven"]
