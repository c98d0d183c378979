"""Imports of the kit: the entry point is light, and the old path works with one warning."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator

import prisma_conformance
import pytest

pytest_plugins = ["pytester"]
OLD = "prisma_core.conformance"


@pytest.fixture
def no_old_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has not imported the old path."""
    for name in [name for name in sys.modules if name == OLD or name.startswith(f"{OLD}.")]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name == OLD or name.startswith(f"{OLD}.")]:
        del sys.modules[name]


def test_the_entry_point_imports_nothing_of_the_kit() -> None:
    script = """
import sys, prisma_core.plugin
before = set(sys.modules)
import prisma_conformance.command
print(*sorted(set(sys.modules) - before))
"""
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    ours = {"prisma_conformance", "prisma_conformance.command", "prisma_conformance.randomise"}
    assert set(modules) == ours


def test_every_public_name_is_there_whatever_was_imported_before() -> None:
    importlib.import_module("prisma_conformance.randomise")  # a module and a function of one name
    for name in prisma_conformance.__all__:
        value = getattr(prisma_conformance, name)
        assert not isinstance(value, type(sys)), name
    assert set(prisma_conformance.__all__) <= set(dir(prisma_conformance))
    with pytest.raises(AttributeError, match="no attribute 'chek'"):
        _ = prisma_conformance.chek


@pytest.mark.usefixtures("no_old_path")
@pytest.mark.parametrize(
    ("line", "module", "names"),
    [
        ("from prisma_core.conformance import Case, check", "prisma_conformance", ["Case", "check"]),
        ("from prisma_core.conformance.pytest import suite", "prisma_conformance.pytest", ["suite"]),
        ("from prisma_core.conformance.randomise import randomise", "prisma_conformance.randomise", ["randomise"]),
        ("import prisma_core.conformance.case", "prisma_core.contract.case", []),
    ],
)
def test_the_old_path_gives_the_new_names_with_one_warning(line: str, module: str, names: list[str]) -> None:
    namespace: dict[str, object] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(line, namespace)
    messages = [str(one.message) for one in caught if one.category is DeprecationWarning]
    assert len(messages) == 1
    assert "prisma_conformance" in messages[0]
    assert caught[0].filename == "<string>"  # the line that has to change
    for name in names:
        assert namespace[name] is getattr(importlib.import_module(module), name)


def test_the_three_lines_of_old_test_suites_work(pytester: pytest.Pytester) -> None:
    pytest.importorskip("timm", reason="timm is not installed: pip install 'prisma-interp[timm]'")
    pytester.makeconftest("pytest_plugins = ['prisma_core.conformance.pytest']")
    pytester.makepyfile(
        """
        from timm.models.vision_transformer import VisionTransformer
        from prisma_core.conformance import Case
        from prisma_core.conformance.pytest import suite

        def build():
            return VisionTransformer(img_size=8, patch_size=4, embed_dim=12, depth=1, num_heads=2, num_classes=5)

        test_conformance = suite("mine", cases=[Case("tiny", build)], checks=["weights.*", "preprocess"])
        """
    )
    ran = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--conformance-device", "cpu", "-v")
    outcomes = ran.parseoutcomes()  # pytest has warnings of its own, by its release
    assert {name: n for name, n in outcomes.items() if "warning" not in name} == {"passed": 2, "skipped": 1}
    assert str(ran.stdout).count("DeprecationWarning: prisma_core.conformance") == 1
    ran.stdout.fnmatch_lines(["*test_conformance?tiny-weights.roundtrip? PASSED*"])
    ran.stdout.fnmatch_lines(["*DeprecationWarning: prisma_core.conformance is prisma_conformance now*"])
    ran.stdout.fnmatch_lines(["1 of 1 mine architectures passed*"])
