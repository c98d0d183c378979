"""Readers: what was read, what is refused, and containers with repeated parts."""

from __future__ import annotations

import pytest
from torch import nn

from prisma_core import UnsupportedArchitecture
from prisma_core.plugin import Reader


def upstream() -> nn.Sequential:
    linear = nn.Linear(2, 2, bias=False)
    return nn.Sequential(linear, nn.GELU(approximate="tanh"), linear)


def test_what_is_asked_for_counts_as_read() -> None:
    reader = Reader(upstream())
    assert reader[0].get("in_features", 7) == 2
    assert reader[0].get("width", 7) == 7
    assert not reader[0].has("bias")
    assert reader[1].has("approximate")
    assert reader.record == {"0.in_features", "0.bias", "1.approximate"}
    assert reader.latest[1:] == ["in_features", 2]


def test_parts_are_counted_as_often_as_they_are_used() -> None:
    reader = Reader(upstream())
    assert len(reader) == 3
    assert [part.path for part in reader] == ["0", "1", "2"]
    assert reader[-1].path == "2"
    assert reader[-3].path == "0"
    for index in (3, -4):
        with pytest.raises(UnsupportedArchitecture, match=f"3 parts: there is no number {index}"):
            reader[index]


def test_a_part_is_true_where_it_is_so_upstream() -> None:
    """An adapter may say ``norm(upstream.norm) if upstream.norm else None``."""
    parts = (nn.LayerNorm(2), nn.GELU(), nn.Identity(), nn.Sequential(), nn.Sequential(nn.GELU()), None)
    model = nn.Module()
    for number, part in enumerate(parts):
        setattr(model, f"part{number}", part)
        assert bool(getattr(Reader(model), f"part{number}")) == bool(part), part


def test_a_class_is_recognised_by_its_name_alone() -> None:
    reader = Reader(upstream())
    assert reader[1].expect(approximate="tanh").path == "1"
    assert not reader.classes
    assert not reader[0].is_a("Conv2d", "acme.Linear")
    assert reader[0].of_class({"acme.Linear": 1}) is None
    assert reader[1].expect("GELU", approximate="tanh").is_a("torch.nn.modules.activation.GELU")
    assert reader[2].of_class({"torch.nn.modules.linear.Linear": 1}) == 1
    assert reader.classes == {"1", "2"}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (lambda reader: reader[0].expect("Conv2d"), r"Linear at '0' is not supported: expected a Conv2d here"),
        (lambda reader: reader[0].expect(out_features=3), r"at '0' .*: out_features=2, expected 3"),
        (lambda reader: reader[1].expect("GELU", approximate="none"), r"approximate='tanh', expected 'none'"),
        (lambda reader: reader[0].width, r"at '0' .*: no attribute 'width' \(another version\?\)"),
        (lambda reader: reader.width, r"^torch\.nn\.modules\.container\.Sequential is not supported: no attribute"),
    ],
)
def test_what_is_not_as_expected_is_refused(asked: object, words: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=words):
        asked(Reader(upstream()))  # type: ignore[operator]
