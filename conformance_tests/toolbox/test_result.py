"""Results: axes, labels, selections, files and tables."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from prisma_core import InputError, LoadError, Result, UnknownName


@pytest.fixture
def result() -> Result:
    values = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = {"layer": ("L0", "L1"), "class": ("cat", "dog", "emu", "fox")}
    more = {"constant": torch.randn(4)}
    return Result(values, ("layer", "head", "class"), labels, "patch", "logits", "clean", tensors=more, facts={"k": 1})


def test_values_carry_no_graph(result: Result) -> None:
    assert not result.values.requires_grad


def test_places_are_chosen_by_label_and_by_index(result: Result) -> None:
    assert torch.equal(result.sel(layer="L1", **{"class": "emu"}).values, result.values[1, :, 2])
    part = result.sel(head=-1, layer=[1, "L0"])
    assert part.axes == ("layer", "class")
    assert part.labels["layer"] == ("L1", "L0")
    assert torch.equal(part.values, result.values[[1, 0], 2])


@pytest.mark.parametrize(
    ("places", "fact"),
    [({"lyer": 0}, "Did you mean layer"), ({"class": "dig"}, "Did you mean dog"), ({"head": 3}, "0 to 2")],
)
def test_a_place_that_is_not_there_is_named(result: Result, places: dict[str, int | str], fact: str) -> None:
    with pytest.raises(UnknownName, match=fact):
        result.sel(**places)


def test_the_largest_come_with_their_labels(result: Result) -> None:
    (place, value), *_ = result.top(3)
    at = int(result.values.abs().argmax())
    layer, head, kind = at // 12, at // 4 % 3, at % 4
    assert place == (f"L{layer}", str(head), result.labels["class"][kind])
    assert value == pytest.approx(result.values.flatten()[at].item())
    assert result.top(1, by_size=False)[0][1] == pytest.approx(result.values.max().item())


def test_a_file_gives_it_back(result: Result, tmp_path: Path) -> None:
    again = Result.load(result.save(tmp_path / "deep" / "result.safetensors"))
    assert torch.equal(again.values, result.values)
    assert torch.equal(again.tensors["constant"], result.tensors["constant"])
    about = ("axes", "labels", "technique", "unit", "baseline", "total", "facts")
    assert [getattr(again, name) for name in about] == [getattr(result, name) for name in about]
    torch.save({"values": result.values}, tmp_path / "other.safetensors")
    with pytest.raises(LoadError):
        Result.load(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"\.safetensors"):
        result.save(tmp_path / "result.json")


def test_a_disk_that_refuses_leaves_the_file_that_was_there(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = result.save(tmp_path / "result.safetensors")
    before = path.read_bytes()

    def refuse(tensors: object, place: Path, metadata: object = None) -> None:
        Path(place).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("prisma_core.files.checkpoint.save_file", refuse)
    with pytest.raises(LoadError, match="No space left"):
        result.sel(layer=0).save(path)
    assert path.read_bytes() == before


def test_an_xarray_has_the_same_axes_labels_and_words(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xarray", SimpleNamespace(DataArray=lambda values, **rest: (values, rest)))
    values, rest = result.to_xarray()
    assert torch.equal(torch.from_numpy(values), result.values)
    assert rest["dims"] == ("layer", "head", "class")
    assert rest["coords"] == {"layer": ["L0", "L1"], "class": ["cat", "dog", "emu", "fox"]}
    assert rest["attrs"] == {"technique": "patch", "unit": "logits", "baseline": "clean", "total": ""}


def test_axes_and_labels_must_fit() -> None:
    with pytest.raises(InputError, match="name for each axis"):
        Result(torch.zeros(2, 3), ("layer",))
    with pytest.raises(InputError, match="2 places and 1 labels"):
        Result(torch.zeros(2), ("layer",), {"layer": ("a",)})


def test_it_prints_short_and_escapes_labels(result: Result) -> None:
    assert len(repr(result).splitlines()) <= 12
    hostile = Result(torch.ones(1), ("class",), {"class": ("<i>cat",)})
    assert "<i>cat" not in hostile._repr_html_()


def test_tables_of_other_libraries(result: Result) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = result.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    row = frame[(frame.layer == "L1") & (frame["head"] == "2") & (frame["class"] == "fox")]
    assert row.value.item() == pytest.approx(result.values[1, 2, 3].item())
