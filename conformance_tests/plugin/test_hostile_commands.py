"""A plugin's command that would break the others, or the help, is left out, and told by its plugin's name."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import typer

from prisma_core.cli.app import build
from prisma_core.host import Host

Found = Callable[..., EntryPoint]


def _odd_class(name: str) -> type:
    from typer.core import TyperCommand

    def fails(self: Any, *args: Any, **how: Any) -> Any:
        raise RuntimeError(f"no {name}")

    attribute = property(fails, lambda self, value: None) if name == "hidden" else fails
    return type("Odd", (TyperCommand,), {name: attribute})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": 3}, ""),
        ({"name": "--help"}, "'--help' is no name of a command"),
        ({"name": "mod els"}, "'mod els' is no name"),
        ({"name": "bi\u202edi"}, "is no name"),
        ({"name": "models"}, "the command 'models' is taken by Prisma"),
        ({"cls": int}, "its commands cannot be read: TypeError"),
        ({"cls": _odd_class("hidden")}, "no hidden"),
        ({"cls": _odd_class("get_short_help_str")}, "no get_short_help_str"),
        ({"rich_help_panel": "[/nope]"}, "closing tag"),
        ({"help": "clear \x1b[2J"}, "has letters that steer a terminal"),
    ],
)
def test_a_command_that_would_break_the_others(
    found: Found, options: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def commands(app: typer.Typer) -> None:
        app.command(**{"name": "mine", **options})(lambda: None)

    def other(app: typer.Typer) -> None:
        @app.command()
        def other() -> None:
            """Show."""

    plugins = Host([found("bad", prisma_commands=commands), found("good", prisma_commands=other)])
    typer.main.get_command(build(plugins)).main(args=["--help"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "other" in shown
    assert "models" in shown
    assert words in (plugins.infos["bad"].error or "nothing")
    assert plugins.infos["bad"].error is not None
    assert plugins.infos["good"].error is None


def test_a_group_without_a_name_takes_no_command(found: Found) -> None:
    def commands(app: typer.Typer) -> None:
        group = typer.Typer()
        group.command("info")(lambda: None)
        app.add_typer(group)

    plugins = Host([found("bad", prisma_commands=commands)])
    command: Any = typer.main.get_command(build(plugins))
    assert plugins.infos["bad"].error == "the command 'info' is taken by Prisma"
    assert command.commands["info"].help.startswith("Show a model's facts")
