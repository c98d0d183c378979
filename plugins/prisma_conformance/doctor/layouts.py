"""Changes of the layout of tokens: other numbers of class tokens, distillation tokens and registers."""

from __future__ import annotations

from collections.abc import Iterator

from prisma_conformance.doctor.change import Change
from prisma_conformance.doctor.facts import replaced
from prisma_core.plugin import AnySpec, DualSpec, ModelSpec

NUMBERS = ("registers", "cls", "distillation")
MOST = 8  # tokens that are tried where upstream does not show its number of tokens


def layouts(spec: AnySpec, tokens: int | None) -> Iterator[Change]:
    """Yield other numbers of tokens before the patches. Which of the kinds they are, numbers do not tell.

    Args:
        tokens: how many upstream has with the patches; None where it does not show its stream.
    """
    if isinstance(spec, DualSpec):
        for change in layouts(spec.vision, tokens):
            yield Change(f"vision.{change.says}", lambda s, c=change: s.model_copy(update={"vision": c.spec(s.vision)}))
        return
    if not isinstance(spec, ModelSpec):
        return
    layout = spec.layout
    totals = range(MOST + 1) if tokens is None else (tokens - layout.n_patches,)
    for total in (total for total in totals if total >= 0 and total != layout.n_prefix):
        choices = {name: getattr(layout, name) + total - layout.n_prefix for name in NUMBERS}
        choices = {name: n for name, n in choices.items() if 0 <= n <= (1 if name != "registers" else n)}
        said = " or ".join(f"layout.{name}={n} (it is {getattr(layout, name)})" for name, n in choices.items())
        name, n = next(iter(choices.items()), ("registers", total))
        update = {name: n} if choices else {"cls": 0, "distillation": 0, name: n}
        says = f"{total} tokens before the patches, not {layout.n_prefix}: {said or f'layout.registers={n} alone'}"
        yield Change(says, lambda s, u=update: replaced(s, {("layout",): s.layout.model_copy(update=u)}))


__all__ = ["layouts"]
