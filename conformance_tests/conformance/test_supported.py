"""What plugins carry about their classes is what the certificates say, and ``prisma models --classes`` shows it."""

from __future__ import annotations

import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from prisma_conformance.report.results import Certificate, CheckResult, read_certificates, write_certificates
from prisma_conformance.report.supported import counted, read_supported, summarise, write_supported
from prisma_conformance.report.table import write_table

from prisma_core import LoadError
from prisma_core import host as plugins
from prisma_core.cli.app import main
from prisma_core.host import Host, installed

DOCS = Path(__file__).parents[2] / "docs" / "conformance"
PLUGIN = """
from prisma_core import hookimpl
from prisma_core.contract.adapter import Adapter

class Ours(Adapter):
    types = ("acme.Net", "acme.Old")
    def spec(self, upstream): raise NotImplementedError  # only its types are asked for
    weights = hooks = spec

@hookimpl
def prisma_adapters():
    yield Ours()
"""


def _certificate(name: str, upstream: str, error: float) -> Certificate:
    result = CheckResult(name="parity.logits", passed=error < 1, error=error, bound=1.0)
    return Certificate(name=name, upstream=upstream, library="acme", version="1", torch="2", results=(result,))


CERTIFICATES = [
    _certificate("a", "acme.Net", 0.25),
    _certificate("b", "acme.Net", 2.0),
    _certificate("c", "b.Not", 0.5),
]


POINTS = (("acme", "acme_plugin"), ("conformance", "prisma_conformance.command"))


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stranger's package, the only plugin there is."""
    package = tmp_path / "site" / "acme_plugin"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PLUGIN)
    monkeypatch.delitem(sys.modules, "acme_plugin", raising=False)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(plugins, "_host", Host([EntryPoint(name, module, "prisma") for name, module in POINTS]))
    return package


def test_our_plugins_carry_what_the_certificates_say() -> None:
    certificates = [one for path in sorted(DOCS.glob("*.jsonl")) for one in read_certificates(path)]
    assert certificates
    assert read_supported(installed()) == {row.upstream: row for row in summarise(certificates)}
    assert sum(row.architectures for row in read_supported(installed()).values()) == len(counted(certificates))


def test_a_strangers_plugin_carries_its_own(acme: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_certificates(CERTIFICATES, tmp_path / "acme.jsonl")
    write_table(tmp_path, "acme_plugin")
    rows = json.loads((acme / "supported.json").read_text())
    assert [(row["upstream"], row["architectures"], row["passed"], row["error"]) for row in rows] == [
        ("acme.Net", 2, 1, 2.0)
    ]
    assert main(["models", "--classes"]) == 0
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["acme.Net", "acme", "canonical", "1", "of", "2", "2e+00"],
        ["acme.Old", "acme", "no", "certificate"],
    ]
    assert "1 of 2 architectures pass" in err


def test_a_gpus_certificates_count_no_architecture_twice() -> None:
    there = [one.model_copy(update={"device": "cuda"}) for one in CERTIFICATES]
    assert summarise([*there, *CERTIFICATES]) == summarise(CERTIFICATES)
    assert [row.architectures for row in summarise(there)] == [2, 1]


def test_what_cannot_be_written_or_read_is_told(acme: Path) -> None:
    with pytest.raises(LoadError, match=r"'other' is no installed plugin's package\. Packages: acme_plugin"):
        write_supported(CERTIFICATES, "other")
    with pytest.raises(LoadError, match="None of the certificates is of one of the 2 classes that acme_plugin adapts"):
        write_supported(CERTIFICATES[2:], "acme_plugin")
    assert not (acme / "supported.json").exists()
    (acme / "supported.json").write_text('[{"upstream": "acme.Net"}]')
    assert read_supported(plugins.installed()) == {}
    assert "supported.json is not what" in (plugins.installed().plugins()[0].error or "")
