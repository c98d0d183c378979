"""Fixtures and options of all tests: tiny models, a fake device, a hub on loopback, no network."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import fake_device
from hypothesis import HealthCheck, settings
from loopback import Hub, serving
from models import image, in_float64, make, variant, vit  # noqa: F401  # fixtures of every room

from prisma_core import host

# Workers share the cores, and the models are tiny: more threads only wait for each other, in processes of tests too.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# On a slow machine a plugin's import can take longer than a user is left without a word; tests compare what is written.
host.PATIENCE = 600.0

# No deadline: how long a case takes is the machine's business. Building a model is slow beside drawing a number.
COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.register_profile("quick", COMMON, max_examples=25, derandomize=True, database=None)
settings.register_profile("long", COMMON, max_examples=1000)
settings.load_profile("quick")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-field",
        action="store_true",
        help="fuzz/test_hf_fields.py: every value of every field; slow",
    )


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The fake device."""
    with fake_device() as place:
        yield place


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """What one test compiled is not what the next one meets: graphs are shared by all models of a class."""
    yield
    compiler: Any = sys.modules.get("torch._dynamo")
    if compiler is not None and compiler.utils.counters["frames"]:
        compiler.reset()
        compiler.utils.counters.clear()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to open a socket fails the test."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a network call")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


@pytest.fixture
def loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, with a cache of its own."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="the hub's library is not installed")
    for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with serving(tmp_path / "hub") as hub:
        (tmp_path / "hub").mkdir()
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield hub
