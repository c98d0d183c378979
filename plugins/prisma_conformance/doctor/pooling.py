"""Changes of what stands behind the blocks, where one fact cannot change without another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prisma_conformance.doctor.change import Change
from prisma_core.plugin import AnySpec, DualSpec, ModelSpec

KINDS = ("none", "patches", "token", "avg", "token_and_avg")


def pooling(spec: AnySpec) -> Iterator[Change]:
    """Yield other kinds of pooling, with the prefix and without, and the final norm on its other side."""
    if isinstance(spec, DualSpec):
        for change in pooling(spec.vision):
            yield Change(f"vision.{change.says}", lambda s, c=change: s.model_copy(update={"vision": c.spec(s.vision)}))
        return
    if not isinstance(spec, ModelSpec):
        return
    if spec.pool.kind != "attention":
        for kind in KINDS:
            for with_prefix in (False, True):
                pool = {**dict(spec.pool), "kind": kind, "with_prefix": with_prefix}
                if pool == dict(spec.pool) or (with_prefix and kind not in ("avg", "token_and_avg")):
                    continue
                tokens = {"avg": ", over patches alone", "token_and_avg": ", over patches alone"}.get(kind, "")
                tokens = ", over patches and prefix" if with_prefix else tokens
                was = f"(it is {spec.pool.kind!r}, {spec.pool.with_prefix})"
                says = f"pool.kind={kind!r}, with_prefix={with_prefix}{tokens} {was}"
                width = spec.d_model * (2 if kind == "token_and_avg" else 1)
                yield Change(says, lambda s, p=pool, w=width: _with(s, pool=type(s.pool)(**p), d_pool=w))
    if spec.ln_final is not None and spec.ln_pool is None:
        moved = {"ln_pool": spec.ln_final, "ln_final": None}
        yield Change("ln_pool instead of ln_final: the final norm after pooling", lambda s: _with(s, **moved))
    elif spec.ln_pool is not None and spec.ln_final is None:
        moved = {"ln_final": spec.ln_pool, "ln_pool": None}
        yield Change("ln_final instead of ln_pool: the final norm before pooling", lambda s: _with(s, **moved))


def _with(spec: ModelSpec, **update: Any) -> ModelSpec:
    return ModelSpec.model_validate({**dict(spec), **update})


__all__ = ["pooling"]
