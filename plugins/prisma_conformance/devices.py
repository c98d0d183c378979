"""Devices of checks: the device, its name in a certificate, and its kernels."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch

from prisma_core.errors.arguments import several
from prisma_core.plugin import InputError

T = TypeVar("T")
HALF = (torch.bfloat16, torch.float16)


def dtypes(given: Iterable[torch.dtype | str] | torch.dtype | str | None) -> tuple[torch.dtype, ...]:
    """Return dtypes given by name or as torch's, each once.

    Raises:
        InputError: one is no dtype that a model can run in besides float64.
    """
    if given is None:
        return ()
    alone = isinstance(given, torch.dtype | str)
    asked = [given] if alone else several(given, "dtypes to compare in, by name or as torch's")
    known = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, *HALF)}
    names = [str(one).removeprefix("torch.") for one in asked]
    for name in names:
        if name not in known:
            raise InputError(f"Expected a dtype to compare in besides float64, {', '.join(known)}; got {name!r}.")
    return tuple(dict.fromkeys(known[name] for name in names))


@contextmanager
def exact() -> Generator[None]:
    """Run float32 in float32 on a GPU, on kernels that give the same bits each time; and put back what was set.

    TensorFloat-32, which torch lets convolutions use unless it is told otherwise, keeps three digits: both sides would
    err by that, and a mistake that is smaller could not be seen.
    """
    cudnn: Any = torch.backends.cudnn
    cpu: Any = torch.backends.mkldnn
    # Each is set by an old name and by new ones, and torch refuses to read the old one where they disagree.
    new: list[Any] = [torch.backends.cuda.matmul, cpu.matmul, cudnn.conv, cudnn.rnn]
    before: list[str] = [part.fp32_precision for part in new]
    products = _old(torch.get_float32_matmul_precision, "highest")
    convolutions = _old(lambda: bool(cudnn.allow_tf32), True)
    kernels = cudnn.benchmark, cudnn.deterministic
    try:
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
        for part in new:
            part.fp32_precision = "ieee"
        cudnn.benchmark, cudnn.deterministic = False, True
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        cudnn.allow_tf32 = convolutions
        cudnn.benchmark, cudnn.deterministic = kernels
        for part, precision in zip(new, before, strict=True):
            part.fp32_precision = precision


def _old(read: Callable[[], T], default: T) -> T:
    try:
        return read()
    except RuntimeError:
        return default


@cache
def machine(device: str) -> str:
    """Return a GPU's name with the versions of what drives it; nothing for a CPU, whose name explains no number."""
    if torch.device(device).type != "cuda":
        return ""
    words = [torch.cuda.get_device_name(device)]
    words += [f"CUDA {torch.version.cuda}"] if torch.version.cuda else [f"HIP {torch.version.hip}"]
    words += [f"cuDNN {torch.backends.cudnn.version()}"] if torch.backends.cudnn.is_available() else []
    return ", ".join([*words, *_driver(), platform.system()])


def _driver() -> list[str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):  # then the certificate says less
        return []
    found = re.search(r"\d+(\.\d+)+", told)
    return [f"driver {found[0]}"] if found else []


__all__ = ["HALF", "dtypes", "exact", "machine"]
