"""What is malformed in a third party's adapter or case is said by its name, by the checks and by the doctor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from prisma_conformance import CHECKS, check, diagnose
from prisma_conformance.run import run_check
from prisma_conformance.subject import Subject
from torch import Tensor

import prisma_core as prisma
from prisma_core import InputError, PluginError, PrismaError, WeightMapError
from prisma_core.plugin import Images, Preprocess

from .mistakes import edited
from .north import CASE, WEIGHTS, NorthAdapter, NorthViT

OURS = Preprocess(size=(12, 12))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"name": None}, r"The name of a case is None; expected text that can be shown"),
        ({"name": "a\x1b[2Jb"}, r"The name of a case is 'a\\x1b\[2Jb'; expected text"),
        ({"skips": ["algebra"]}, r"skips of the case 'north' is \['algebra'\]; expected each check with its reason"),
        ({"skips": {"algebra": ""}}, r"skips of the case 'north' is \{'algebra': ''\}; expected each check"),
    ],
)
def test_a_case_has_a_name_and_reasons(facts: dict[str, Any], words: str) -> None:
    case = replace(CASE, **facts)
    for ask in (check, diagnose):
        with pytest.raises(PluginError, match=words):
            ask(case, adapter=NorthAdapter())


def _fails(*_: object) -> Any:
    raise ZeroDivisionError("nothing there")


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (_fails, r"images of the case 'north' raised ZeroDivisionError: nothing there"),
        (lambda upstream: None, r"images of the case 'north' returned None; expected Images"),
        (lambda upstream: (OURS, _fails), r"images of the case 'north' returned a tuple; expected Images"),
        (lambda upstream: Images(3, _fails), r"returned a int; expected ImagePreprocess"),  # type: ignore[arg-type]
        (
            lambda upstream: Images(OURS, _fails),
            r"the reference of images of the case 'north' raised ZeroDivisionError",
        ),
        (lambda upstream: Images(OURS, lambda image: None), r"The reference of .* returned None; expected Tensor"),
        (
            lambda upstream: Images(OURS, lambda image: torch.ones(3)),
            r"returned \[3\]; expected \[channel height width\]",
        ),
    ],
)
def test_images_that_are_none_fail_one_check_in_words(images: Any, words: str) -> None:
    subject = Subject(replace(CASE, images=images), NorthAdapter(), NorthViT(), seed=1)
    result = run_check(CHECKS["preprocess"], subject)
    assert not result.passed
    answer = str(diagnose(subject.case, adapter=NorthAdapter()))
    for said in (result.detail, answer):
        assert re.search(f"(?i){words}", said), said


@pytest.mark.parametrize(
    ("ignored", "words"),
    [
        (["*"], r"NorthAdapter\.ignored returned a list; expected Mapping"),
        ({"*": ""}, r"NorthAdapter\.ignored gives no reason for '\*'"),
        ({"SelfAttention.heads": "  "}, r"gives no reason for 'SelfAttention\.heads'"),
        ({"SelfAttention.heads": 3}, r"gives no reason for 'SelfAttention\.heads'"),
    ],
)
def test_whatever_is_ignored_has_a_reason(ignored: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NorthAdapter, "ignored", ignored)
    result = run_check(CHECKS["spec.audit"], Subject(CASE, NorthAdapter(), NorthViT(), seed=1))
    assert not result.passed
    assert re.search(words, result.detail), result.detail


@pytest.mark.parametrize("types", [None, "north.NorthViT", (NorthViT,), f"{NorthViT.__module__}.NorthViT"])
def test_types_are_a_tuple_of_names_for_an_adapter_given_by_hand(types: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NorthAdapter, "types", types)
    words = r"^NorthAdapter\.types is .*; expected a tuple: types = \('"
    with pytest.raises(InputError, match=words):
        prisma.adapt(NorthViT(), adapter=NorthAdapter())
    with pytest.raises(PrismaError, match=words):
        check(CASE, adapter=NorthAdapter())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_a_function_of_the_weight_table_makes_real_numbers(dtype: torch.dtype) -> None:
    table = edited(
        WEIGHTS, {"norm.weight                  ->  ln_final.weight": "norm.weight -> ln_final.weight : {cast}"}
    )
    functions: Mapping[str, Any] = {"cast": lambda x: x.to(dtype)}
    with pytest.raises(WeightMapError, match=rf"ln_final\.weight: expected real numbers, got {dtype}"):
        prisma.adapt(NorthViT(), adapter=NorthAdapter(table, functions=functions))


def test_an_output_that_is_another_than_its_place_is_named_as_one() -> None:
    class Another(NorthAdapter):
        def output(self, result: Any) -> Tensor:
            return super().output(result)[:1]

    hooks = NorthAdapter().tables[1] + "    head -> hook_logits"
    answer = str(diagnose(CASE, adapter=Another(hooks=hooks)))
    assert "what call() or output() of the adapter returns is another" in answer
    assert "times 1" not in answer


def test_a_function_that_edits_upstream_is_told_to_take_a_copy() -> None:
    table = edited(
        WEIGHTS, {"norm.weight                  ->  ln_final.weight": "norm.weight -> ln_final.weight : {edit}"}
    )
    adapter = NorthAdapter(table, functions={"edit": lambda x: x.data.mul_(2)})
    answer = str(diagnose(CASE, adapter=adapter))
    assert "adapting changed upstream's norm.weight" in answer
    assert "the adapter changes upstream, in a method or in a function of its tables: take copies there" in answer
