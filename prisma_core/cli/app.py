"""The ``prisma`` command. Commands of plugins join in; what goes wrong is said in one line."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Annotated, Any

import torch
import typer
from rich.text import Text

from prisma_core.cli.info import info
from prisma_core.cli.models import models, plugins
from prisma_core.errors import PrismaError, format_error
from prisma_core.host import Host, installed
from prisma_core.toolbox.screen import note, out, printable

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
    owners = dict.fromkeys(typer.main.get_group(app).commands, "Prisma")
    for theirs, plugin in plugins_of.commands(_new):
        for kind in ("registered_commands", "registered_groups"):
            try:
                for command in getattr(theirs, kind):
                    alone = _new()
                    getattr(alone, kind).append(command)
                    adds: Mapping[str, Any] = typer.main.get_group(alone).commands  # several of a group without a name
                    if problem := next(filter(None, (_problem(name, adds[name], owners) for name in adds)), None):
                        plugins_of.broke(plugin, problem)
                        continue
                    owners |= dict.fromkeys(adds, f"the plugin {plugin!r}")
                    getattr(app, kind).append(command)
            except Exception as problem:  # noqa: BLE001  # of any kind: what it left in typer's lists is no command
                plugins_of.broke(plugin, f"its commands cannot be read: {format_error(problem)}")
    return app


def _problem(name: str, command: Any, owners: Mapping[str, str]) -> str | None:
    """Say why a command of click's cannot join those that there are; None if it can."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        return f"{name!r} is no name of a command: expected letters, digits and hyphens"
    if name in owners:
        return f"the command {name!r} is taken by {owners[name]}"
    problem = _broken_help(command)
    return problem and f"the help of its command {name!r} cannot be shown: {problem}"


def _broken_help(command: Any) -> str | None:
    """Say what is wrong with the texts of a command's help, which would break the help of all; None if nothing is."""
    try:
        texts = [command.get_short_help_str() if not command.hidden else "", command.deprecated]
        for part in (command, *command.params):
            given = [getattr(part, name, None) for name in ("help", "short_help", "epilog", "rich_help_panel")]
            texts += [getattr(one, "value", one) for one in given]  # of typer's placeholder of what was not given
        for text in texts:
            if not isinstance(text, str | bool | None):
                return f"{text!r} is no text"
            if isinstance(text, str) and printable(text) != text:
                return f"{text!r} has letters that steer a terminal"
            Text.from_markup(text if isinstance(text, str) else "")
    except Exception as problem:  # noqa: BLE001  # of any kind: a class of commands may be the plugin's own
        return format_error(problem)
    return next(
        (problem for part in getattr(command, "commands", {}).values() if (problem := _broken_help(part))), None
    )


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
        except (KeyboardInterrupt, typer.Abort) as error:
            return _failed(f"interrupted {error}".rstrip() + ".", debug, 130)
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
    told = _tell_broken(())
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
    finally:
        _tell_broken(told)  # what came to light by the command
    return 0


def _tell_broken(told: Collection[str]) -> set[str]:
    """Write a line for each broken plugin that was not told of; return the names of all that are broken."""
    broken = {plugin.name: plugin for plugin in installed().infos.values() if plugin.error}
    for name, plugin in broken.items():
        if name not in told:
            note("plugin left out", f"{name} ({plugin.distribution}): {plugin.error}", "yellow")
    return set(broken)


def _failed(message: str, debug: bool, status: int = 1) -> int:
    if debug:
        traceback.print_exc()
    note("Error", message)
    return status


if __name__ == "__main__":
    sys.exit(main())
