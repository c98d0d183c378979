"""``prisma models`` and ``prisma plugins``: what is there."""

from __future__ import annotations

import fnmatch
from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from prisma_core.contract.source import ModelInfo
from prisma_core.errors import PluginError, UnknownName, suggest
from prisma_core.host import installed
from prisma_core.toolbox.screen import note, show, show_json, table, working


def models(
    context: typer.Context,
    search: Annotated[list[str] | None, typer.Argument(help="Words or globs that a reference must match.")] = None,
    source: Annotated[str | None, typer.Option(help="Only this source's models.")] = None,
    family: Annotated[str | None, typer.Option(help="Only this family (a glob).")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Only models with trained weights.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Those too that no installed adapter takes.")] = False,
    classes: Annotated[
        bool, typer.Option("--classes", help="The classes that adapters take, and what is proven about each.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """List and search models that can be loaded, or their classes."""
    if classes:
        _classes(context, search or [], as_json)
        return
    if source is not None:
        installed().source(source)
    infos = [info for info in installed().models() if source is None or info.reference.startswith(f"{source}:")]
    matches = [info for info in infos if _matches(info, search or [], family, pretrained)]
    if not matches and infos:
        _nothing(infos, search or [], family)
    with working("looking which of them an adapter takes"):
        loads = _loads(matches)
    listing = [info for info in matches if everything or loads[info.reference] is not False]
    absent = installed().missing()
    if as_json:
        missing = [{"source": name, "install": command} for name, command in absent.items()]
        listed = [asdict(info) | {"loads": loads[info.reference]} for info in listing]
        show_json({"models": listed, "missing": missing})
    else:
        _show(listing, loads, everything)
        left_out = len(matches) - len(listing)
        remark = f" {left_out} more match that no installed adapter takes: --all lists them." if left_out else ""
        note("models", f"{len(listing)} of {len(infos)}.{remark}", "green")
    if source is not None and not infos and source not in absent:
        takes = " ".join((installed().source(source).__doc__ or "").split("\n\n")[0].split()).replace("``", "`")
        note("models", f"this source lists none. It takes {takes}" if takes else "this source lists none.", "yellow")
    for name, command in absent.items():
        note("not installed", f"the source {name!r}: {command}", "yellow")


def _classes(context: typer.Context, search: list[str], as_json: bool) -> None:
    """Run the command ``classes``, which the conformance kit brings."""
    group = context.parent.command if context.parent is not None else None
    command = getattr(group, "commands", {}).get("classes")
    if context.parent is None or command is None:
        raise PluginError("prisma models --classes needs the conformance kit, the plugin 'conformance'.")
    command.main(args=[*search, *(["--json"] if as_json else [])], prog_name="prisma classes", standalone_mode=False)


def _loads(infos: list[ModelInfo]) -> dict[str, bool | None]:
    """Return for each reference whether an adapter takes it; None where the source does not know."""
    rests: dict[str, list[str]] = {}
    for info in infos:
        name, _, rest = info.reference.partition(":")
        rests.setdefault(name, []).append(rest)
    answers = {name: installed().loadable(name, several) for name, several in rests.items()}
    return {
        f"{name}:{rest}": None if (loadable := answers[name]) is None else rest in loadable
        for name, several in rests.items()
        for rest in several
    }


def _show(infos: list[ModelInfo], loads: dict[str, bool | None], everything: bool) -> None:
    if not infos:
        return
    grid = table("reference", "family", "weights", *(["loads"] if everything else []), "note")
    for info in infos:
        weights = "trained" if info.pretrained else ""
        word = {True: "yes", False: "no adapter", None: ""}[loads[info.reference]]
        cells = (info.reference, info.family, weights, *([word] if everything else []), " ".join(info.note.split()))
        grid.add_row(*cells)
    show(grid)


def _matches(info: ModelInfo, search: list[str], family: str | None, pretrained: bool) -> bool:
    if pretrained and not info.pretrained:
        return False
    if family is not None and not fnmatch.fnmatch(info.family, family):
        return False
    return all(_has(info, word) for word in search)


def _has(info: ModelInfo, word: str) -> bool:
    if any(char in word for char in "*?["):
        return fnmatch.fnmatch(info.reference, word) or fnmatch.fnmatch(info.reference.partition(":")[2], word)
    return word.lower() in f"{info.reference} {info.family} {info.note}".lower()


def _nothing(infos: list[ModelInfo], search: list[str], family: str | None) -> None:
    families = {info.family for info in infos}
    within = [info.reference for info in infos if family is None or fnmatch.fnmatch(info.family, family)]
    if family is not None and not within:
        few = sorted(families)
        advice = (
            f" Families: {', '.join(few)}." if len(few) <= 5 else f" There are {len(few)}: `prisma models` shows them."
        )
        raise UnknownName(f"No family {family!r}.{suggest(family, families) or advice}")
    names = {reference.partition(":")[2] for reference in within}
    hint = suggest(" ".join(search), [*within, *names]) if search else ""
    raise UnknownName(f"No model matches.{hint} `prisma models` lists all {len(infos)}.")


def plugins(as_json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False) -> None:
    """List the plugins found, and what is wrong with them.

    The exit status is 1 where one is broken.
    """
    infos = installed().plugins()
    grid = table("plugin", "module", "distribution", "state")
    for info in infos:
        state = Text("ready" if info.missing is None else f"needs {info.missing}")
        if info.error:
            state = Text.assemble(("broken:", "red"), f" {info.error}")
        grid.add_row(info.name, info.module, info.distribution, state)
    if as_json:
        show_json([asdict(info) for info in infos])
    else:
        show(grid)
    if any(info.error for info in infos):
        raise typer.Exit(1)
