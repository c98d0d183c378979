"""Counts of property cases, for the summary at the end of a run."""

from __future__ import annotations

import functools
import json
from collections.abc import Generator
from typing import Any

import pytest
from prisma_conformance.pytest import COUNTS


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    handle = getattr(getattr(item, "obj", None), "hypothesis", None)
    if handle is None:
        return (yield)
    inner, passed = handle.inner_test, 0

    @functools.wraps(inner)
    def counting(*arguments: Any, **keywords: Any) -> Any:
        nonlocal passed
        result = inner(*arguments, **keywords)
        passed += 1
        return result

    handle.inner_test = counting
    try:
        return (yield)
    finally:
        handle.inner_test = inner
        item.user_properties.append((COUNTS, json.dumps(["property tests", {"properties": 1, "cases": passed}])))
