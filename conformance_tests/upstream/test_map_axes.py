"""Axes of hooked upstreams: one name for heads, whatever their number."""

from __future__ import annotations

import pytest

import prisma_core as prisma

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'prisma-interp[hf]'")


def test_the_heads_of_an_autoencoders_decoder_are_heads() -> None:
    from prisma_hf.cases import autoencoder

    points = prisma.adapt(autoencoder()).hook_points()
    heads = {
        name: point.axes for name, point in points.items() if name.endswith(("hook_q", "hook_k", "hook_v", "hook_z"))
    }
    assert any(name.startswith("decoder.") for name in heads)
    assert set(heads.values()) == {"batch pos head d_head"}
