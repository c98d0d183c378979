"""The command of the benchmarks runs, and its table has every cell. No time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_cell_of_a_pass_has_its_numbers(tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    found = tmp_path / "rows.json"
    asked = [
        "passes",
        "--models",
        "test_vit",
        "--batches",
        "1",
        "2",
        "--budget",
        "0",
        "--no-compile",
        "--json",
        str(found),
    ]
    subprocess.run([sys.executable, "benchmarks", *asked], cwd=ROOT, check=True, capture_output=True)
    rows = json.loads(found.read_text(encoding="utf-8"))["passes"]["rows"]
    cells = {(row["batch"], row["what"], row["against"]) for row in rows}
    assert len(rows) == len(cells) == 2 * 8
    assert all(row["ratio"] > 0 and row["runs"] == 3 and not row["note"] for row in rows)


def test_an_unknown_group_is_named_with_those_there_are() -> None:
    ran = subprocess.run(
        [sys.executable, "benchmarks", "nonsense"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert "nonsense" in ran.stderr
    assert "passes, sweeps, starts, harvest, peers" in ran.stderr


def test_every_table_has_its_place_in_the_docs() -> None:
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    for group in ("passes", "sweeps", "starts", "harvest", "peers"):
        assert page.count(f"<!-- {group}: written by python benchmarks --write -->") == 1
        assert page.count(f"<!-- end of {group} -->") == 1
