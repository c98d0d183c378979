"""The ``prisma`` command. Commands of plugins join in; what goes wrong is said in one line."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Annotated, Any, get_type_hints

import torch
import typer
from rich.errors import MarkupError
from rich.text import Text

from prisma_core.cli.info import info
from prisma_core.cli.models import models, plugins
from prisma_core.errors import PrismaError, format_error
from prisma_core.host import Host, installed
from prisma_core.toolbox.screen import note, out

# Typer has its own copy of click in some versions and takes the library in others; its errors know their base.
_ClickException: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def _version(flag: bool) -> None:
    if flag:
        out().print(f"prisma {version('prisma-interp')}")
        raise typer.Exit


def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of what goes wrong.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """See inside vision transformers: load, prove, look."""


def _new() -> typer.Typer:
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


def build(plugins_of: Host) -> typer.Typer:
    """Return the command with the commands of a host's plugins; a name that is taken stays whose it was."""
    app = _new()
    app.callback()(_options)
    for command in (models, plugins, info):
        app.command(rich_help_panel="Commands")(command)
    owners = {_name(command): "Prisma" for command in app.registered_commands}
    for theirs, plugin in plugins_of.commands(_new):
        for kind in ("registered_commands", "registered_groups"):
            try:
                for command in getattr(theirs, kind):
                    if problem := _problem(command, owners):
                        plugins_of.broke(plugin, problem)
                        continue
                    owners[_name(command)] = f"the plugin {plugin!r}"
                    getattr(app, kind).append(command)
            except Exception as problem:  # noqa: BLE001  # of any kind: what it left in typer's lists is no command
                plugins_of.broke(plugin, f"its commands cannot be read: {format_error(problem)}")
    return app


def _problem(command: typer.models.CommandInfo | typer.models.TyperInfo, owners: dict[str, str]) -> str | None:
    """Say why a command cannot join those that there are; None if it can."""
    name = _name(command)
    if name in owners:
        return f"the command {name!r} is taken by {owners[name]}"
    problem = _broken_help(command)
    return problem and f"the help of its command {name!r} cannot be shown: {problem}"


def _broken_help(command: typer.models.CommandInfo | typer.models.TyperInfo) -> str | None:
    """Say what is wrong with the markup of a command's help, which would break the help of all; None if nothing is."""
    texts: list[object] = [command.help, command.short_help, command.epilog]
    if callable(callback := command.callback):
        texts.append(callback.__doc__)
        try:
            hints = get_type_hints(callback, include_extras=True)
        except Exception as problem:  # noqa: BLE001  # of any kind: typer evaluates them too
            return format_error(problem)
        defaults = [parameter.default for parameter in inspect.signature(callback).parameters.values()]
        about = [one for hint in hints.values() for one in getattr(hint, "__metadata__", ())]
        texts += [getattr(one, "help", None) for one in (*defaults, *about)]
    try:
        for text in texts:
            if isinstance(text, str):
                Text.from_markup(text)
    except MarkupError as problem:
        return str(problem)
    inner = command.typer_instance if isinstance(command, typer.models.TyperInfo) else None
    parts = (*inner.registered_commands, *inner.registered_groups) if inner else ()
    return next((problem for part in parts if (problem := _broken_help(part))), None)


def _name(command: typer.models.CommandInfo | typer.models.TyperInfo) -> str:
    if command.name:
        return command.name
    callback = command.callback
    return callback.__name__.lower().replace("_", "-") if callable(callback) else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 1 for an error, 2 for a command line that makes no sense.

    130 where it was interrupted.

    Args:
        arguments: the command line behind ``prisma``; None takes the process's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:cut]
    words = [argument for argument in words[:cut] if argument != "--debug"] + words[cut:]
    with warnings.catch_warnings():
        if not debug:  # libraries' chatter would bury the one line that matters
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
        try:
            return _run(words or ["--help"])
        except PrismaError as error:
            return _failed(str(error), debug)
        except (KeyboardInterrupt, typer.Abort):
            return _failed("interrupted.", debug, 130)
        except BrokenPipeError:  # the reader of the answer has seen enough, such as ``| head -1``
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it on leaving
            return 1  # as rich does
        except OSError as error:  # the disk, the network: no bug of ours
            place = f"{error.filename}: " if error.filename else ""
            return _failed(f"{place}{error.strerror or error}.", debug)
        except Exception as error:  # noqa: BLE001  # the outermost place: a bug must not greet the user with a traceback
            if isinstance(error, MemoryError | torch.OutOfMemoryError) or "alloc_cpu" in str(error):
                return _failed("there is not enough memory for this: try smaller numbers, or fewer at once.", debug)
            text = f"{type(error).__name__}: {error}"
            return _failed(f"unexpected {text} (this is a bug; --debug shows where)", debug)
        finally:
            logging.disable(logging.NOTSET)


def _run(arguments: list[str]) -> int:
    if "" in arguments:
        at = arguments.index("")
        before = f"behind {arguments[at - 1]} " if at else ""
        note("Error", f"Empty argument {before}(a variable of the shell that is not set?). Leave it out, or fill it.")
        return 2
    app = build(installed())
    for plugin in installed().infos.values():
        if plugin.error:
            note("plugin left out", f"{plugin.name} ({plugin.distribution}): {plugin.error}", "yellow")
    try:
        command = typer.main.get_command(app)
        with command.make_context("prisma", arguments) as context:  # main() has answers of its own to signals
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as leaving:
        return leaving.exit_code
    except _ClickException as error:
        message = str(error.format_message()).rstrip(".") or "Expected a command"  # its help was shown
        which = getattr(getattr(error, "ctx", None), "command_path", "prisma")
        note("Error", f"{message}{'' if message.endswith('?') else '.'} `{which} --help` lists what there is.")
        return 2
    return 0


def _failed(message: str, debug: bool, status: int = 1) -> int:
    if debug:
        traceback.print_exc()
    note("Error", message)
    return status


if __name__ == "__main__":
    sys.exit(main())
