"""A stranger's plugins: the worked example, and what ``prisma new-plugin`` writes, in a fresh environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tomllib
import venv
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from torch import nn

from prisma_core import UnsupportedArchitecture
from prisma_core.cli.app import main
from prisma_core.maps.reader import Reader

EXAMPLE = Path(__file__).parents[2] / "docs" / "plugin" / "example"


class Environment:
    """A fresh virtual environment that sees what the running one has installed, so nothing is downloaded."""

    def __init__(self, folder: Path):
        venv.create(folder, with_pip=False)
        self.python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
        self.packages = Path(paths["purelib"])
        seen = {sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")}
        lines = [f"import site; site.addsitedir({path!r})" for path in sorted(seen)]
        (self.packages / "seen.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def run(self, *arguments: str, cwd: Path) -> str:
        """Return what a run of Python wrote; it must succeed."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHON", "COV"))}
        threads = {"OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        done = subprocess.run(
            [str(self.python), "-P", *arguments],
            cwd=cwd,
            env={**kept, **threads},
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


def module_of(folder: Path) -> str:
    (module,) = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["entry-points"]["prisma"].values()
    return module


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The example, copied, and a plugin just written; their packages are taken away once they are installed."""
    folder = tmp_path_factory.mktemp("projects")
    left = shutil.ignore_patterns("build", "*.egg-info", "__pycache__", ".*")
    shutil.copytree(EXAMPLE, folder / "example", ignore=left)
    assert main(["new-plugin", "made_up", "--folder", str(folder / "written")]) == 0
    assert main(["new-plugin", "made_of_places", "--map", "--folder", str(folder / "mapped")]) == 0
    return {name: folder / name for name in ("example", "written", "mapped")}


@pytest.fixture(scope="module")
def environment(projects: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = Environment(tmp_path_factory.mktemp("environment"))
    folders = [str(folder) for folder in projects.values()]
    made.run("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", *folders, cwd=projects["example"])
    for folder in projects.values():
        shutil.rmtree(folder / module_of(folder))
        assert (made.packages / module_of(folder)).is_dir()
    return made


@pytest.mark.parametrize("which", ["example", "written", "mapped"])
def test_its_own_suite_passes_in_a_fresh_environment(
    which: str, projects: dict[str, Path], environment: Environment
) -> None:
    told = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=projects[which])
    assert "failed" not in told
    assert "1 of 1" in told
    assert "parity.logits: 1 of 1" in told
    assert "hooks.live: 1 of 1" in told


def test_its_commands_in_a_fresh_environment(environment: Environment, tmp_path: Path) -> None:
    commands = [["plugins"], ["check", "torchvision:vit_b_16"], ["check", "made_up:tiny"]]
    code = f"import sys; from prisma_core.cli.app import main; sys.exit(max(main(line) for line in {commands}))"
    told = environment.run("-c", code, cwd=tmp_path)
    rows = {line.split()[0]: line for line in told.splitlines() if line.strip()}
    assert "prisma-torchvision 0.1.0" in rows["torchvision"]
    assert "ready" in rows["torchvision"]
    assert "ready" in rows["made_up"]
    assert "torchvision.models.vision_transformer.VisionTransformer" in told
    assert told.count("passed: ") == 2


UNDECLARED = """
import prisma_core as prisma
from prisma_core.plugin import installed


def taken():
    try:
        return bool(prisma.adapt(upstream))
    except prisma.UnsupportedArchitecture:
        return False


for plugin in ("torchvision", "made_up"):
    upstream = installed().cases({plugin})[0][0].build().eval()
    assert taken()
    for path, module in upstream.named_modules():
        own = type(module)
        if "forward" not in vars(own):
            continue
        for how in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = how(lambda *given: None)
            assert not taken(), (path, how)
            handle.remove()
        module.__class__ = type(own.__name__, (own,), {"__module__": "acme", "forward": lambda self, *given: None})
        assert not taken(), (path, "a class of its own")
        module.__class__ = own
        module.forward = lambda *given: None
        assert not taken(), (path, "a forward of its own")
        del module.forward
    assert taken()
    print(plugin, "refuses")
"""


def test_their_adapters_refuse_what_no_tensor_shows(environment: Environment, tmp_path: Path) -> None:
    told = environment.run("-c", UNDECLARED, cwd=tmp_path)
    assert "torchvision refuses" in told
    assert "made_up refuses" in told


def test_a_map_that_was_written_proves_every_hook_point(environment: Environment, tmp_path: Path) -> None:
    code = "from prisma_conformance import check; print(check('made_of_places:tiny', checks='maps.proven'))"
    assert "32 of 32 hook points proven by equations" in environment.run("-c", code, cwd=tmp_path)


def test_the_example_has_about_a_hundred_lines() -> None:
    files = list((EXAMPLE / module_of(EXAMPLE)).rglob("*.py"))
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert 0 < len(lines) < 110


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["Bad-Name"], "such as bad_name"),
        (["class"], "expected lower-case letters"),
        (["1st"], "such as st"),
        (["timm"], "There is a plugin 'timm' already: prisma_timm of"),
        (["file"], "There is a source 'file' already"),
        (["core"], "There is a package prisma_core already"),
        (["fine", "--type", "no_such.Thing"], "cannot be imported"),
        (["fine", "--type", "Thing"], "Expected package.module.Class"),
        (["fine", "--type", "math.pi"], "is no class of torch modules"),
        (["fine", "--type", "timm.models.vision_transformer.VisionTransformer"], "is adapted already"),
    ],
)
def test_what_cannot_be_written_is_said_in_one_line(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new-plugin", *arguments]) == 1
    message = capfd.readouterr().err
    assert told in message
    assert len(message.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    assert main(["new-plugin", "fine", "--folder", str(tmp_path)]) == 1
    assert main(["new-plugin", "fine", "--folder", str(tmp_path / "kept.txt")]) == 2
    assert main(["new-plugin", "fine", "--folder", str(tmp_path / "kept.txt" / "below")]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    assert "nothing was written" in capfd.readouterr().err


def test_a_type_is_named_by_the_module_that_defines_it(tmp_path: Path) -> None:
    kind = "torch.nn.TransformerEncoderLayer"
    assert main(["new-plugin", "fine_vit", "--type", kind, "--folder", str(tmp_path / "made")]) == 0
    made = tmp_path / "made"
    adapter = (made / "prisma_fine_vit" / "adapter.py").read_text()
    assert 'types = ("torch.nn.modules.transformer.TransformerEncoderLayer",)' in adapter
    assert "class FineVitAdapter(Adapter)" in adapter
    cases = (made / "prisma_fine_vit" / "cases.py").read_text()
    assert "# TransformerEncoderLayer(d_model, nhead, dim_feedforward=2048" in cases
    needs = [
        Requirement(one) for one in tomllib.loads((made / "pyproject.toml").read_text())["project"]["dependencies"]
    ]
    assert [one.name for one in needs] == ["prisma-interp", "torch"]
    assert all(one.specifier.contains(version(one.name)) for one in needs)
    major, minor = map(int, version("prisma-interp").split(".")[:2])
    prisma = needs[0].specifier  # a name that the next minor release deprecates may be gone in the one after it
    assert prisma.contains(f"{major}.{minor + 1}.9")
    assert not any(prisma.contains(other) for other in (f"{major}.{minor + 2}", f"{major + 1}.0", "0.0.9"))
    assert not (made / "prisma_fine_vit" / "tiny_vit.py").exists()
    for path in made.rglob("*.py"):
        compile(path.read_text(), str(path), "exec")
        assert "$" not in path.read_text()


def test_expected_facts_are_read_or_refused() -> None:
    reader = Reader(nn.Sequential(nn.GELU(approximate="tanh")))
    act = getattr(reader, "0")
    assert act.expect("GELU", approximate="tanh") is act
    assert "0.approximate" in reader.record
    with pytest.raises(UnsupportedArchitecture, match="approximate='tanh', expected 'none'"):
        act.expect("GELU", approximate="none")
    with pytest.raises(UnsupportedArchitecture, match=r"GELU at '0' is not supported: expected a ReLU"):
        act.expect("ReLU")
