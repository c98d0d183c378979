"""Figures of odd values and names: what cannot be drawn is counted, names stay apart and in their place."""

from __future__ import annotations

import json
import warnings
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch

from prisma_core import Result

pytest.importorskip("plotly", reason="plotly is missing: pip install 'prisma-interp[view]'")
pytest.importorskip("matplotlib", reason="matplotlib is missing: pip install 'prisma-interp[view]'")

NAMES = (
    "<script>alert(1)</script>",
    "a" * 300,
    "🐞 <b>bug</b>",
    "$x_1$",
    "日本語",
    "",
    "line\nbreak",
    "{}%d",
    "crane",
    "crane",
)
VALUES = {
    "one row": torch.tensor([[1.0, 2, 3]]),
    "NaN": torch.tensor([[1.0, nan], [nan, nan]]),
    "infinite": torch.tensor([[1.0, inf], [-inf, 2]]),
    "nothing finite": torch.full((2, 2), inf),
    "equal": torch.full((3, 3), 2.0),
    "huge": torch.tensor([[-3e38, 3e38]]),
}


def drawn(result: Result, folder: Path, **options: Any) -> Any:
    """Draw a result in every form, without a warning of a library about the values."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("error", message="constrained_layout")
        figure = result.plot(**options)
        for form in ("png", "svg", "pdf", "html"):
            assert figure.save(folder / f"figure.{form}").stat().st_size > 500
        for page in (result._repr_html_(), (folder / "figure.html").read_text("utf-8"), figure.to_json()):
            assert "<script>alert" not in page
    return figure


@pytest.mark.parametrize("kind", [None, "curves"])
@pytest.mark.parametrize("name", VALUES)
def test_odd_values_are_drawn(name: str, kind: str | None, tmp_path: Path) -> None:
    values = VALUES[name]
    figure = drawn(Result(values, ("layer", "step")), tmp_path, kind=kind)
    n = int((~values.isfinite()).sum())
    told = f"{n} of {values.numel()} values are not finite, and not drawn."
    assert (told in figure.chart.notes) == (n > 0)


def test_odd_values_of_a_thousand_bars_leave_the_others(tmp_path: Path) -> None:
    values = torch.ones(1000)
    values[3], values[4] = nan, inf
    figure = drawn(Result(values, ("class",)), tmp_path)
    assert figure.chart.values[0, 0][-1] == 958  # the others, in one bar
    assert "2 of 1000 values are not finite, and not drawn." in figure.chart.notes


@pytest.mark.parametrize("kind", ["heat", "curves", "bars"])
def test_odd_names_are_short_and_apart(kind: str, tmp_path: Path) -> None:
    values, axes = torch.arange(20.0).reshape(2, 10), ("line", "step")
    given = Result(values[0] if kind == "bars" else values, axes[-1:] if kind == "bars" else axes, {"step": NAMES})
    figure = drawn(given, tmp_path, kind=kind)
    names = next(each for each in figure.chart.labels if len(each) == len(NAMES))
    assert len(set(names)) == len(NAMES)
    assert max(map(len, names)) <= 50
    places = json.loads(figure.to_json())["data"][0]
    if kind == "bars":
        assert len(set(places["y"])) == len(NAMES)


def test_a_single_number_is_a_table() -> None:
    assert Result(torch.tensor(3.0), ()).to_dataframe().to_dict("list") == {"value": [3.0]}
