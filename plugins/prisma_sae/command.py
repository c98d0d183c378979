"""The commands ``prisma sae list``, ``load``, ``eval`` and ``train``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from prisma_core import UnknownName
from prisma_core.plugin import format_fields, screen

sae = typer.Typer(help="Sparse coders: list, load, measure, train.", no_args_is_help=True, add_completion=False)
Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
Images = Annotated[list[Path] | None, typer.Argument(help="Images, or folders of them; default samples of the source.")]


@sae.command("list")
def listed(
    word: Annotated[str | None, typer.Argument(help="What the name, the model or the place contains.")] = None,
    json: Json = False,
) -> None:
    """List the published coders that are known, with what they were published with."""
    from prisma_sae.published import catalogue, figures_of

    everything = catalogue()
    wanted = (word or "").lower()
    chosen = [each for each in everything if any(wanted in part.lower() for part in (each.name, each.model, each.hook))]
    if not chosen:
        raise UnknownName(f"No coder matches {word!r}. `prisma sae list` lists all {len(everything)}.")
    if json:
        screen.show_json([each.model_dump() for each in chosen])
        return
    table = screen.table("name", "model", "place", "tokens", "kind", "features", "L0", "explained")
    for row in figures_of(chosen):
        table.add_row(*row)
    screen.show(table)
    screen.note("Note", f"{len(chosen)} of {len(everything)} coders.", style="dim")


@sae.command("load")
def loaded(
    name: Annotated[str, typer.Argument(help="A name of `prisma sae list`, or a file or folder.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write it into, in SAELens' layout.")] = None,
    file: Annotated[str | None, typer.Option(help="Which of several files of its repository.")] = None,
    json: Json = False,
) -> None:
    """Fetch a coder, read it without running anything in it, and show its facts."""
    from prisma_sae.formats.sae_lens import save
    from prisma_sae.published import open_coder

    screen.check_output(out, folder=True)
    coder = open_coder(name, file=file)
    facts = coder.facts.model_dump(mode="json", exclude={"more", "labels"})
    if json:
        screen.show_json(facts)
    else:
        table = screen.table("fact", "value")
        for key, value in facts.items():
            if value not in (None, "", [], {}):
                several = isinstance(value, dict)
                table.add_row(key, ", ".join(f"{k} {v:g}" for k, v in value.items()) if several else str(value))
        screen.show(table)
    _note(coder)
    if out is not None:
        folder = save(coder, out)
        screen.note("Written", f"to {folder}; read({str(folder)!r}) reads it.", style="green")


@sae.command("eval")
def evaluated(
    name: Annotated[str, typer.Argument(help="A name of `prisma sae list`, or a file or folder.")],
    images: Images = None,
    model: Annotated[str | None, typer.Option(help="The model.", show_default="the one it was trained on")] = None,
    hook: Annotated[str | None, typer.Option(help="The hook point.", show_default="the coder's own")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="How many samples, where no images are given.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Images of a pass.")] = 16,
    template: Annotated[str, typer.Option(help="Of a pair of towers: a class's sentence.")] = "a photo of a {}.",
    force: Annotated[bool, typer.Option("--force", help="Measure it where it was not trained.")] = False,
    json: Json = False,
) -> None:
    """Measure a coder in its model, beside the figures that it was published with.

    Images in folders that are named as the model names its classes have labels: then the loss is measured too. Of a
    pair of towers the folders' names are the classes, each in a sentence.
    """
    from prisma_sae.evaluate import beside, evaluate
    from prisma_sae.published import open_coder

    coder = open_coder(name)
    reference = _reference(model or coder.facts.model)
    subject = _model(reference)
    with _bar("measuring") as bar:
        batches, total, texts = _batches(subject, reference, images, n, batch, template)
        line = bar.add_task("images", total=total)
        shown: Any = lambda seen: bar.update(line, completed=seen)  # noqa: E731
        result = evaluate(subject, coder, batches, texts=texts, hook=hook, force=force, progress=shown)
    rows = beside(result, coder.facts.figures)
    if json:
        screen.show_json({measure: {"here": here, "published": figure} for measure, here, figure in rows})
        return
    table = screen.table("measure", "here", "published")
    for measure, here, figure in rows:
        table.add_row(measure, f"{here:.4g}", "" if figure is None else f"{figure:.4g}")
    screen.show(table)
    screen.note("Note", f"{result.facts['images']} images, {result.facts['tokens']} tokens.", style="dim")
    _note(coder)


@sae.command("train")
def trained(
    model: Annotated[str, typer.Argument(help="The model; `prisma models` lists what there is.")],
    images: Images = None,
    hook: Annotated[str, typer.Option(help="The hook point to train on, as in blocks.1.hook_resid_post.")] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="Folder of the coder.")] = Path("coder"),
    harvest: Annotated[Path | None, typer.Option(help="A harvest to read rows from, instead of images.")] = None,
    kind: Annotated[str, typer.Option(help="topk, batchtopk, jumprelu, matryoshka or archetypal.")] = "topk",
    d_sae: Annotated[int | None, typer.Option(min=1, help="Features.", show_default="8 times the width")] = None,
    k: Annotated[int, typer.Option(min=1, help="Features on at once.")] = 16,
    tokens: Annotated[
        str | None, typer.Option(help="all, cls or patches.", show_default="all, or those of the harvest")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Batches to train on.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 1024,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Of weights and order.")] = 0,
    resume: Annotated[
        Path | None, typer.Option(help="A .pt file that keeps the training so far; go on from it.")
    ] = None,
) -> None:
    """Train a coder on a model's activations, and write it in SAELens' layout.

    Rows come from a harvest, or from passes over images; samples of the model's source are drawn as it goes.
    """
    from prisma_core import InputError
    from prisma_sae.binding import model_digest
    from prisma_sae.formats.sae_lens import save
    from prisma_sae.training import TrainConfig, library, train

    library()  # before anything long
    screen.check_output(out, folder=True)
    screen.check_output(resume, ".pt")
    if tokens not in (None, "all", "cls", "patches"):
        raise InputError(f"Expected tokens all, cls or patches, got {tokens!r}.")
    subject = _model(model)
    acts = None if harvest is None else _harvest(harvest, subject, tokens)
    tokens = tokens or (acts.manifest.pos if acts is not None else None) or "all"
    rows = _rows(subject, model, hook, images, acts, tokens, batch, seed)
    first = next(rows)
    try:
        config = TrainConfig(kind=kind, d_sae=d_sae or 8 * first.shape[1], k=k, lr=lr, seed=seed)  # type: ignore[arg-type]
    except ValidationError as error:
        raise InputError(f"These options do not fit: {format_fields(error)}.") from error
    place = subject.resolve([hook])[0]
    about = {"model": model, "weights": model_digest(subject), "hook": place, "tokens": tokens}
    with _bar("training") as bar:
        line = bar.add_task(kind, total=steps)

        def shown(step: int, losses: Any) -> None:
            bar.update(line, completed=step, description=f"{kind}  loss {losses['']:.4g}")

        coder = train(_with_first(first, rows), config, steps=steps, about=about, progress=shown, resume=resume)
    folder = save(coder, out)
    screen.note("Written", f"to {folder}. Measure it: prisma sae eval {folder}", style="green")


# -------------------------------------------------------------------- parts


def _note(coder: Any) -> None:
    if note := coder.facts.more.get("note"):
        screen.note("Note", note, style="dim")


def _reference(model: str | None) -> str:
    from prisma_core import InputError

    if model is None:
        raise InputError("This coder does not say which model it was trained on: give --model REFERENCE.")
    return model


def _model(reference: str) -> Any:
    import prisma_core as prisma

    model = prisma.load(reference)
    if not getattr(model, "preprocess", None):
        raise prisma.InputError(f"{reference} does not know how to read images, so there is nothing to measure it on.")
    return model


def _bar(what: str) -> Any:
    from rich import progress

    columns = (
        progress.TextColumn("[bold]{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    console = screen.console(stderr=True)
    return progress.Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def _files(images: list[Path]) -> list[tuple[Path, str]]:
    """Return images with the folder that names their class: of a folder, the first one inside, or itself."""
    from prisma_harvest.sources import open_data

    from prisma_core import InputError

    files = list[tuple[Path, str]]()
    for each in images:
        if not each.is_dir():
            files.append((each, each.absolute().parent.name))
            continue
        data = open_data(each)
        if data.kind != "folder" or data.n is None or data.get is None:
            raise InputError(f"{each} holds tar shards: expected a folder of images.")
        files += [(item.image, item.label or each.absolute().name) for item in map(data.get, range(data.n))]
    return files


def _sample(reference: str, seed: int) -> Any:
    from prisma_core import InputError
    from prisma_core.plugin import installed

    source, _, rest = reference.partition(":")
    sources = installed().sources()
    image = sources[source].sample(rest, seed) if source in sources else None
    if image is None:
        raise InputError(f"{source}: draws no samples: give images, or a folder of them.")
    return image


def _batches(
    model: Any, reference: str, images: list[Path] | None, n: int, batch: int, template: str
) -> tuple[Any, int, Any]:
    """Return batches of inputs, with labels where folders name classes, how many images there are, and the tokens of
    the classes' prompts, of a pair of towers."""
    import torch

    from prisma_core import HookedDual, InputError

    if "{}" not in template:
        raise InputError(f"Expected a sentence with {{}} where the class goes, got {template!r}.")
    if not images:
        parts = [range(n)[start : start + batch] for start in range(0, n, batch)]
        drawn = _Again(lambda: (model.preprocess([_sample(reference, seed) for seed in part]) for part in parts))
        return drawn, n, None
    files = _files(images)
    folders = [folder for _, folder in files]
    pair = isinstance(model, HookedDual)
    classes = sorted(set(folders)) if pair else list(getattr(model, "labels", None) or ())
    others = [folder for folder in folders if folder not in classes] if len(classes) > 1 else folders
    if others and any(each.is_dir() for each in images):
        screen.note("Note", f"no loss, for folders name no class of this model: {others[0]}.", "dim")

    def made() -> Any:
        for start in range(0, len(files), batch):
            inputs = model.preprocess([path for path, _ in files[start : start + batch]])
            known = [] if others else [classes.index(folder) for folder in folders[start : start + batch]]
            yield (inputs, torch.tensor(known)) if known else inputs

    texts = None
    if pair and not others:
        texts = model.tokens([template.replace("{}", name) for name in classes])
    return _Again(made), len(files), texts


@dataclass
class _Again:
    """What a function makes each time that it is read."""

    make: Callable[[], Iterator[Any]]

    def __iter__(self) -> Iterator[Any]:
        return self.make()


def _harvest(path: Path, model: Any, tokens: str | None) -> Any:
    """Return a harvest, open, if it is of this model and of these tokens."""
    from prisma_core import InputError, PluginError

    try:
        from prisma_harvest.opening import open_harvest
    except ImportError as error:
        raise PluginError("Reading a harvest needs prisma_harvest, which is not installed.") from error
    acts = open_harvest(path)
    acts.check_model(model)
    read = "all" if acts.manifest.pos is None else acts.manifest.pos
    if read not in ("all", "cls", "patches") or tokens not in (None, read):
        raise InputError(f"{acts.path} holds the tokens {read!r}; asked for: {tokens or 'all, cls or patches'}.")
    return acts


def _rows(
    model: Any,
    reference: str,
    hook: str,
    images: list[Path] | None,
    harvest: Any,
    tokens: str,
    batch: int,
    seed: int,
) -> Any:
    """Yield rows without an end: of a harvest, of files again and again, or of samples."""
    import itertools

    from prisma_core import InputError
    from prisma_sae.rows import activation_rows

    for round_ in itertools.count(seed) if harvest is not None else ():
        one = None
        for one in harvest.rows(hook, batch, shuffle=True, seed=round_, drop_last=True):
            yield one
        if one is None:
            raise InputError(f"{harvest.path} holds fewer than {batch} rows of {hook}: give a smaller --batch.")
    files, size = _files(images or []), 16

    def inputs(index: int) -> Any:
        start = index * size
        if not images:
            return model.preprocess([_sample(reference, seed) for seed in range(start, start + size)])
        return model.preprocess([files[at % len(files)][0] for at in range(start, start + size)])

    yield from activation_rows(model, inputs, hook, tokens=tokens, batch=batch, buffer=8 * batch, seed=seed)  # type: ignore[arg-type]


def _with_first(first: Any, rows: Any) -> Any:
    yield first
    yield from rows
