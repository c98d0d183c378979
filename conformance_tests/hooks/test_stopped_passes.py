"""Passes that stop at the last activation that is asked for."""

from __future__ import annotations

import pytest
import torch


def test_without_output_the_pass_stops_at_the_last_activation(vit, image):
    ran = []
    counting = {"*": lambda x, at: ran.append(at.name)}
    names = list(vit.hook_points())
    with vit.hooks(counting):
        output, cache = vit.run_with_cache(image, names=["embed", ("attn_out", 0)], output=False)
    assert output is None
    assert list(cache) == ["hook_embed", "blocks.0.hook_attn_out"]
    assert ran[-1] == "blocks.0.hook_attn_out"
    assert not any(name.startswith("blocks.1") for name in ran)
    assert len(ran) < len(names)
    with vit.caching("z") as outer:  # nested in another cache, whose points must not count
        output, cache = vit.run_with_cache(image, names=("z", 1), output=False)
    assert list(cache) == ["blocks.1.attn.hook_z"]
    assert len(outer) == 2
    assert torch.equal(vit(image), vit(image))


@pytest.mark.parametrize("everywhere", [False, True])
def test_hooks_of_torchs_before_the_model_run_where_the_pass_stops_early(vit, image, everywhere):
    def twice(module, given):
        return (2 * given[0],) if module is vit else None

    expected = vit.run_with_cache(2 * image, names="resid_pre", output=False)[1]
    register = torch.nn.modules.module.register_module_forward_pre_hook
    handle = register(twice) if everywhere else vit.register_forward_pre_hook(twice)
    _, whole = vit.run_with_cache(image, names="resid_pre")
    _, stopped = vit.run_with_cache(image, names="resid_pre", output=False)
    handle.remove()
    for name in expected:
        assert torch.equal(whole[name], expected[name])
        assert torch.equal(stopped[name], expected[name])
