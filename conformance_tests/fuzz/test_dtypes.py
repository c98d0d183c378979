"""Half precision: asking for activations changes no number beyond rounding, in any dtype."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from prisma_conformance.strategies import SEEDS, hook_names, inputs, random_model, specs

from prisma_core.spec import AnySpec
from prisma_core.transformer.norm import Norm

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


def strained(model: Any, size: float, eps: float | None) -> Any:
    """Give channels of the embeddings a size, or zero for all of them, and every norm an eps."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition("embed.")[1] and ".norm." not in name and parameter.ndim and size == 0:
                parameter.zero_()  # tokens without variance
            elif name.endswith(("embed.prefix", "embed.pos_embed", "embed.W_E", "embed.proj.bias")):
                parameter[..., -1] = size
    for module in model.modules():
        if isinstance(module, Norm) and eps is not None:
            module.spec = module.spec.model_copy(update={"eps": eps})
    return model


@given(
    specs(),
    SEEDS,
    DTYPES,
    st.sampled_from([0.0, 1.0, 250.0, 300.0, 5e3]) | st.floats(0, 1),
    st.sampled_from([None, 1e-12, 1e-30]),
    st.booleans(),
    st.data(),
)
def test_asking_changes_no_number_of_strained_models(
    spec: AnySpec,
    seed: int,
    dtype: torch.dtype,
    size: float,
    eps: float | None,
    gradients: bool,
    data: st.DataObject,
) -> None:
    """Massive channels up to the largest finite number, tokens without variance, eps that vanish in float16."""
    largest = float(torch.finfo(dtype).max)
    size = largest**size if 0 < size < 1 else size
    model: Any = strained(random_model(spec, seed, dtype), size, eps)
    arguments = data.draw(inputs(spec, dtype=dtype))
    with torch.set_grad_enabled(gradients):
        plain = model(*arguments)
        assume(bool(plain.isfinite().all()))
        exact = copy.deepcopy(model).double()(*(x.double() if x.is_floating_point() else x for x in arguments))
        names = data.draw(st.none() | hook_names(model))
        hooks = dict.fromkeys(names or [], data.draw(st.sampled_from([lambda x, at: x, lambda x, at: None])))
        output, _ = model.run_with_cache(*arguments, names=names, hooks=data.draw(st.sampled_from([None, hooks])))
    rounding = torch.finfo(dtype).eps * max(1.0, float(plain.abs().max()))
    error = float((plain.double() - exact).abs().max())
    assert float((output.double() - plain.double()).abs().max()) <= 4 * error + 64 * rounding
