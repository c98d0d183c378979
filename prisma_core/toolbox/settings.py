"""What a plugin's code may change for everybody while it is imported: what other people's work hangs on."""

from __future__ import annotations

import dis
import gc
import locale
import logging
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch.nn.modules import module as torch_module

from prisma_core.toolbox.screen import aside


def _set_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)  # None: a device of its own slows every call


def _precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set for a backend by itself (torch.backends.cuda.matmul.fp32_precision): torch says no more
        return None


def _set_precision(precision: str | None) -> None:
    if precision is not None:
        torch.set_float32_matmul_precision(precision)


def _in_all_modules() -> dict[str, dict[int, Any]]:
    held = cast("dict[str, Any]", vars(torch_module))
    dicts = [name for name, value in held.items() if "_global_" in name and isinstance(value, dict)]
    return {name: dict(held[name]) for name in dicts if held[name]}


def _set_in_all_modules(before: dict[str, dict[int, Any]]) -> None:
    for name in _in_all_modules() | before:
        hooks = vars(torch_module)[name]
        hooks.clear()
        hooks.update(before.get(name, {}))


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _set_folder(folder: str | None) -> None:
    if folder is not None:
        with suppress(OSError):
            os.chdir(folder)


def _interrupt() -> Any:
    return signal.getsignal(signal.SIGINT)


def _set_interrupt(handler: Any) -> None:
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)


_Settings: TypeAlias = dict[str, tuple[Callable[[], Any], Callable[[Any], object]]]

_OF_NUMBERS: _Settings = {
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (torch.get_default_device, _set_device),
    "whether torch takes gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's autocast on the CPU": (
        lambda: torch.is_autocast_enabled("cpu"),
        lambda on: torch.set_autocast_enabled("cpu", on),
    ),
    "what numpy does about errors": (np.geterr, lambda errors: np.seterr(**errors)),
}

_OF_ALL: _Settings = {
    **_OF_NUMBERS,
    "torch's precision of float32 products": (_precision, _set_precision),
    "whether torch is deterministic": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "the number of torch's threads": (torch.get_num_threads, torch.set_num_threads),
    "what torch runs in all modules": (_in_all_modules, _set_in_all_modules),
    "how deep Python may call": (sys.getrecursionlimit, sys.setrecursionlimit),
    "what Ctrl-C does": (_interrupt, _set_interrupt),
    "what Python does about an error": (lambda: sys.excepthook, lambda hook: setattr(sys, "excepthook", hook)),
    "whether Python frees circles": (gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
    "the folder that relative paths start from": (_folder, _set_folder),
    "the locale": (lambda: locale.setlocale(locale.LC_ALL), lambda name: locale.setlocale(locale.LC_ALL, name)),
    "the level below which nothing is logged": (lambda: logging.root.manager.disable, logging.disable),
    "the level of the root logger": (lambda: logging.root.level, logging.root.setLevel),
    "how long a socket waits": (socket.getdefaulttimeout, socket.setdefaulttimeout),
    "how processes start": (
        lambda: multiprocessing.get_start_method(allow_none=True),
        lambda method: multiprocessing.set_start_method(method, force=True),
    ),
}


@contextmanager
def _kept(settings: _Settings, changed: list[str]) -> Generator[None]:
    before = {name: get() for name, (get, _) in settings.items()}
    try:
        yield
    finally:
        for name, (get, put) in settings.items():
            if (now := get()) != before[name]:
                put(before[name])
                changed.append(f"{name} to {now}")


@contextmanager
def guest(name: str) -> Generator[None]:
    """Run a plugin's code: what numbers hang on is put back, with a warning; what it prints goes to stderr.

    What is not of a thread stays (but the default dtype): another thread of the user's may have changed it.
    """
    changed: list[str] = []
    try:
        with aside(), _kept(_OF_NUMBERS, changed):
            yield
    finally:
        if changed:
            warnings.warn(told(name, changed), stacklevel=4)


def told(name: str, changed: Sequence[str]) -> str:
    """Say what a plugin's code changed."""
    return f"{name} changed {', '.join(changed)}; that was put back. Change it where it is used"


@contextmanager
def kept_settings(changed: list[str]) -> Generator[None]:
    """Put back what a block changes for all, and name it; random numbers and warnings without a word, as imports do.

    Args:
        changed: gets a text for each setting that was another one when the block ended.
    """
    drawn, torch_drawn, numpy_drawn = random.getstate(), torch.get_rng_state(), np.random.get_state()
    filters, variables = list(warnings.filters), dict(os.environ)
    paths, threads = list(sys.path), set(threading.enumerate())
    try:
        with _kept(_OF_ALL, changed):
            yield
    finally:
        random.setstate(drawn)
        torch.set_rng_state(torch_drawn)
        np.random.set_state(numpy_drawn)
        if errors := [one for one in warnings.filters if one[0] == "error" and one not in filters]:
            warnings.filters[:] = [one for one in warnings.filters if one not in errors]  # type: ignore[index]
            changed.append("warnings to errors")
        if lost := [path for path in paths if path not in sys.path]:
            sys.path += lost
            changed.append("where Python finds modules")
        if gone := [name for name in variables if name not in os.environ]:
            os.environ.update({name: variables[name] for name in gone})
            changed.append(f"the environment: {', '.join(gone[:3])}{', ...' if gone[3:] else ''} were taken out")
        alone = sum(not thread.daemon for thread in threads) == 1  # else another thread may have started one
        if alone and any(not thread.daemon for thread in set(threading.enumerate()) - threads):
            changed.append("when Python can leave: it left a thread that is no daemon")


def raised_by_code(problem: BaseException) -> bool:
    """Whether a ``raise`` made an error, and not a signal, which comes between any two instructions."""
    trace = problem.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
