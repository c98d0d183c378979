"""Functions that stand in the place of a library's own, anywhere in the code that the call of a module reaches.

A class says what its modules compute only as long as its functions are its own. Found are methods that were set on an
instance or a class, functions that were set in a module of the library, and functions with other code or defaults than
their files have: from ``forward`` on, by name, through what each function calls, wraps and closes over.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from prisma_core.errors import qualified_name
from prisma_core.errors.arguments import shown
from prisma_core.inputs.checks import BASE, OVERRIDES

CALLS = ("__call__", "_call_impl", "forward")  # where the call of a module begins
READS = ("__getattr__", "__getattribute__")  # where a module finds its tensors and parts
COMPILED = "_compiled_call_impl"  # set by module.compile()
ACCELERATE = ("AlignDevicesHook", "CpuOffload", "SequentialHook")  # its hooks that move tensors
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
TREE = ("_modules", "_parameters", "_buffers")
WALKS = (  # by what a module says what it holds
    *("named_modules", "modules", "named_children", "children"),
    *("named_parameters", "parameters", "named_buffers", "buffers"),
)
OURS = "prisma_core"
START = time.time()  # a file that was changed since may not be what was imported
PLAIN = {"torch", OURS, *sys.stdlib_module_names} - {"unittest"}  # whose mocks stand for other functions
FUNCTIONAL = "torch.nn.functional"
ITEMS = ("__iter__", "__getitem__", "__len__")  # of containers
# by what holds torch's functions, what has the names of those that compute
COMPUTED: dict[Any, Any] = {
    Tensor: BASE,
    nn.Parameter: BASE,
    torch: cast("Any", torch)._C._VariableFunctions,
    nn.functional: nn.functional,
}
NAMES: dict[Any, str] = {Tensor: "torch.Tensor", nn.Parameter: "torch.nn.Parameter"}
PRINTED = ("__repr__", "__str__", "__format__", "__dir__")


def replaced_on_instance(module: nn.Module) -> str:
    """Say which method was set on a module itself; empty where none was, or it is the class's in a harmless wrapper."""
    for name, value in vars(module).items():
        if any(name in vars(module).get(inside, ()) for inside in TREE):
            return f"an attribute {name} in the place of its part of that name. Take it off before (del module.{name})"
        if name not in (*CALLS, COMPILED) and not _is_method(type(module), name):
            continue
        if callable(value) and not is_original(value, module, name):
            return (
                f"a {name} of this instance's own ({name_of(value)}) in the place of its class's. Take it off before "
                f"(del module.{name})"
            )
    return ""


def replaced_on_class(kind: type[nn.Module], packages: set[str], seen: set[FunctionType]) -> str:
    """Say which function that the call of a class reaches is another package's; empty where none is.

    Args:
        packages: whose functions belong there, besides the class's own, torch's and Python's.
        seen: the functions of modules that were followed before; it grows.
    """
    known = {*PLAIN, *packages, root_of(kind.__module__)}
    own = (name for name, value in vars(kind).items() if name[:2] != "__" and next(functions_of(value), None))
    names = list(dict.fromkeys((*CALLS, *READS, *ITEMS, *own)))  # some are called from outside: encode_image
    for name in names:  # it grows meanwhile
        owner = next((each for each in kind.__mro__ if name in vars(each)), object)
        functions = list(functions_of(vars(owner).get(name)))
        wrong = [one for one in functions if not _belongs(one, owner.__module__, known)]
        library = owner is not nn.Module and name not in READS and root_of(owner.__module__) not in PLAIN - {"torch"}
        homes = {name_of(one).rpartition(".")[0] for one in functions}
        if library and not wrong and f"{owner.__module__}.{owner.__qualname__}" not in homes:
            wrong = functions or ([vars(owner)[name]] if name in CALLS else [])
        if wrong:
            return f"a {name} that is not its class's own ({name_of(wrong[0])}). Put back the library's"
        for function in functions:
            if change := changed(function):
                return f"a {name} with {change}. Put back the library's"
            if not isinstance(function, FunctionType) or root_of(home_of(function)) not in known - PLAIN | {"torch"}:
                continue
            for place, called, exchanged in _reached(function, known - PLAIN, seen):
                if exchanged or not _belongs(called, place.rpartition(".")[0], known):
                    return f"{name_of(called)} in the place of {place}, which it calls. Put back the library's"
                if change := changed(called):
                    return f"{place}, which it calls, with {change}. Put back the library's"
            names += [one for one in names_in(function.__code__) if one not in names and _is_method(kind, one)]
    return ""


def foreign_in(*owners: object) -> str:
    """Say what stands for a function of torch's; empty where nothing does. Prisma's own code calls these, as all does.

    Args:
        owners: of ``torch.Tensor``, ``torch.nn.Parameter``, ``torch`` and ``torch.nn.functional``.
    """
    for owner in cast("tuple[Any, ...]", owners):
        for name, value in cast("dict[str, Any]", vars(owner)).items():
            if name in PRINTED or not (hasattr(COMPUTED[owner], name) or name in OVERRIDES):
                continue
            if isinstance(value, type) or (isinstance(value, BuiltinFunctionType) and value.__name__ == name):
                continue
            home = NAMES.get(owner) or owner.__name__
            wrong = [one for one in list(functions_of(value)) or [value] if _package(one) not in PLAIN]
            if isinstance(owner, ModuleType) and _is_exchanged(value, f"{home}.{name}"):
                wrong = [value]
            if wrong:
                return f"{name_of(wrong[0])} in the place of {home}.{name}, which runs in all modules. Put back torch's"
    return ""


def root_of(name: str) -> str:
    """The package that a dotted name begins with."""
    return name.partition(".")[0]


def name_of(function: object) -> str:
    """A function's qualified name, whatever it says that it wraps; or its type's."""
    if isinstance(function, FunctionType):
        return f"{home_of(function)}.{function.__code__.co_qualname}"
    if isinstance(function, functools.partial):
        return name_of(cast("object", function.func))
    home, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    return f"{home}.{name}" if name else qualified_name(function)


def home_of(function: FunctionType) -> str:
    """The module that a function is of; where its code is not that module's, the file of the code."""
    there, file = function.__globals__, function.__code__.co_filename
    return str(there.get("__name__", "")) if there.get("__file__", file) == file else file


def names_in(code: CodeType) -> Iterator[str]:
    """Yield the names of globals and attributes in a function's code, and in that of functions inside."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from names_in(inner)


def is_original(value: Any, module: nn.Module, name: str) -> bool:
    """Whether a method set on an instance is its class's, in wrappers that change no number."""
    while isinstance(value, FunctionType) and home_of(value).startswith("torch._dynamo."):
        value = cast("Any", getattr(value, "_torchdynamo_orig_callable", getattr(value, "__wrapped__", None)))
    if isinstance(value, functools.partial) and value.func.__module__ == "accelerate.hooks":
        hooks = getattr(module, "_hf_hook", None)
        if not {type(hook).__name__ for hook in (hooks, *getattr(hooks, "hooks", ()))} <= set(ACCELERATE):
            return False
        value = getattr(module, "_old_forward", None)
    name = "_call_impl" if name == COMPILED else name
    return isinstance(value, MethodType) and value.__self__ is module and value.__func__ is getattr(type(module), name)


def is_checkpointing(value: object) -> bool:
    """Whether a function is torch's that computes activations again, which changes no number."""
    homes = {home_of(one) for one in functions_of(value) if isinstance(one, FunctionType)}
    return "torch.utils.checkpoint" in homes and all(root_of(home) in PLAIN for home in homes)


def _belongs(value: Any, module: str, known: set[str]) -> bool:
    """Whether a callable comes from a known package, or from one that the module imports by its own text."""
    home = _package(value)
    if home in (PLAIN if root_of(module) == "torch" else known):
        return True
    if module == "__main__":  # a notebook, whose text is not at hand
        return True
    return re.search(rf"^\s*(from|import) {re.escape(home)}\b", _text_of(module), re.MULTILINE) is not None


def _package(value: Any) -> str:
    return root_of(home_of(value) if isinstance(value, FunctionType) else type(value).__module__)


def _text_of(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return ""


def changed(function: object) -> str:
    """Say what of a function is not as its file has it; empty where all is, or the file cannot tell."""
    if not isinstance(function, FunctionType):
        return ""
    code, inner = function.__code__, getattr(function, "__wrapped__", None)
    if inner is None and code.co_qualname != function.__qualname__:
        return f"the code of another ({code.co_qualname})"
    home = home_of(function)
    if isinstance(inner, FunctionType) and root_of(home) == "torch" and not home.startswith("torch._dynamo."):
        innermost = inspect.unwrap(inner)
        definition = _definition(innermost.__code__)
        if definition is not None and not any(
            _is_torch(one, innermost.__globals__) for one in definition.decorator_list
        ):
            return f"a wrapper ({name_of(function)}), which its file does not have"
    written = _written(str(function.__globals__.get("__name__")))
    alike = written.get((code.co_qualname, code.co_firstlineno), [])
    if written and code not in alike:
        return "other code than its file has"
    definition = _definition(code) if alike and (function.__defaults__ or function.__kwdefaults__) else None
    if definition is None:
        return ""
    arguments = definition.args
    by_name = {arg.arg: each for arg, each in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if each}
    defaults = arguments.defaults, by_name
    there = function.__globals__
    positional, keywords = function.__defaults__ or (), function.__kwdefaults__ or {}
    if len(positional) != len(defaults[0]) or keywords.keys() != defaults[1].keys():
        return "other defaults than its file has"
    pairs = [*zip(defaults[0], positional, strict=True), *((defaults[1][name], keywords[name]) for name in keywords)]
    wrong = [value for node, value in pairs if not _is_value(node, value, there)]
    return f"a default of {shown(wrong[0])}, which is not its file's" if wrong else ""


@functools.lru_cache(1024)
def _written(module: str) -> dict[tuple[str, int], list[CodeType]]:
    """Return the code of a module's functions as its file has it, by name and line.

    None of a file that was changed since, or that is read in another way (with assertions rewritten, or checks added).
    """
    codes: dict[tuple[str, int], list[CodeType]] = {}
    loader: Any = getattr(getattr(sys.modules.get(module), "__spec__", None), "loader", None)
    if type(loader) is not SourceFileLoader:
        return codes
    try:
        old = Path(loader.path).stat().st_mtime < START
        rest = [cast("CodeType", loader.get_code(module))] if old else []
    except (OSError, ImportError, SyntaxError):
        return codes
    while rest:
        code = rest.pop()
        codes.setdefault((code.co_qualname, code.co_firstlineno), []).append(code)
        rest += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return codes


@functools.lru_cache(4096)
def _definition(code: CodeType) -> ast.FunctionDef | None:
    """Return how a function is written in its file; None of what is no ``def``."""
    try:
        text = inspect.getsource(code)
        block = ast.parse(f"if True:\n{text}" if text[:1].isspace() else text).body[0]
    except (OSError, SyntaxError, IndexError):
        return None
    node = block.body[0] if isinstance(block, ast.If) else block
    return node if isinstance(node, ast.FunctionDef) else None


def _is_torch(node: ast.expr, there: Mapping[str, Any]) -> bool:
    """Whether a decorator is torch's: what it is called by begins with a name for something of torch's."""
    while isinstance(node, ast.Call | ast.Attribute):
        node = node.func if isinstance(node, ast.Call) else node.value
    value = there.get(node.id) if isinstance(node, ast.Name) else None
    return root_of(value.__name__ if isinstance(value, ModuleType) else name_of(value)) == "torch"


def _is_value(node: ast.expr, value: object, there: Mapping[str, Any]) -> bool:
    """Whether a default is what its expression says: a constant, or what a name stands for. Others are not run."""
    path = list[str]()
    while isinstance(node, ast.Attribute):
        path.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        said = there.get(node.id, value)  # not a module's name: of the class that the function stands in, or Python's
        return functools.reduce(lambda each, name: getattr(each, name, value), reversed(path), said) is value
    try:
        said = ast.literal_eval(node)
    except ValueError:
        return True
    return type(said) is type(value) and said == value


def _is_method(kind: type, name: str) -> bool:
    value = next((vars(each)[name] for each in kind.__mro__ if name in vars(each)), None)
    return not hasattr(nn.Module, name) and next(functions_of(value), None) is not None


def functions_of(value: Any) -> Iterator[Any]:
    """Yield what stands behind an attribute of a class: functions, what they wrap and what they close over."""
    rest, seen = [value], list[Any]()
    while rest:
        value = rest.pop()
        if isinstance(value, property):
            rest.append(value.fget)
        elif isinstance(value, staticmethod | classmethod):
            rest.append(cast("Any", value.__func__))
        elif isinstance(value, functools.partial | functools.partialmethod | functools.cached_property):
            rest.append(cast("Any", value.func))
        elif callable(value) and not isinstance(value, type) and not any(value is one for one in seen):
            seen.append(value)
            yield value
            rest.append(getattr(value, "__wrapped__", None))
            rest += [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if cell != CellType()]


def _is_exchanged(value: object, place: str) -> bool:
    """Whether a name of a module's stands for something of another name than its file has there."""
    module, _, name = place.rpartition(".")
    if isinstance(value, ModuleType):
        return sys.modules.get(value.__name__) is not value
    own: object = getattr(value, "__name__", name)
    if own == name or not isinstance(own, str) or not callable(value) or _package(value) == OURS:
        return False
    short, own = (one.replace("_", "") for one in (name, own))
    if short.endswith(own) or own.endswith(short):  # torch.special.erf is special_erf
        return False
    return root_of(module) == "torch" or re.search(rf"^def {name}\b", _text_of(module), re.MULTILINE) is not None


def _reached(function: FunctionType, into: set[str], seen: set[FunctionType]) -> Iterator[tuple[str, Any, bool]]:
    """Yield what a function calls by name, with its place, and whether it is exchanged; so on in packages ``into``."""
    rest = [function]
    while rest:
        function = rest.pop()
        if function in seen:
            continue
        seen.add(function)
        names = set(names_in(function.__code__))
        there = function.__globals__
        places = {f"{home_of(function)}.{name}": there[name] for name in names & there.keys()}
        modules = [value for value in places.values() if isinstance(value, ModuleType)]
        for module in [one for one in modules if root_of(one.__name__) == "torch"]:
            inner = [module, *(value for name in names if isinstance(value := vars(module).get(name), ModuleType))]
            for one in inner:
                places |= {f"{one.__name__}.{name}": vars(one)[name] for name in names & vars(one).keys()}
        for place, value in places.items():
            if _is_exchanged(value, place):
                yield place, value, True
            for called in functions_of(value):
                yield place, called, False
                if isinstance(called, FunctionType) and (
                    root_of(home := home_of(called)) in into or home == FUNCTIONAL
                ):
                    rest.append(called)
