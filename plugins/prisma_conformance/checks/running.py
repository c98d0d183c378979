"""Preprocessing, saving, threads and compiling."""

from __future__ import annotations

import tempfile
import threading

import torch
from torch import Tensor

from prisma_conformance import tolerances
from prisma_conformance.finding import Finding
from prisma_conformance.measure import worst
from prisma_conformance.subject import Subject, opaque_stems
from prisma_core import HookContext, ZooModel, load, save, tensors_of
from prisma_core.plugin import Hook, HookMapping, NotApplicable, probe


def preprocess(subject: Subject) -> Finding:
    """Compare preprocessing with upstream's own transform, on images of five sizes."""
    images = subject.images()
    if images is None:
        raise NotApplicable("the case names no transform of upstream's own")
    ours, reference = images
    errors: dict[str, float] = {}
    height, width = ours(probe(61, 43)).shape[-2:]  # the model's size
    # Upright and lying, smaller and larger than that: resizing differs in each.
    for size in ((61, 43), (43, 61), (300, 517), (640, 480), (width, height)):
        image = probe(*size, seed=subject.seed)
        errors["x".join(map(str, size))] = worst(ours(image)[0], reference(image), unit=1.0)
    where = max(errors, key=lambda key: errors[key])
    # Both divide bytes in float32; one step of a byte would be 4e-3.
    problems = [f"an image of {size} differs by {error:.1e}" for size, error in errors.items() if not error <= 1e-5]
    return Finding(errors[where], 1e-5, tuple(problems), f"{len(errors)} images, worst {where}")


@torch.no_grad()
def save_load(subject: Subject) -> Finding:
    """Save the model into a folder, load it, and compare."""
    model = subject.pair().model
    if opaque_stems(model):
        raise NotApplicable("the stem is upstream's own module, which a file of facts and weights cannot hold")
    inputs = subject.inputs()
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        loaded = load(f"file:{folder}")
    assert isinstance(loaded, ZooModel)
    problems = [] if loaded.spec == model.spec else ["the spec comes back changed"]
    tensors = tensors_of(loaded.to(subject.device))
    for name, tensor in tensors_of(model).items():
        if name not in tensors or tensors[name].dtype != tensor.dtype or not torch.equal(tensors[name], tensor):
            problems.append(f"{name} comes back changed")
    # The weights are the same to the bit; the memory alignment of a file's bytes decides how sums are vectorised.
    error = worst(loaded(*inputs), model(*inputs))
    if not error <= tolerances.FLOAT64:
        problems.append(f"the logits come back changed by {error:.1e}")
    return Finding(error, tolerances.FLOAT64, tuple(problems), f"{len(tensors)} tensors")


@torch.no_grad()
def threads(subject: Subject) -> Finding:
    """Run one model in two threads at the same time, each with its own hook."""
    model, inputs = subject.fresh_model(), subject.inputs()
    name = next(name for name in model.hook_points() if name.endswith("blocks.0.hook_resid_post"))
    alone = [model.run_with_hooks(*inputs, hooks={name: _times(factor)}) for factor in (0.5, 2.0)]
    clean = model(*inputs)
    logits: list[list[Tensor]] = [[], []]
    failures: list[BaseException] = []
    meet = threading.Barrier(2, timeout=60)

    def work(index: int, factor: float) -> None:
        def hook(x: Tensor, at: HookContext) -> Tensor:
            meet.wait()  # both are inside a pass of the same model now
            return x * factor

        try:
            with torch.no_grad():
                for _ in range(3):
                    logits[index].append(model.run_with_hooks(*inputs, hooks={name: hook}))
        except Exception as problem:  # noqa: BLE001  # reported by the thread that started this one
            failures.append(problem)
            meet.abort()

    workers = [threading.Thread(target=work, args=(i, factor)) for i, factor in enumerate((0.5, 2.0))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    problems = [f"a thread failed: {type(failure).__name__}: {failure}" for failure in failures]
    for index, outputs in enumerate(logits):
        if not all(torch.equal(output, alone[index]) for output in outputs):
            problems.append(f"thread {index} sees what another thread's hooks do")
    if not torch.equal(model(*inputs), clean):
        problems.append("hooks of a finished thread stay on the model")
    return Finding(problems=tuple(problems), detail="three passes in each of two threads")


def _times(factor: float) -> Hook:
    def hook(x: Tensor, at: HookContext) -> Tensor:
        return x * factor

    return hook


@torch.no_grad()
def compiled(subject: Subject) -> Finding:
    """Compare a compiled model with the eager one: plain, with a cache and with a hook."""
    model, inputs = subject.pair(torch.float32).model, subject.inputs(dtype=torch.float32)
    torch.compiler.reset()
    fast = torch.compile(model, fullgraph=True)
    names = ["*blocks.*.hook_resid_post", "*blocks.*.attn.hook_pattern"]  # with a fused kernel and without
    edit: HookMapping = {"*blocks.0.hook_resid_post": _times(0.5)}
    errors = {"logits": worst(fast(*inputs), model(*inputs))}
    eager, reference = model.run_with_cache(*inputs, names=names)
    with model.caching(names) as cache:
        errors["logits while caching"] = worst(fast(*inputs), eager)
    common = [name for name in reference if name in cache.store]
    errors |= {f"cached {name}": worst(cache.store[name], reference.store[name]) for name in common}
    problems = [f"the compiled model does not cache {name}" for name in reference if name not in cache.store]
    with model.hooks(edit):
        edited = fast(*inputs)
    errors["edited logits"] = worst(edited, model.run_with_hooks(*inputs, hooks=edit))
    errors["logits after the scope"] = worst(fast(*inputs), model(*inputs))
    if torch.equal(edited, fast(*inputs)):
        problems.append("the compiled model ignores an edit")
    # The compiler fuses and reorders in float32; an ignored hook shows at 1e-1.
    where = max(errors, key=lambda key: errors[key])
    if not errors[where] <= 2e-5:
        problems.append(f"{where} differ by {errors[where]:.1e}")
    return Finding(errors[where], 2e-5, tuple(problems), f"{len(errors)} comparisons, worst {where}")


__all__ = ["compiled", "preprocess", "save_load", "threads"]
