"""Behaviour of an upstream module that no tensor and no attribute shows: a canonical form would leave it out.

That is hooks, of a module or global; functions that stand in the place of a library's own, on an instance, a class or
in a module; attention functions of the user's; tensors of classes of their own; and modules whose class the adapter has
not recognised. One check for all adapters: none calls it, and none can skip it.

Harmless, and passed: wrappers that change no number (accelerate's that move tensors, ``torch.compile``).
"""

from __future__ import annotations

import itertools
import re
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from prisma_core.errors import describe, qualified_name
from prisma_core.inputs.checks import foreign_mode
from prisma_core.maps.reader import TORCH, Reader
from prisma_core.maps.table import pattern_of
from prisma_core.maps.weights import WeightMap
from prisma_core.model import tensors_of
from prisma_core.spec import AnySpec, AttentionSpec, EmbedSpec
from prisma_core.spec.layout import TokenLayout
from prisma_core.upstream.replaced import (
    HOOKS,
    WALKS,
    foreign_in,
    functions_of,
    is_checkpointing,
    name_of,
    names_in,
    replaced_on_class,
    replaced_on_instance,
    root_of,
)

READ_ONLY = ("transformers.utils.output_capturing.",)  # modules of hooks that keep what they are shown
# transformers' hook that asks for gradients by the embeddings, where activations are checkpointed
ASKS_FOR_GRADIENTS = "enable_input_require_grads.<locals>.make_inputs_require_grads"
EAGER = (None, "eager")
# torch's own classes that compute nothing in evaluation, or all that their tensors say
SAID = {
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict),
    *(nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear),
}
TENSORS = (Tensor, nn.Parameter)
FAKE = "torch._subclasses."  # tensors without data
WRAPPERS = {  # where each holds what it wraps
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
}
# Sizes that modules carry as plain numbers beside their tensors, by the names that libraries give them. An adapter
# reads each in one place, and upstream's code may read it in another: heads that were pruned, a patch size set since.
HEADS = ("num_heads", "num_attention_heads", "num_kv_heads", "num_key_value_heads", "n_heads", "n_head", "heads")
WIDTHS = ("head_dim", "attention_head_size", "head_size", "head_width")
T = TypeVar("T")


def check_undeclared(
    upstream: Reader,
    spec: AnySpec,
    types: Iterable[str],
    ignored: Iterable[str],
    table: WeightMap,
    stem: nn.Module | None = None,
) -> None:
    """Refuse a module that does more than its tensors and attributes say.

    Args:
        upstream: the reader that the adapter has read the module with.
        spec: what the adapter has read.
        types: qualified names of the classes that the adapter takes. It knows what stands beside them, and beside the
            classes that the reader recognised, in the same file: all classes there that derive from no other.
        ignored: what the adapter ignores with a reason. A qualified name is that of a class which computes nothing.
        table: what it has mapped. Modules of tensors alone that it ignores, with a reason, make no number.
        stem: what is copied as it is, so that nothing in it is lost.

    Raises:
        UnsupportedArchitecture: it names the module, and what to do.
    """
    whole = upstream.module
    parts = list(_tree(whole))
    recognised = {whole, *(module for path, module in parts if path in upstream.classes)}
    files = {name.rpartition(".")[0] for name in (*types, *map(qualified_name, recognised))}
    packages = {root_of(file) for file in files}
    copied = set[nn.Module]() if stem is None else set(stem.modules())
    mapped = [pattern_of(name) for row in table.rows for name in row.names]
    unread = _unread(parts, table, mapped)
    sizes = _sizes_of(spec)
    if problem := _globally_hooked() or foreign_in(torch, nn.functional) or foreign_mode():
        raise upstream.unsupported(problem)
    seen, problems = set[FunctionType](), dict[type, str]()
    for path, module in parts:
        if module in copied or any(path == part or path.startswith(f"{part}.") for part in unread):
            continue
        kind = type(module)
        if kind not in problems:
            problems[kind] = replaced_on_class(kind, packages, seen)
        known = module in recognised or qualified_name(module) in ignored or _is_known(kind, files)
        problem = (
            _hooked(module, path, upstream.record)
            or replaced_on_instance(module)
            or _beside_parts(module, path, upstream.record, mapped)
            or ("" if known else _unknown(kind))
            or problems[kind]
            or _other_size(module, sizes)
            or _foreign_attention(module)
            or _foreign_tensors(module)
        )
        if problem:
            raise Reader(module, path).unsupported(problem)


def check_at_hand(upstream: nn.Module) -> None:
    """Refuse a model without some of its weights: accelerate brings them for a pass, or they are on ``meta``.

    And one that holds other things than modules and tensors, or does not say what it holds; and any model in a process
    in which methods of ``torch.Tensor`` are not torch's, for Prisma's own code calls them.
    """
    if problem := foreign_in(Tensor, nn.Parameter):
        raise Reader(upstream).unsupported(problem)
    parts = list(_tree(upstream))
    held = (cast("Any", module)._parameters.values() for _, module in parts)
    outline = all(tensor.is_meta for several in held for tensor in several if tensor is not None)
    for path, module in parts:
        if (walk := next((name for name in WALKS if name in vars(module)), None)) is not None:
            problem = f"a {walk} of this instance's own ({name_of(vars(module)[walk])}), which may hide what it holds"
            raise Reader(module, path).unsupported(f"{problem}. Take it off before (del module.{walk})")
        outer: Any = getattr(module, "_hf_hook", None)
        if any(getattr(hook, "offload", False) for hook in (outer, *getattr(outer, "hooks", ()))):
            raise Reader(module, path).unsupported(
                "weights that accelerate has put elsewhere until a pass needs them. Put them back before: "
                "accelerate.hooks.remove_hook_from_submodules(upstream)"
            )
        absent = next((name for name, tensor in _tensors(module) if tensor.is_meta), None)
        if absent is not None and not outline:
            raise Reader(module, path).unsupported(f"{absent} is on the meta device, which holds no numbers")


def _tree(module: nn.Module, path: str = "", above: tuple[nn.Module, ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and those inside with their paths, each as often as it stands there."""
    for place, kind in (("_parameters", Tensor), ("_buffers", Tensor), ("_modules", nn.Module)):
        held: Any = getattr(module, place)
        if type(held) not in (dict, OrderedDict) and root_of(qualified_name(held)) != "torch":
            what = f"its {place} in a {qualified_name(held)}, which may give others. Take them out before"
            raise Reader(module, path).unsupported(what)
        for name, value in held.items():
            if hasattr(type(module), name):
                what = f"an attribute {name} of its class in the place of its part of that name. Take it off before"
                raise Reader(module, path).unsupported(what)
            if value is not None and not isinstance(value, kind):
                what = f"{describe(value)} as {name} among its {place[1:]}. Put a {kind.__name__} in its place before"
                raise Reader(module, path).unsupported(what)
    above = (*above, module)
    yield path, module
    for name, child in held.items():  # its modules, the last
        if any(child is one for one in above):
            raise Reader(module, path).unsupported(f"a part {name} that holds this module itself. Take it off before")
        if child is not None:
            yield from _tree(child, f"{path}.{name}".lstrip("."), above)


def check_counted(upstream: nn.Module, paths: Iterable[str], types: Iterable[str]) -> None:
    """Refuse other code than its class's in a module whose calls of functions are counted: others may stand there.

    Args:
        paths: of the modules in which hook points stand at functions.
        types: qualified names of the classes that the adapter takes.
    """
    packages, seen, problems = {root_of(name) for name in types}, set[FunctionType](), dict[type, str]()
    for path in sorted(paths):
        module = upstream.get_submodule(path)
        kind, base = type(module), _base(type(module))
        if kind not in problems:
            foreign = base is not None and root_of(kind.__module__) not in packages | {root_of(base.__module__)}
            problems[kind] = _unknown(kind) if foreign else replaced_on_class(kind, packages, seen)
        if problem := replaced_on_instance(module) or problems[kind]:
            raise Reader(module, path).unsupported(
                f"{problem}. Hook points stand at functions that it calls, by number, and would be at others"
            )


def unwrapped(upstream: nn.Module) -> nn.Module:
    """The module inside torch's wrappers that change no number: ``torch.compile``, ``DataParallel`` and its kin."""
    while name := WRAPPERS.get(qualified_name(upstream)):
        if _hooked(upstream, "", set()) or (name == "module" and replaced_on_instance(upstream)):
            break  # _orig_mod is called by a forward that torch.compile sets on the instance
        upstream = upstream.get_submodule(name)
    return upstream


def _unread(parts: Sequence[tuple[str, nn.Module]], table: WeightMap, mapped: Sequence[re.Pattern[str]]) -> list[str]:
    """Return the paths of modules all of whose tensors are ignored."""
    ignored = {name for name in tensors_of(parts[0][1]) if table.reason_to_ignore(name) is not None}
    left_out = {name for name in ignored if not _is(name, mapped)}
    paths: list[str] = []
    for path, module in parts:
        tensors = tensors_of(module)
        if path and tensors and all(f"{path}.{name}" in left_out for name in tensors):
            paths.append(path)
    return paths


def _is(name: str, patterns: Iterable[re.Pattern[str]]) -> bool:
    return any(pattern.fullmatch(name) for pattern in patterns)


def _globally_hooked() -> str:
    for name in HOOKS:
        for hook in cast("dict[int, object]", getattr(nn.modules.module, f"_global{name}", {})).values():
            if root_of(name_of(hook)) != "torch":
                return (
                    f"a global {_kind(name)} ({name_of(hook)}), which runs in all modules. Remove it (handle.remove())"
                )
    return ""


def _kind(hooks: str) -> str:
    return hooks.removeprefix("_").removesuffix("s").replace("_", " ")


def _hooked(module: nn.Module, path: str, read: set[str]) -> str:
    for name in HOOKS:
        hooks = cast("dict[int, object]", getattr(module, name)).values()
        hooks = [hook for hook in hooks if not _is_harmless(hook)]
        if hooks and (f"{path}.{name}" if path else name) not in read:
            what = "gradients" if "backward" in name else "numbers"
            remove = "(handle.remove()), and edit the hooked model instead: model.hooks({name: function})"
            if name_of(hooks[0]).startswith("torch.nn.utils."):  # what it computes takes the place of a weight
                remove = "with what torch.nn.utils has for it: prune.remove(module, name), remove_weight_norm(module)"
            return f"a {_kind(name)} ({name_of(hooks[0])}), which may change its {what}. Remove it before {remove}"
    return ""


def _is_harmless(hook: object) -> bool:
    name = name_of(hook)
    return name.startswith(READ_ONLY) or (root_of(name) == "transformers" and name.endswith(ASKS_FOR_GRADIENTS))


def _beside_parts(module: nn.Module, path: str, read: set[str], mapped: Sequence[re.Pattern[str]]) -> str:
    """Name what stands in a module where its class may use a part or a parameter, and no adapter has read.

    That is a function, or a tensor that is no parameter and no buffer.
    """
    kind = type(module)
    for name, value in vars(module).items():
        full = f"{path}.{name}".lstrip(".")
        tensor = isinstance(value, Tensor)
        if not tensor and (not callable(value) or isinstance(value, type) or hasattr(kind, name)):
            continue
        if not tensor and (root_of(name_of(value)) == root_of(kind.__module__) or is_checkpointing(value)):
            continue
        if full in read and not (tensor and _is(full, mapped)):  # a map reads what is in the state dict
            continue
        methods = (one for base in kind.__mro__ for method, one in vars(base).items() if method != "__init__")
        code = (one.__code__ for method in methods for one in functions_of(method) if isinstance(one, FunctionType))
        if any(name in names_in(one) for one in code):
            if tensor:
                return f"a tensor {name} in no state dict: no parameter, no buffer. Set an nn.Parameter in its place"
            return (
                f"a function {name} ({name_of(value)}), which no adapter has read. Put a module in its place. An "
                f"adapter that knows it reads it: reader.{name}"
            )
    return ""


def _foreign_attention(module: nn.Module) -> str:
    """Name an attention function that is not transformers' own."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    library: Any = sys.modules.get("transformers.modeling_utils")
    if name in EAGER or not isinstance(name, str) or library is None:
        return ""
    function = library.ALL_ATTENTION_FUNCTIONS.get(name)
    if root_of(name_of(function)) == "transformers":
        return ""
    return (
        f"the attention function {name!r}, which is not transformers' own. Choose one of its own before: "
        "upstream.set_attn_implementation('sdpa')"
    )


def _runs_its_children(kind: type[nn.Module]) -> bool:
    """Whether all that a class computes is what its children do, one after the other."""
    names = ("forward", "__call__", "__iter__")
    return issubclass(kind, nn.Sequential) and all(getattr(kind, n) is getattr(nn.Sequential, n) for n in names)


def _is_known(kind: type[nn.Module], files: set[str]) -> bool:
    """Whether an adapter knows a class that it has not named: torch's that compute nothing, and those of its files."""
    if kind.__module__.startswith(TORCH):
        return kind in SAID
    return kind.__module__ in files and (_base(kind) is None or _runs_its_children(kind))


def _base(kind: type[nn.Module]) -> type | None:
    """The class that a class derives from and that has a forward of its own."""
    return next((each for each in kind.__mro__[1:] if each is not nn.Module and "forward" in vars(each)), None)


def _unknown(kind: type[nn.Module]) -> str:
    base = _base(kind)
    full = f"{kind.__module__}.{kind.__qualname__}"
    if full.startswith(TORCH):
        return (
            "a class that the adapter has not recognised, so it may compute something else. An adapter that knows it "
            f"says so: reader.expect({kind.__name__!r})"
        )
    derived = f" that derives from {base.__module__}.{base.__qualname__}" if base else " of another file"
    return (
        f"a class{derived}, so it may compute something else. An adapter that knows it says so: reader.expect({full!r})"
    )


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a module's own."""
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _foreign_tensors(module: nn.Module) -> str:
    """Name a tensor of a class of its own, which may compute something else, or one that a pass changes."""
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return f"max_norm={module.max_norm!r}: a pass changes its weight. Take it off after one (max_norm = None)"
    for name, tensor in _tensors(module):
        kind, plain = type(tensor), tensor.layout == torch.strided
        if not plain or (kind not in TENSORS and not kind.__module__.startswith(FAKE)):
            what = qualified_name(tensor) if plain else f"tensor of layout {tensor.layout}"
            return f"{name} is a {what}, no plain tensor (quantised?). Put its plain values in its place before"
        if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:  # pyright: ignore[reportPrivateUsage]
            return f"a hook of the gradient of {name}, which a copy would not have. Remove it before (handle.remove())"
        if isinstance(tensor, nn.Parameter) and (tensor.itemsize < 2 or not tensor.is_floating_point()):
            return f"{name} is of {tensor.dtype}: codes of quantised weights. Put the weights in its place before"
    return ""


def _sizes_of(spec: AnySpec) -> dict[str, set[object]]:
    """Return the sizes of a spec, by the names that libraries give them."""
    attentions = list(_inside(spec, AttentionSpec))
    pairs = {(n, one.d_head) for one in attentions for n in (one.n_heads, one.n_kv_heads)}
    heads: set[object] = {n for n, _ in pairs}
    widths: set[object] = {width for _, width in pairs}
    return {
        **dict.fromkeys(HEADS, heads),
        **dict.fromkeys(WIDTHS, widths),
        "heads and width": {*pairs},
        "all_head_size": {one.n_heads * one.d_head for one in attentions},
        "patch_size": {one.patch for one in _inside(spec, EmbedSpec)},
        "is_cross_attention": {False},  # in what reads one input: it would leave the mask of its padding out
        "num_prefix_tokens": {one.n_prefix for one in _inside(spec, TokenLayout)},
    }


def _other_size(module: nn.Module, sizes: Mapping[str, set[object]]) -> str:
    """Name a size of a module that the spec does not have; empty where there is none."""
    for name in sizes.keys() & vars(module).keys():
        value: Any = vars(module)[name]
        if name == "patch_size":  # of a video's the first is that of frames
            value = (value, value) if isinstance(value, int) else tuple(value or ())[-2:]
        if name == "num_prefix_tokens":
            value = value or 0
        if sizes[name] and isinstance(value, int | tuple) and value not in sizes[name]:
            known = ", ".join(map(str, sorted(cast("Any", sizes[name]))))
            return f"{name}={vars(module)[name]!r}, where its tensors and the rest of it are of {known}"
    own, pairs = vars(module), sizes["heads and width"]
    for heads, width in itertools.product(own.keys() & HEADS, own.keys() & WIDTHS):
        pair = own[heads], own[width]
        if pairs and pair not in pairs and all(isinstance(one, int) for one in pair):
            return f"{heads}={pair[0]} beside {width}={pair[1]}, of which its forward may read one alone"
    return ""


def _inside(value: object, kind: type[T]) -> Iterator[T]:
    """Yield the specs of a kind inside another."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _inside(getattr(value, name), kind)
    elif isinstance(value, tuple):
        for one in cast("Iterable[object]", value):
            yield from _inside(one, kind)
