"""The kit in another project's continuous integration: JUnit files, selections, warnings that are errors."""

from __future__ import annotations

import pytest

SUITE = """
    from torch import nn
    from prisma_conformance import Case
    from prisma_conformance.pytest import suite
    from timm.models.vision_transformer import VisionTransformer

    def build(classes):
        return lambda: VisionTransformer(
            img_size=8, patch_size=4, embed_dim=12, depth=1, num_heads=2, num_classes=classes
        )

    cases = [Case("five", build(5)), Case("six", build(6))]
    test_conformance = suite("mine", cases=cases, checks=["weights.accounted", "preprocess"])
"""


def test_junit_files_hold_numbers_and_device_and_a_selection_is_no_failure(pytester: pytest.Pytester) -> None:
    pytest.importorskip("timm", reason="timm is not installed: pip install 'prisma-interp[timm]'")
    pytester.makeconftest("pytest_plugins = ['prisma_conformance.pytest']")
    pytester.makepyfile(SUITE)
    options = ("-p", "no:cacheprovider", "-W", "error::pytest.PytestWarning", "--junitxml=junit.xml", "-k", "five")
    ran = pytester.runpytest_subprocess(*options, "--conformance-device", "cpu")
    ran.assert_outcomes(passed=1, skipped=1, deselected=2)
    ran.stdout.fnmatch_lines(["1 of 1 mine architectures passed, with 1 *; 1 more was not selected"])
    junit = (pytester.path / "junit.xml").read_text()
    assert '<property name="error" value="0.0"' in junit
    assert '<property name="bound" value="1e-10"' in junit
    assert '<property name="device" value="cpu"' in junit
