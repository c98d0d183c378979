"""The commands ``prisma harvest``, which writes, ``top``, ``info`` and ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperGroup

from prisma_core.plugin import InputError, screen
from prisma_harvest.options import read_name, read_pos, read_source
from prisma_harvest.top_command import top

if TYPE_CHECKING:
    from prisma_harvest.manifest import Dtype
    from prisma_harvest.passes import OnError


class Writing(TyperGroup):
    """``prisma harvest REFERENCE`` is short for ``prisma harvest write REFERENCE``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        short = bool(args) and args[0] not in (*self.commands, "--help")
        return super().parse_args(ctx, ["write", *args] if short else args)


harvest_app = typer.Typer(
    cls=Writing,
    no_args_is_help=True,
    add_completion=False,
    help="Activations of many images: `prisma harvest REFERENCE --data ... --names ... --out DIR` writes them "
    "(`prisma harvest write --help` has all options).",
)
Json = Annotated[bool, typer.Option("--json", help="Write JSON.")]
Folder = Annotated[Path, typer.Argument(help="The folder of a harvest.")]
harvest_app.command("top")(top)


@harvest_app.command("write")
def write(
    reference: Annotated[str, typer.Argument(help="The model; `prisma models` lists what there is.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="A folder of images or videos, tar shards (`'shards-{000..009}.tar'`, a glob), `hf:NAME:SPLIT` of the "
            "library datasets, a folder that it saved, or `samples:N` of the model's own kind."
        ),
    ] = None,
    names: Annotated[
        list[str] | None, typer.Option(help="A hook point, glob, shorthand, or SHORTHAND:LAYER; again for more.")
    ] = None,
    pos: Annotated[
        str | None, typer.Option(help="Tokens: cls, patches, ..., or positions: 0,5.", show_default="all")
    ] = None,
    dtype: Annotated[str, typer.Option(help="On disk: bfloat16, float16 or float32.")] = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="Where the folder of the harvest goes.")] = None,
    batch: Annotated[int, typer.Option(help="Images at once.")] = 32,
    shard: Annotated[int | None, typer.Option(help="Images in a file.", show_default="about 128 MiB")] = None,
    limit: Annotated[int | None, typer.Option(help="Take only so many images.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that decode.", show_default="by cores")] = None,
    on_error: Annotated[str, typer.Option(help="An image that cannot be read: stop, or skip and list it.")] = "stop",
    image_column: Annotated[str | None, typer.Option(help="The key of the image.", show_default="the usual")] = None,
    label_column: Annotated[str | None, typer.Option(help="The key of the label.", show_default="the usual")] = None,
    data_name: Annotated[str, typer.Option(help="Tells data apart that begin alike.")] = "",
    device: Annotated[str | None, typer.Option(help="Where the model runs.", show_default="cpu")] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--no-pretrained", help="Load trained weights, or random ones (no download).")
    ] = True,
    ray: Annotated[str | None, typer.Option(help="Run on the Ray cluster at this address, or `local`.")] = None,
) -> None:
    """Write activations of a model over many images to a folder: resumable, any number of hook points in one pass."""
    lacking = [option for option, given in (("--data", data), ("--names", names), ("--out", out)) if not given]
    if lacking:
        raise InputError(f"A harvest needs {', '.join(lacking)}: `prisma harvest write --help` says what they are.")
    screen.check_output(out, folder=True)
    import prisma_core as prisma
    from prisma_harvest.writing import harvest

    model = prisma.load(reference, device=device, **({} if pretrained else {"pretrained": False}))
    written = harvest(
        model,
        read_source(cast(str, data), reference),
        [read_name(name) for name in names or ()],
        out=cast(Path, out),
        pos=read_pos(pos),
        dtype=cast("Dtype", dtype),
        batch=batch,
        shard=shard,
        limit=limit,
        workers=workers,
        on_error=cast("OnError", on_error),
        image_column=image_column,
        label_column=label_column,
        data_name=data_name,
        ray=ray,
    )
    skipped = sum(1 for _ in written.skipped())
    left_out = f" {skipped} could not be read: {written.path / 'skipped.jsonl'} lists them." if skipped else ""
    screen.note("harvest", f"{len(written)} examples.{left_out}", "green")
    screen.out().print(str(written.path), soft_wrap=True)


# -------------------------------------------------------------------- folders


@harvest_app.command("info")
def info(folder: Folder, as_json: Json = False) -> None:
    """Show what a harvest holds."""
    from prisma_harvest.opening import open_harvest

    acts = open_harvest(folder)
    manifest = acts.manifest
    size = sum(shard.path.stat().st_size for shard in acts.shards)
    skipped = sum(1 for _ in acts.skipped())
    if as_json:
        facts = {"path": str(acts.path), "examples": len(acts), "skipped": skipped, "bytes": size}
        screen.show_json(facts | {"manifest": manifest.model_dump(mode="json")})
        return
    model, data = manifest.model, manifest.data
    tokens = "all" if manifest.pos is None else manifest.pos
    rows = {
        "folder": acts.path,
        "model": f"{model.reference or model.kind}, weights {model.weights[:16]}, {model.dtype} on {model.device}",
        "data": f"{data.kind} {data.name}".strip() + f", fingerprint {data.fingerprint[:16]}",
        "examples": f"{len(acts)}, {skipped} skipped" if skipped else len(acts),
        "tokens": f"{tokens} of {manifest.layout.n_tokens}" if manifest.layout else tokens,
        "on disk": f"{size / 2**20:,.1f} MiB in {len(acts.shards)} shards, {manifest.dtype}",
        "batch": f"{manifest.batch} images",
        **({"note": manifest.note} if manifest.note else {}),
    }
    table = screen.table("", "")
    for name, value in rows.items():
        table.add_row(name, str(value))
    for point in acts.points:
        table.add_row("hook point", f"{point.name}: {point.axes} {list(point.shape)}")
    screen.show(table)


@harvest_app.command("verify")
def verified(folder: Folder, as_json: Json = False) -> None:
    """Show whether every byte of a harvest is as it was written."""
    from prisma_harvest.checking import verify
    from prisma_harvest.opening import open_harvest
    from prisma_harvest.progress import counting

    acts = open_harvest(folder)
    with counting("Verifying", len(acts), 0, None) as advance:
        problems = verify(folder, advance)
    if as_json:
        screen.show_json({"path": str(acts.path), "problems": problems})
    elif not problems:
        screen.note("verify", f"every byte of {len(acts)} examples is as it was written.", "green")
    for problem in problems if not as_json else ():
        screen.note("damaged", problem)
    if problems:
        raise typer.Exit(1)
