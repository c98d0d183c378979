"""The command ``prisma train``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer


def add(app: typer.Typer) -> None:
    """Add ``train`` to the command line."""
    app.command(name="train")(train)


def train(
    data: Annotated[
        str | None, typer.Option(help="What to train on; --list shows what there is.", show_default="scenes")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Blocks.", show_default="3")] = None,
    d_model: Annotated[int | None, typer.Option(help="Width of the residual stream.", show_default="128")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads of a block.", show_default="4")] = None,
    attention_only: Annotated[bool, typer.Option("--attention-only", help="No MLPs.")] = False,
    mlp_ratio: Annotated[
        float | None, typer.Option(help="Width of the MLP over d_model; 0 for none.", show_default="2")
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option(
            help="What the head reads: avg, the mean of all tokens, or token, the class token.", show_default="avg"
        ),
    ] = None,
    registers: Annotated[int | None, typer.Option(help="Register tokens.", show_default="0")] = None,
    no_norm: Annotated[bool, typer.Option("--no-norm", help="No layer norm anywhere.")] = False,
    steps: Annotated[int | None, typer.Option(help="Batches to train on.", show_default="2000")] = None,
    batch: Annotated[int | None, typer.Option(help="Images in a batch.", show_default="32")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.", show_default="0.002")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of matrices.", show_default="0.03")] = None,
    patch_loss: Annotated[
        float | None,
        typer.Option(help="Weight of asking each patch for what it shows (scenes only).", show_default="1"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights and data.", show_default="0")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Of torch; part of what makes runs repeat exactly.", show_default="1")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Matrix products in bfloat16.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("toy-run"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, which knows its options.")
    ] = False,
    list_data: Annotated[bool, typer.Option("--list", help="List the data there is, and stop.")] = False,
) -> None:
    """Train a toy transformer on images drawn as it goes.

    The run can be killed at any moment: --resume goes on from the last saved state and ends with the very weights
    that an unbroken run ends with. Checkpoints, dense early, are folders that prisma.load("file:...") reads.
    """
    from prisma_core.plugin import screen

    console = screen.console()
    if list_data:
        _list(console)
        return
    given: dict[str, Any] = {
        "data": data,
        "layers": layers,
        "d_model": d_model,
        "heads": heads,
        "mlp_ratio": 0.0 if attention_only else mlp_ratio,
        "norm": False if no_norm else None,
        "pool": pool,
        "registers": registers,
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "weight_decay": weight_decay,
        "patch_loss": patch_loss,
        "seed": seed,
        "threads": threads,
        "bf16": bf16 or None,
    }
    _run(console, {name: value for name, value in given.items() if value is not None}, out, resume)


def _list(console: Any) -> None:
    from rich.table import Table

    from prisma_toy.tasks import TASKS

    table = Table("data", "asked for", "classes", "image", "patch")
    for one in TASKS.values():
        classes, size = str(len(one.labels) or "-"), " x ".join(map(str, one.shape))
        table.add_row(one.name, one.summary, classes, size, str(one.patch))
    console.print(table)


def _run(console: Any, given: dict[str, Any], out: Path, resume: bool) -> None:
    from rich import progress

    from prisma_core.plugin import holding, screen
    from prisma_toy.card import HELD_OUT, MODEL, finish, measured
    from prisma_toy.checkpoints import recent
    from prisma_toy.training import start

    screen.check_output(out, folder=True)
    with ExitStack() as held:
        if resume and out.is_dir():
            held.enter_context(holding(out))
        trainer = start(given, out, resume)
        if not resume:
            held.enter_context(holding(out))
        steps = trainer.config.steps
        if (figure := measured(trainer)) is not None:
            console.print(f"The run in {out} is finished: all {steps} steps, held-out {figure}.", soft_wrap=True)
            console.print(f'Load it with prisma.load("file:{out / MODEL}").', soft_wrap=True)
            return
        if trainer.step:
            console.print(f"Going on after step {trainer.step} of {steps} in {out}.")
        columns = (
            progress.TextColumn("[bold]{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[so_far]}"),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
        )
        loss, score = recent(trainer.folder)  # of a run that goes on, what its log says
        try:
            with progress.Progress(*columns, console=console) as bar:
                line = bar.add_task(trainer.task.name, total=steps, completed=trainer.step, so_far="")
                for done in trainer.run():
                    loss = done.loss if loss is None else 0.95 * loss + 0.05 * done.loss
                    score = done.score if score is None else 0.95 * score + 0.05 * done.score
                    bar.update(line, completed=done.step, so_far=f"loss {loss:.3f}  right {score:.0%}")
        except KeyboardInterrupt:
            console.print(f"Stopped. `prisma train --out {out} --resume` goes on as if nothing had happened.")
            raise typer.Exit(130) from None
        with progress.Progress(*columns, console=console) as bar:
            line = bar.add_task("measuring", total=HELD_OUT, so_far="on held-out images")
            final = finish(trainer, progress=lambda seen: bar.update(line, completed=seen))
        console.print(f"Held-out {trainer.task.objective.measure}: {final}.", soft_wrap=True)
        console.print(f'Load it with prisma.load("file:{out / MODEL}").', soft_wrap=True)
