"""timm's families without a canonical form are hooked where they stand: each architecture at its small size.

The numbers of all of them are checked; all checks are run on one architecture for each way in which blocks, norms and
heads are put together (``all`` in the table), for the others repeat them.
"""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from prisma_conformance import Case
from prisma_conformance.pytest import suite

import prisma_core as prisma
from prisma_core.host import installed
from prisma_core.upstream.model import HookedUpstream

timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'prisma-interp[timm]'")

TABLE = list(csv.DictReader((Path(__file__).parent / "timm_mapped.csv").open(encoding="utf-8")))
CASES = {row["name"]: installed().source("timm").case(row["name"]) for row in TABLE}
ALL = [CASES[row["name"]] for row in TABLE if row["checks"] == "all"]
NUMBERS = ["parity.logits", "parity.hooks", "algebra", "maps.proven"]
OTHERS = ["parity.gradients", "hooks.live", "weights.*", "spec.audit", "save.load", "preprocess", "threads"]

test_numbers = suite("timm-mapped", checks=NUMBERS, cases=list(CASES.values()))
test_others = suite("timm-mapped", checks=OTHERS, cases=ALL)


@pytest.mark.parametrize("module", sorted({row["module"] for row in TABLE}))
def test_every_architecture_of_these_families_is_in_the_table(module: str) -> None:
    assert sorted(timm.list_models(module=module)) == [row["name"] for row in TABLE if row["module"] == module]
    assert all(CASES[row["name"]] is not None for row in TABLE if row["module"] == module)


def test_a_reference_gives_a_hooked_model_with_all_that_loading_knows() -> None:
    model = prisma.load("timm:swin_tiny_patch4_window7_224", pretrained=False)
    assert isinstance(model, HookedUpstream)
    assert model.reference == "timm:swin_tiny_patch4_window7_224"
    assert model.labels is not None
    assert len(model.labels) == 1000
    image = model.preprocess(torch.randint(256, (300, 400, 3), dtype=torch.uint8))
    assert image.shape == (1, 3, 224, 224)
    _, cache = model.run_with_cache(image, names=["stages.2.*.hook_pattern", ("resid_post", -1)])
    assert cache["stages.2.blocks.5.attn.hook_pattern"].shape == (1, 4, 12, 49, 49)
    assert cache["stages.3.blocks.1.hook_resid_post"].shape == (1, 7, 7, 768)
    assert len(cache) == 6 + 4  # of six patterns, and the last block of each stage


def built(name: str, **options: Any) -> torch.nn.Module:
    case = CASES[name]
    assert case is not None
    assert isinstance(case.build, partial)
    return case.build(**options)


def test_where_the_library_goes_step_by_step_the_numbers_are_the_same() -> None:
    """The table names other places then."""
    torch.manual_seed(0)
    upstream, image = built("hiera_tiny_224"), torch.randn(1, 3, 64, 96)
    fused = prisma.adapt(upstream)
    for block in upstream.blocks:
        block.attn.fused_attn = False
    steps = prisma.adapt(upstream)
    assert [*fused.hook_points()] != [*steps.hook_points()]  # the values are reached after the pattern here
    first, second = (dict(model.run_with_cache(image)[1].store) for model in (fused, steps))
    assert first.keys() == second.keys()
    for name, x in first.items():
        torch.testing.assert_close(x, second[name], rtol=1e-4, atol=1e-5)


def test_swin_on_the_fused_kernel() -> None:
    """timm leaves this off unless it is asked for."""

    def build() -> torch.nn.Module:
        upstream = built("swin_tiny_patch4_window7_224")
        for stage in upstream.layers:
            for block in stage.blocks:
                block.attn.fused_attn = True
        return upstream

    report = prisma.check(Case("swin, fused", build), checks=["parity.*", "algebra", "maps.*", "hooks.live"])
    assert report.passed, str(report)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"])
def test_swin_at_sizes_of_other_images(name: str) -> None:
    report = prisma.check(
        Case(name, partial(built, name, strict_img_size=False)), checks=["parity.*", "algebra", "maps.*"]
    )
    assert report.passed, str(report)
    assert len(report.certificate.sizes) == 2


def test_a_feature_that_no_row_stands_for_is_refused() -> None:
    for name, options in (("convnext_tiny", {"global_pool": ""}), ("hiera_tiny_224", {"global_pool": ""})):
        with pytest.raises(prisma.UnsupportedArchitecture, match="a head without pooling"):
            prisma.adapt(built(name, **options))
    upstream = built("samvit_base_patch16")
    upstream.blocks[0].attn.fused_attn = False
    with pytest.raises(prisma.UnsupportedArchitecture, match="step by step"):
        prisma.adapt(upstream)
