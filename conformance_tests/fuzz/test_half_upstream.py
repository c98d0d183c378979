"""Half precision against upstream: no activation errs more than upstream's own tensor at its place does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, reject
from hypothesis import strategies as st
from prisma_conformance.measure import typical
from prisma_conformance.recording import Recorder
from prisma_conformance.strategies import SEEDS
from prisma_conformance.subject import Subject
from prisma_conformance.tolerances import SHOWN_ERROR_FACTOR
from torch import Tensor

from prisma_core import HookContext
from prisma_core.hooks.point import Hook
from prisma_core.host import installed

CASES = {case.name: case for case, _ in installed().cases({"timm", "hf", "open_clip", "dino", "vivit"})}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SIZES = st.sampled_from([1.0, 250.0, 300.0, 5e3]) | st.floats(0, 1)
JOINING = ("pos_embed", "position_embedding", "positional_embedding", "cls_token", "patch_embed", "patch_embeddings")


def strain(upstream: Any, size: float) -> None:
    """Give the last channel of what makes the first stream a size."""
    with torch.no_grad():
        for name, parameter in upstream.named_parameters():
            bias = parameter.ndim == 1 and name.endswith("bias") and "norm" not in name
            if any(part in name for part in JOINING) and (bias or parameter.ndim in (2, 3)):
                parameter[..., -1] = size


def recorded(subject: Subject, upstream: Any, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return upstream's own tensors, by hook point, in the form of ours; insides of kernels are left out."""
    tensors = dict[str, Tensor]()
    for rows, axes, _ in subject.references():
        plain = [row for row in rows if row.place.function is None]
        with Recorder(upstream, [row.place for row in plain]) as places:
            output = subject.forward(upstream, *inputs)
        sizes = {**axes, "batch": len(inputs[0])}
        tensors |= {row.hook: row.read(places[row.place], sizes) for row in plain if row.place in places}
    return {**tensors, "output": output}


@torch.no_grad()
def judge(subject: Subject, dtype: torch.dtype, hooks: Any = None) -> None:
    """Assert that no activation errs more than upstream's, where upstream runs and its output is finite."""
    upstream, inputs = subject.upstream(dtype), subject.inputs(2, dtype=dtype)
    try:
        theirs = recorded(subject, upstream, inputs)
    except NotImplementedError:  # torch has no such kernel for the dtype
        reject()
    assume(bool(theirs["output"].isfinite().all()))
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    exact = recorded(subject, subject.upstream(dtype).double(), wide)
    model = subject.make(subject.adapter, upstream)
    output, cache = model.run_with_cache(*inputs, hooks=hooks)
    for point in exact:
        ours = output if point == "output" else cache[point]
        # Upstream may have all images of a batch in one sequence, one after the other.
        truth, upstreams = (each[point].reshape(ours.shape) for each in (exact, theirs))
        assert ours.isfinite().all() or not upstreams.isfinite().all(), point
        bound, error = typical(upstreams, truth), typical(ours, truth)
        assert error <= SHOWN_ERROR_FACTOR * bound + 8 * torch.finfo(dtype).eps, (point, error, bound)


@given(st.sampled_from(sorted(CASES)), SEEDS, DTYPES, SIZES)
def test_no_activation_errs_more_than_upstreams(name: str, seed: int, dtype: torch.dtype, size: float) -> None:
    (subject,) = Subject.of(CASES[name], seed=seed)
    strain(subject.base, float(torch.finfo(dtype).max) ** size if size < 1 else size)
    judge(subject, dtype)


def overflowing(x: Tensor, at: HookContext) -> Tensor:
    """Norm with a variance in the dtype of what is normed, of a stream with channels of 300."""
    return 300 * x / (300 * x).square().mean(-1, keepdim=True).sqrt()


def coarse(x: Tensor, at: HookContext) -> Tensor:
    """Round to the four bits of float8; bfloat16's eight would be within the eight roundings that are allowed."""
    return x.to(torch.float8_e4m3fn).to(x)


@pytest.mark.parametrize("wrong", [overflowing, coarse])
def test_a_norm_that_rounds_otherwise_is_seen(wrong: Hook) -> None:
    (subject,) = Subject.of(CASES["vit_base_patch16_rope_224"], seed=0)
    strain(subject.base, 300.0)
    judge(subject, torch.float16)
    with pytest.raises(AssertionError, match=r"blocks\.0\.ln1\.hook_normalized"):
        judge(subject, torch.float16, {"blocks.0.ln1.hook_normalized": wrong})
