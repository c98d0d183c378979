"""Half precision: asking for activations changes no number beyond rounding, in any dtype."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from prisma_conformance.strategies import SEEDS, hook_names, inputs, random_model, specs

from prisma_core.spec import AnySpec

from .drawing import close

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@given(specs(), SEEDS, DTYPES, st.booleans(), st.data())
def test_asking_changes_no_number_beyond_rounding(
    spec: AnySpec, seed: int, dtype: torch.dtype, gradients: bool, data: st.DataObject
) -> None:
    model: Any = random_model(spec, seed, dtype)
    arguments = data.draw(inputs(spec, dtype=dtype))
    with torch.set_grad_enabled(gradients):
        plain = model(*arguments)
        exact = random_model(spec, seed)(*(x.double() if x.is_floating_point() else x for x in arguments))
        assume(bool(plain.isfinite().all()))
        names = data.draw(st.none() | hook_names(model))
        output, cache = model.run_with_cache(*arguments, names=names)
    assert output.dtype == dtype
    assert all(x.dtype == dtype for x in cache.values())
    scale = max(1.0, float(exact.abs().max()))
    error = float((plain.double() - exact).abs().max())
    assert float((output.double() - exact).abs().max()) <= 8 * error + 32 * torch.finfo(dtype).eps * scale


@given(specs(["vision", "text"]), SEEDS, DTYPES, st.data())
@torch.no_grad()
def test_a_cache_in_another_dtype_is_the_cache_cast(
    spec: AnySpec, seed: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    model: Any = random_model(spec, seed, dtype)
    arguments = data.draw(inputs(spec, dtype=dtype))
    names = data.draw(hook_names(model))
    other = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    _, plain = model.run_with_cache(*arguments, names=names)
    _, cast = model.run_with_cache(*arguments, names=names, dtype=other)
    assert all(close(cast[name], x.to(other), 0.0) for name, x in plain.items())
