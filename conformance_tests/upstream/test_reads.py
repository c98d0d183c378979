"""What is read in a hooked upstream does not change what an edit does."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.usefixtures("in_float64")


def changed(x, at):
    return 1.5 * x + 0.125 * x.roll(1, 0)


@torch.no_grad()
def test_every_pair_of_a_read_and_an_edit(model, x):
    for edit in model.hook_points():
        plain = model.run_with_hooks(x, hooks={edit: changed})
        assert not torch.allclose(plain, model(x), rtol=1e-6), edit
        for read in model.hook_points():
            output, _ = model.run_with_cache(x, names=read, hooks={edit: changed})
            torch.testing.assert_close(output, plain, rtol=1e-11, atol=1e-11, msg=f"{edit} while {read} is read")
