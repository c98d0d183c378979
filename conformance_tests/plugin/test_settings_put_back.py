"""What a plugin's code changes for everybody while it is imported is put back, and told by the plugin's name."""

from __future__ import annotations

import gc
import locale
import logging
import multiprocessing
import operator
import os
import random
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from prisma_core.contract.source import Loaded, ModelInfo, Source
from prisma_core.host import Host
from prisma_core.zoo import load_upstream

Found = Callable[..., EntryPoint]


def _error_of(found: Found, change: Callable[[], object]) -> str:
    """Run code as a plugin's, beside a plugin that changes nothing, and return what is said of the first."""

    def sources() -> list[Source]:
        change()
        return []

    host = Host([found("bad", prisma_sources=sources), found("fine", prisma_sources=lambda: [])])
    assert host.infos["fine"].error is None
    return host.infos["bad"].error or ""


def _state() -> dict[str, Any]:
    """What other people's code sees."""
    return {
        "dtype": torch.ones(1).dtype,
        "device": torch.ones(1).device,
        "gradients": torch.ones(1, requires_grad=True).exp().requires_grad,
        "products": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "doubled": _passed(),
        "depth": sys.getrecursionlimit(),
        "numpy": np.geterr(),
        "paths": list(sys.path),
        "errors": [one for one in warnings.filters if one[0] == "error"],
        "ctrl-c": signal.getsignal(signal.SIGINT),
        "hook": sys.excepthook,
        "collects": gc.isenabled(),
        "folder": os.getcwd(),
        "locale": locale.setlocale(locale.LC_ALL),
        "logged": [level for level in (10, 20, 30, 40) if logging.getLogger("a user's").isEnabledFor(level)],
        "waits": socket.socket().gettimeout(),
        "processes": multiprocessing.get_start_method(allow_none=True),
        "home": os.environ.get("HOME"),
    }


def _passed() -> float:
    return float(torch.nn.Identity()(torch.ones(1)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: torch.set_default_dtype(torch.float64), "it changed torch's default dtype to torch.float64; that was"),
        (lambda: torch.set_default_device("meta"), "torch's default device to meta"),
        (lambda: torch.set_grad_enabled(False), "whether torch takes gradients to False"),
        (lambda: torch.set_float32_matmul_precision("medium"), "torch's precision of float32 products to medium"),
        (lambda: torch.use_deterministic_algorithms(True), "whether torch is deterministic to True"),
        (lambda: torch.set_autocast_enabled("cpu", True), "torch's autocast on the CPU to True"),
        (
            lambda: register_module_forward_hook(lambda module, args, output: output * 2),
            "what torch runs in all modules to {'_global_forward_hooks': {",
        ),
        (lambda: sys.setrecursionlimit(5_000), "how deep Python may call to 5000"),
        (lambda: np.seterr(all="raise"), "what numpy does about errors to {'divide': 'raise'"),
        (lambda: warnings.simplefilter("error"), "it changed warnings to errors"),
        (lambda: operator.setitem(sys.path, slice(None), []), "it changed where Python finds modules"),
        (lambda: signal.signal(signal.SIGINT, lambda number, frame: None), "what Ctrl-C does to"),
        (lambda: setattr(sys, "excepthook", print), "what Python does about an error to <"),
        (gc.disable, "whether Python frees circles to False"),
        (lambda: os.chdir("/"), "the folder that relative paths start from to /;"),
        (lambda: locale.setlocale(locale.LC_ALL, "C.UTF-8"), "the locale to C.UTF-8"),
        (logging.disable, "the level below which nothing is logged to 50"),
        (lambda: logging.getLogger().setLevel(1), "the level of the root logger to 1"),
        (lambda: socket.setdefaulttimeout(0.1), "how long a socket waits to 0.1"),
        (lambda: multiprocessing.set_start_method("spawn", force=True), "how processes start to spawn"),
        (lambda: os.environ.pop("HOME"), "the environment: HOME were taken out"),
    ],
)
def test_settings_of_everybody_are_put_back_and_told(
    found: Found, change: Callable[[], object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home")
    before = _state()
    assert words in _error_of(found, change)
    assert _state() == before


def test_a_hook_of_all_modules_that_was_there_stays(found: Found) -> None:
    handle = register_module_forward_hook(lambda module, args, output: output * 3)
    try:
        assert _error_of(found, torch.nn.modules.module._global_forward_hooks.clear).startswith("prisma_sources: it")
        assert _passed() == 3
    finally:
        handle.remove()
    assert _passed() == 1


def test_a_precision_that_torch_does_not_tell_is_no_error(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch raises where a backend's own precision was set."""

    def untold() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", untold)
    assert not _error_of(found, lambda: None)


def test_random_numbers_do_not_hang_on_plugins(found: Found) -> None:
    def seed(number: int) -> None:
        for function in (torch.manual_seed, random.seed, np.random.seed):
            function(number)

    seed(7)
    expected = torch.rand(1), random.random(), np.random.rand()
    seed(7)
    assert not _error_of(found, lambda: seed(0))
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


@pytest.mark.parametrize("others", [False, True], ids=["nothing else runs", "another thread may have started it"])
def test_a_thread_that_keeps_python_from_leaving_is_told(
    found: Found, monkeypatch: pytest.MonkeyPatch, others: bool
) -> None:
    earlier = {thread for thread in threading.enumerate() if thread is not threading.current_thread()}
    enumerate_threads = threading.enumerate  # without what other tests left running
    monkeypatch.setattr(threading, "enumerate", lambda: [one for one in enumerate_threads() if one not in earlier])
    done = threading.Event()
    if others:
        threading.Thread(target=done.wait).start()
    error = _error_of(found, threading.Thread(target=done.wait).start)
    done.set()
    assert ("it left a thread that is no daemon" in error) == (not others)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: torch.set_default_dtype(torch.float64), "Late changed torch's default dtype to torch.float64; that"),
        (lambda: torch.set_default_device("meta"), "Late changed torch's default device to meta; that"),
        (lambda: torch.set_grad_enabled(False), "Late changed whether torch takes gradients to False; that"),
        (lambda: torch.set_autocast_enabled("cpu", True), "Late changed torch's autocast on the CPU to True; that"),
        (lambda: np.seterr(all="raise"), "Late changed what numpy does about errors to"),
    ],
)
def test_what_numbers_hang_on_is_put_back_when_a_model_is_loaded(change: Callable[[], object], words: str) -> None:
    class Late(Source):
        name = "late"

        def load(self, rest: str, **options: Any) -> Loaded:
            change()
            return Loaded(torch.nn.Linear(1, 1, device="cpu"))

        def models(self) -> Iterator[ModelInfo]:
            yield from ()

    before = _state()
    with pytest.warns(UserWarning, match=words):
        load_upstream(Late(), "one")
    assert _state() == before
