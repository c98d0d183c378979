"""The commands ``prisma lens``, ``prisma attribute`` and ``prisma heads``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prisma_core import InputError, hookimpl
from prisma_core.plugin import screen

if TYPE_CHECKING:
    from torch import Tensor

    from prisma_core import HookedModel, Result

REFERENCE = Annotated[str, typer.Argument(help="SOURCE:MODEL, such as toy:scenes-3l.", show_default=False)]
IMAGES = Annotated[
    list[Path] | None, typer.Option("--image", help="An image; may be given again.", show_default="a sample")
]
TARGETS = Annotated[
    list[str] | None,
    typer.Option("--of", help="A class, by label or index; of a dual encoder a text. May be given again."),
]
AGAINST = Annotated[str | None, typer.Option(help="A class or text that is subtracted.")]
JSON = Annotated[bool, typer.Option("--json", help="Write JSON.")]
OUT = Annotated[Path | None, typer.Option(help="Keep the whole result in this .safetensors file (Result.load).")]
TRAINED = Annotated[
    bool, typer.Option("--pretrained/--no-pretrained", help="Load trained weights, or random ones (no download).")
]


@hookimpl
def prisma_commands(app: typer.Typer) -> None:
    for command in (lens, attribute, heads):
        app.command()(command)


def lens(
    reference: REFERENCE,
    image: IMAGES = None,
    of: TARGETS = None,
    against: AGAINST = None,
    top: Annotated[int, typer.Option(min=1, help="Readings shown of each layer.")] = 3,
    as_json: JSON = False,
    out: OUT = None,
    pretrained: TRAINED = True,
) -> None:
    """Show what the model reads of its tokens after every layer: the logit lens."""
    from prisma_lens.lens import logit_lens

    if against is not None and of is None:
        raise InputError(f"--against {against} is subtracted from what --of names: give both.")
    model, images = _opened(reference, image, pretrained, out)
    found = logit_lens(model, images, _target(model, of), against=None if against is None else _one(against))
    _saved(found, out)
    names, tokens = found.names("class"), found.names("pos")
    single = len(names) == 1
    prefix = [at for at, token in enumerate(tokens) if token == "cls"]
    patches = [at for at, token in enumerate(tokens) if token not in ("cls", "dist") and not token.startswith("reg")]
    rows: list[dict[str, Any]] = []
    for at, layer in enumerate(found.names("layer")):
        logits = found.values[at]
        row: dict[str, Any] = {"layer": layer}
        for token in prefix:
            best = logits[:, token].mean(0).topk(min(top, len(names)))
            row["cls"] = {
                names[i]: round(v, 3) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            }
        seen = logits[:, patches].flatten(0, -2)
        if single:
            where = seen[..., 0].topk(min(top, len(seen)))
            row["patches"] = {
                tokens[patches[i % len(patches)]]: round(v, 3)
                for i, v in zip(where.indices.tolist(), where.values.tolist(), strict=True)
            }
        else:
            common = Counter(seen.argmax(-1).tolist()).most_common(top)
            row["patches"] = {names[i]: round(n / len(seen), 3) for i, n in common}
        rows.append(row)
    if as_json:
        screen.show_json({"reference": reference, "images": len(images), "layers": rows})
        return
    second = f"patches that read {names[0]} highest (logit)" if single else "highest reading of patches (share of them)"
    shown = screen.table("layer", *(["class token (logit)"] if prefix else []), second, title=reference)
    for row in rows:
        shown.add_row(row["layer"], *([_told(row["cls"])] if prefix else []), _told(row["patches"], share=not single))
    screen.show(shown)
    _random(pretrained)


def attribute(
    reference: REFERENCE,
    image: IMAGES = None,
    of: TARGETS = None,
    against: AGAINST = None,
    by: Annotated[str, typer.Option(help="layer, head, neuron, source, or 'head source'.")] = "layer",
    top: Annotated[int, typer.Option(min=1, help="Components shown.")] = 10,
    as_json: JSON = False,
    out: OUT = None,
    pretrained: TRAINED = True,
) -> None:
    """Show which layers, heads, neurons or source tokens wrote a logit. Without --of, the highest one."""
    import torch

    from prisma_core import HookedDual
    from prisma_lens.attribute import attribute as study

    model, images = _opened(reference, image, pretrained, out)
    target: Any = _target(model, of)
    if target is None:
        if isinstance(model, HookedDual):
            raise InputError(f"{reference} is a dual encoder: say what is explained, such as --of 'a photo of a cat'.")
        with torch.no_grad():
            target = int(model(images).flatten(0, -2).mean(0).argmax())  # of all tokens, where each has its own
    found = study(model, images, target, against=None if against is None else _one(against), by=by)  # type: ignore[arg-type]
    _saved(found, out)
    axes, values = list(found.axes), found.values.mean(found.axes.index("batch"))
    axes.remove("batch")
    rows = [
        {**dict(zip(axes, place, strict=True)), "value": round(value, 5)}
        for place, value in _mean(found, values, axes).top(top)
    ]
    totals = {name: [round(each, 5) for each in x.flatten(0, -2).mean(0).tolist()] for name, x in found.tensors.items()}
    classes = list(found.names("class"))
    if as_json:
        about = {"reference": reference, "images": len(images), "by": by, "classes": classes, "unit": found.unit}
        screen.show_json({**about, "top": rows, **totals})
        return
    shown = screen.table(*axes, "logit", title=f"{reference}: {', '.join(classes)}")
    for row in rows:
        *place, value = row.values()
        shown.add_row(*map(str, place), f"{value:+.4f}")
    screen.show(shown)
    _random(pretrained)


def heads(
    reference: REFERENCE,
    image: IMAGES = None,
    top: Annotated[int, typer.Option(min=1, help="Heads shown of each kind.")] = 3,
    as_json: JSON = False,
    out: OUT = None,
    pretrained: TRAINED = True,
) -> None:
    """Show which heads attend to corners, edges, rows, columns, neighbours, the class token, registers."""
    from prisma_lens.heads import head_scores
    from prisma_lens.inputs import vision_of

    model, images = _opened(reference, image, pretrained, out)
    found = head_scores(vision_of(model), images)
    _saved(found, out)
    baseline = found.tensors["baseline"].tolist()
    kinds = [
        {
            "kind": kind,
            "uniform": round(baseline[at], 4),
            "heads": {"".join(place): round(v, 4) for place, v in found.sel(kind=kind).top(top, by_size=False)},
        }
        for at, kind in enumerate(found.names("kind"))
    ]
    if as_json:
        screen.show_json({"reference": reference, "images": len(images), "kinds": kinds})
        return
    shown = screen.table("kind", "heads (share of attention)", "uniform attention", title=reference)
    for row in kinds:
        shown.add_row(str(row["kind"]), _told(row["heads"], share=True), f"{row['uniform']:.1%}")
    screen.show(shown)
    _random(pretrained)


# -------------------------------------------------------------------- what they share


def _opened(reference: str, images: list[Path] | None, pretrained: bool, out: Path | None) -> tuple[Any, Tensor]:
    """Return a model and its images; what cannot be read or written is told before anything is loaded."""
    import prisma_core as prisma
    from prisma_core.plugin import open_image

    screen.check_output(out, ".safetensors")
    for path in images or []:
        open_image(path)
    model: Any = prisma.load(reference, **({} if pretrained else {"pretrained": False}))
    if not model.preprocess:
        raise InputError("This model does not know how to read images: set model.preprocess, and call prisma_lens.")
    return model, model.preprocess(list(images) if images else [_sample(reference)])


def _sample(reference: str) -> Any:
    from prisma_core.plugin import installed

    name, _, rest = reference.partition(":")
    source = installed().sources().get(name)
    sample = None if source is None else source.sample(rest, 0)
    if sample is None:
        raise InputError(f"{name} offers no sample image: give one with --image FILE.")
    return sample


def _target(model: HookedModel, of: list[str] | None) -> Any:
    from prisma_core import HookedDual

    if of is None:
        if isinstance(model, HookedDual):
            raise InputError("This is a dual encoder: say what is read, such as --of 'a photo of a cat' --of 'a dog'.")
        return None
    return list(of) if isinstance(model, HookedDual) else [_one(each) for each in of]


def _one(given: str) -> int | str:
    return int(given) if given.lstrip("-").isdecimal() else given


def _mean(found: Result, values: Tensor, axes: list[str]) -> Result:
    from prisma_core import Result

    return Result(values, tuple(axes), {axis: found.labels[axis] for axis in axes if axis in found.labels})


def _saved(found: Result, out: Path | None) -> None:
    if out is not None:
        found.save(out)
        screen.note("Written", str(out), "green")


def _told(values: Any, *, share: bool = False) -> str:
    return ", ".join(f"{name} {value:.1%}" if share else f"{name} {value:+.2f}" for name, value in values.items())


def _random(pretrained: bool) -> None:
    if not pretrained:
        screen.note("Random weights", "the model was not trained, so nothing it says was learned.", "yellow")
