"""``prisma new-plugin``: a distribution to start from, which installs and passes its own tests as written."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import keyword
import re
import shlex
import textwrap
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated, NamedTuple, cast

import typer

from prisma_core.plugin import InputError, PrismaError, UnknownName, installed, replacing, screen

# Which template makes which file; the folder is the package's.
WRITTEN = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "conftest.py": "conftest.py",
    "prisma_$name/__init__.py": "__init__.py",
    "prisma_$name/adapter.py": "adapter.py",
    "prisma_$name/cases.py": "cases.py",
    "prisma_$name/source.py": "source.py",
    "tests/test_conformance.py": "test_conformance.py",
}
SAYS = "the facts of a model, the tensors that make each canonical one, the places of its activations"
MAP_SAYS = "what a model takes, the places of its activations, and the equations that prove them"
STAND_IN = "prisma_$name/tiny_vit.py"


class Upstream(NamedTuple):
    """The class a plugin adapts: where it is defined, what its constructor takes, what installs it."""

    module: str
    name: str
    signature: str
    library: str
    distribution: str


def new_plugin(
    name: Annotated[str, typer.Argument(help="Of the plugin and of its source, such as acme for acme:tiny.")],
    folder: Annotated[
        Path | None, typer.Option(help="Where to write it.", file_okay=False, show_default="prisma-NAME")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--type", help="The class to adapt, such as acme.models.ViT; without it a small one to start from."
        ),
    ] = None,
    as_map: Annotated[
        bool,
        typer.Option("--map", help="Hook the class where it stands: for architectures that no spec holds."),
    ] = False,
) -> None:
    """Write a new plugin, ready to install: adapter, source, conformance case and tests.

    As written it adapts a small vision transformer of its own and passes every check; its comments say what to replace.
    With --type it names your class instead, and `prisma check NAME:tiny` says step by step what is still to do.
    """
    _check_name(name)
    upstream = None if kind is None else _upstream(kind)
    dashed = name.replace("_", "-")
    folder = folder or Path(f"prisma-{dashed}")
    screen.check_output(folder, folder=True)
    _write(folder, _texts(name, dashed, upstream, as_map))
    where = shlex.quote(str(folder))
    screen.out().print(f"Wrote {folder}. Go on with:\n", soft_wrap=True)
    steps = (f"cd {where}", 'pip install -e ".[test]"', f"prisma check {name}:tiny", "pytest")
    screen.out().print("\n".join(f"  {step}" for step in steps), soft_wrap=True)


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        proper = re.sub(r"\W+", "_", name.lower()).strip("_0123456789")
        usable = proper if proper and not keyword.iskeyword(proper) else "my_vit"
        raise InputError(f"{name!r} cannot name a plugin: expected lower-case letters, digits and _, such as {usable}.")
    if name in installed().infos:
        info = installed().infos[name]
        raise InputError(
            f"There is a plugin {name!r} already: {info.module} of {info.distribution}. Choose another name."
        )
    if _is_source(name):
        raise InputError(f"There is a source {name!r} already. Choose another name.")
    if importlib.util.find_spec(f"prisma_{name}") is not None:
        raise InputError(f"There is a package prisma_{name} already. Choose another name.")


def _is_source(name: str) -> bool:
    try:
        installed().source(name)
    except UnknownName:
        return False
    except PrismaError:  # its library is missing, several plugins claim it, or it is Prisma's own
        return True
    return True


def _upstream(kind: str) -> Upstream:
    """Return what there is to know about a class before one of it is built.

    Raises:
        InputError: it cannot be imported, is no module, or has an adapter.
    """
    from torch import nn

    path, _, attribute = kind.rpartition(".")
    try:
        found = cast("object", getattr(importlib.import_module(path), attribute))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise InputError(f"{kind!r} cannot be imported ({error}). Expected package.module.Class.") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise InputError(f"{kind} is no class of torch modules. Expected one that derives from torch.nn.Module.")
    full = f"{found.__module__}.{found.__qualname__}"
    if full in installed().types():
        raise InputError(f"{full} is adapted already: prisma.adapt takes a model of it as it is.")
    library = found.__module__.split(".", 1)[0]
    distributions = packages_distributions().get(library, [library])
    return Upstream(found.__module__, found.__qualname__, _signature(found), library, distributions[0])


def _prisma() -> str:
    """Return the requirement of Prisma: from this release until the names that the next one deprecates may be gone."""
    major, minor = version("prisma-interp").split(".")[:2]
    return f"{_since('prisma-interp')},<{major}.{int(minor) + 2}"


def _since(distribution: str) -> str:
    """Return the requirement of the installed release or a later one."""
    try:
        return f"{distribution}>={version(distribution).partition('+')[0]}"
    except PackageNotFoundError:
        return distribution


def _signature(kind: type) -> str:
    """Return a comment that says what a constructor takes."""
    try:
        signature = inspect.signature(kind)
    except ValueError:  # some classes written in C have none
        return f"    # {kind.__name__}(...)"
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    text = f"{kind.__name__}{signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)}"
    return textwrap.fill(text, 110, initial_indent="    # ", subsequent_indent="    #   ", break_long_words=False)


def _texts(name: str, dashed: str, upstream: Upstream | None, as_map: bool) -> dict[str, str]:
    """Return the text of each file by its path."""
    written = WRITTEN | ({"prisma_$name/adapter.py": "map_adapter.py"} if as_map else {})
    package = f"prisma_{name}"
    if upstream is None:
        written[STAND_IN] = "tiny_vit.py"
        own = {
            "class_name": "TinyViT",
            "type": f"{package}.tiny_vit.TinyViT",
            "library": "torch",
            "distribution": "torch",
            "requirements": f'"{_prisma()}"',
            "also": "",
            "case_imports": f"\nfrom {package}.tiny_vit import TinyViT",
            "small_body": "    return TinyViT(size=24, patch=8, width=20, heads=2, depth=2, classes=7)",
            "stand_in_row": f"| `{package}/tiny_vit.py` | a stand-in for the library; delete it |",
        }
    else:
        line = f"from {upstream.module} import {upstream.name}"
        advice = f"build a small {upstream.name} in {package}/cases.py, two blocks deep."
        own = {
            "class_name": upstream.name,
            "type": f"{upstream.module}.{upstream.name}",
            "library": upstream.library,
            "distribution": upstream.distribution,
            "requirements": f'"{_prisma()}", "{_since(upstream.distribution)}"',
            "also": ", PrismaError",
            "case_imports": line,
            "small_body": f'{upstream.signature}\n    raise PrismaError("To do: {advice}")',
            "stand_in_row": "",
        }
    camel = "".join(part.capitalize() for part in name.split("_"))
    facts = {"name": name, "dashed": dashed, "camel": camel, "title": camel, **own}
    facts["adapter_says"] = MAP_SAYS if as_map else SAYS
    templates = files("prisma_conformance") / "templates" / "plugin"
    texts = {
        Template(path).substitute(facts): (templates / f"{template}.template").read_text(encoding="utf-8")
        for path, template in written.items()
    }
    return {path: Template(text).substitute(facts).rstrip("\n") + "\n" for path, text in texts.items()}


def _write(folder: Path, texts: dict[str, str]) -> None:
    """Write files into a new folder.

    Raises:
        InputError: there is something in its place.
        LoadError: it cannot be written.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"There is something at {folder} already; nothing was written. --folder takes another place.")
    with replacing(folder) as fresh:
        for path, text in texts.items():
            (fresh / path).parent.mkdir(parents=True, exist_ok=True)
            (fresh / path).write_text(text, encoding="utf-8")
