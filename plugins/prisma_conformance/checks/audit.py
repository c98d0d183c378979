"""Audit of facts: every attribute of upstream's modules is read, or ignored with a reason."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from typing import cast

from torch import nn

from prisma_conformance.finding import Finding
from prisma_conformance.subject import Subject, reader_of
from prisma_core.plugin import Adapter, PluginError, WeightMap, qualified_name, returned

# Attributes of torch's own modules that the shapes of the weights imply, or that do nothing in evaluation.
HARMLESS: Mapping[str, frozenset[str]] = {
    "Linear": frozenset({"in_features", "out_features"}),
    "NonDynamicallyQuantizableLinear": frozenset({"in_features", "out_features"}),
    "Embedding": frozenset({"num_embeddings", "embedding_dim", "sparse", "scale_grad_by_freq"}),
    "LayerNorm": frozenset({"normalized_shape", "elementwise_affine"}),
    "RMSNorm": frozenset({"normalized_shape", "elementwise_affine"}),
    "Dropout": frozenset({"p", "inplace"}),
    "SiLU": frozenset({"inplace"}),
    "ReLU": frozenset({"inplace"}),
    "Conv1d": frozenset({"in_channels", "out_channels", "kernel_size", "transposed", "output_padding"}),
    "Conv2d": frozenset({"in_channels", "out_channels", "kernel_size", "transposed", "output_padding"}),
    "Conv3d": frozenset({"in_channels", "out_channels", "kernel_size", "transposed", "output_padding"}),
}
_NOTHING = (nn.Identity, nn.Dropout, nn.ModuleList, nn.Sequential, nn.ModuleDict)


def audit(subject: Subject) -> Finding:
    """List the attributes and parameterless modules that the adapter neither reads nor ignores."""
    reader, upstream = reader_of(subject)
    record = reader.record
    stem = subject.adapter.stem(reader, subject.spec)
    opaque = {id(part) for part in stem.modules()} if stem is not None else set[int]()
    ignored = _reasons(subject.adapter)
    for part in subject.adapter.parts(reader):
        ignored |= _reasons(part)
    apart = _ignored_modules(upstream, subject.adapter.weights(reader, subject.spec))
    problems: dict[str, list[str]] = {}  # by class, attribute and value: where
    n_attributes = 0
    for path, module in cast("Iterator[tuple[str, nn.Module]]", upstream.named_modules()):
        if id(module) in opaque or any(path == part or path.startswith(f"{part}.") for part in apart):
            continue  # upstream's own code runs there, or nothing of it is mapped
        for name in _attributes(module):
            n_attributes += 1
            if f"{path}.{name}".lstrip(".") not in record and not _excused(module, name, ignored):
                problems.setdefault(_say(module, name, f" = {vars(module)[name]!r}"), []).append(path)
        for name, child in module.named_children():
            read = id(child) in opaque or _visited(f"{path}.{name}".lstrip("."), record)
            if _matters(child) and not read and not _excused(module, name, ignored):
                problems.setdefault(_say(module, name, f" ({type(child).__name__})"), []).append(path)
    said = tuple(f"{what}{_at(paths)} is neither read nor ignored with a reason" for what, paths in problems.items())
    return Finding(problems=said, detail=f"{n_attributes} attributes, {len(record)} paths read")


def _reasons(adapter: Adapter) -> dict[str, str]:
    """What an adapter ignores, each with its reason.

    Raises:
        PluginError: it is no mapping, or there is no reason.
    """
    name = f"{type(adapter).__name__}.ignored"
    ignored = cast("Mapping[object, object]", returned(name, cast("object", adapter.ignored), Mapping))
    if bare := [key for key, why in ignored.items() if not isinstance(why, str) or not why.strip()]:
        raise PluginError(f"{name} gives no reason for {bare[0]!r}: say why it does not matter.")
    return {str(key): str(why) for key, why in ignored.items()}


def _ignored_modules(upstream: nn.Module, table: WeightMap) -> list[str]:
    """Paths of modules all of whose weights the map ignores, with the reason that it gives."""
    paths: list[str] = []
    for path, module in cast("Iterator[tuple[str, nn.Module]]", upstream.named_modules()):
        names = [f"{path}.{name}" for name in module.state_dict()]
        if path and names and all(table.reason_to_ignore(name) is not None for name in names):
            paths.append(path)
    return paths


def _attributes(module: nn.Module) -> Iterator[str]:
    for name in vars(module):
        if not name.startswith("_") and name not in ("training", "call_super_init", "dump_patches"):
            yield name


def _matters(child: nn.Module) -> bool:
    # A module with weights shows in the weight map; one without changes numbers unseen unless its type is read.
    return not isinstance(child, _NOTHING) and not any(True for _ in child.parameters())


def _visited(path: str, record: set[str]) -> bool:
    return path in record or any(entry.startswith(f"{path}.") for entry in record)


def _excused(module: nn.Module, name: str, ignored: Mapping[str, str]) -> bool:
    if type(module).__module__.startswith("torch.nn.") and name in HARMLESS.get(type(module).__name__, ()):
        return True
    kinds = [kind.__name__ for kind in type(module).__mro__ if kind is not nn.Module]
    return any(fnmatch.fnmatchcase(f"{kind}.{name}", pattern) for kind in kinds for pattern in ignored)


def _say(module: nn.Module, name: str, what: str) -> str:
    return f"{qualified_name(module)}.{name}{what[:60]}"


def _at(paths: list[str]) -> str:
    if paths == [""]:
        return ""
    return f" at {paths[0]!r}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


__all__ = ["HARMLESS", "audit"]
