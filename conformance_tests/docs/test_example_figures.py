"""The figures of the docs are what their examples draw, and a changed result is seen."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from docs_folder import script

NO_FIGURE = {
    "prisma_sae.naming": "returns names",
    "prisma_sae.training": "returns coders; evaluate draws how good they are",
    "prisma_view.gallery_units": "draws pages: how-to-gallery.md",
}


figures = script("figures")


def test_every_technique_has_a_figure_or_a_reason() -> None:
    every = {one.module for one in script("techniques").techniques()}
    assert set(figures.names()) == every - set(NO_FIGURE)
    assert set(NO_FIGURE) <= every
    stored = {path.stem: path.stat().st_size for path in figures.FIGURES.glob("*.png")}
    assert set(stored) == set(figures.names())
    assert max(stored.values()) < 60_000, "images of the docs are small"


@pytest.mark.parametrize("name", figures.names())
def test_an_example_draws_its_figure(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "prisma_lens.bridge":
        pytest.importorskip("captum")
    if not (release := version("matplotlib")).startswith(f"{figures.DRAWN_WITH}."):
        pytest.skip(f"the figures were drawn with matplotlib {figures.DRAWN_WITH}, and here is {release}")
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    chart = figures.run(name).chart
    stored = figures.stored(name)
    assert figures.alike(figures.drawn(chart), stored), f"python docs/figures.py {name} draws it anew: look at it"
    values = np.array(chart.values)
    moved = dataclasses.replace(chart, values=values[..., ::-1, ::-1].copy())
    assert not figures.alike(figures.drawn(moved), stored), "a result turned around is not seen in the figure"
