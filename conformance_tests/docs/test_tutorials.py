"""Tutorials run from top to bottom as notebooks, and their figures are drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).parents[2] / "docs" / "tutorials").glob("*.md"))
FIGURES = {
    "main-demo": 4,
    "emoji-lens": 2,
    "toy-to-circuit": 3,
    "attention-heads": 3,
    "registers": 1,
    "video": 3,
    "sparse-features": 1,
    "tinyclip-and-words": 4,
    "your-own-plugin": 2,
}


def test_the_tutorials_are_those_that_are_counted() -> None:
    assert {path.stem for path in TUTORIALS} == set(FIGURES)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs_as_a_notebook(path: Path, tmp_path: Path) -> None:
    jupytext = pytest.importorskip("jupytext", reason="needs jupytext: pip install 'prisma-interp[docs]'")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient: pip install 'prisma-interp[docs]'")
    pytest.importorskip("ipykernel", reason="needs ipykernel: pip install 'prisma-interp[docs]'")
    notebook = jupytext.read(path)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    assert all(cell.execution_count for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    figures = [output for output in outputs if "application/vnd.plotly.v1+json" in output.get("data", {})]
    assert len(figures) == FIGURES[path.stem]
    assert all(figure["data"]["application/vnd.plotly.v1+json"]["data"] for figure in figures)
