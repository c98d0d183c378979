"""The files of a gallery: a page, scripts with the data of some units each, and sheets of small images.

A page opened from disk may load scripts and images that lie beside it, but read no other file: so data are scripts.

    index.html                        the page
    data-3f2a9c10/index.js            of every unit what the overview sorts and searches
    data-3f2a9c10/units-0003.js       all that is shown of units 150 to 199
    data-3f2a9c10/0012.jpg            64 small images

The page names its folder, and is replaced last: after a kill it shows the old gallery or the new one.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from prisma_core import InputError, Result
from prisma_core.plugin import UnknownName, locked, read_text, replacing, write_text
from prisma_view.colours import SCALE
from prisma_view.gallery_images import Shown
from prisma_view.gallery_units import About
from prisma_view.images import data_uri
from prisma_view.pages import rendered
from prisma_view.words import token_name

CHUNK = 50
"""Units in a script."""
ACROSS = 8
"""Small images in a row, and rows, of a sheet."""
_QUALITY = 82


def write(out: Path, title: str, kind: str, names: tuple[str, ...], top: Result, shown: Shown, facts: About) -> Path:
    """Write a gallery, in the place of one that is there, and return the path of its page.

    Raises:
        InputError: the folder holds something else, or cannot be made.
        LoadError: the disk is full, read-only, or refuses in another way.
    """
    page, name = out / "index.html", f"data-{secrets.token_hex(4)}"
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not _folders(out)):
        raise InputError(f"{out} holds something else than a gallery: give a new or empty folder with out=.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot write into {out}: {error.strerror}. Give another folder with out=.") from error
    with locked(out):
        old = _folders(out)
        with replacing(out / name) as data:
            data.mkdir()
            for at, sheet in enumerate(_sheets(shown.thumbs)):
                sheet.save(data / f"{at:04d}.jpg", quality=_QUALITY, optimize=True)
            for at, start in enumerate(range(0, len(names), CHUNK)):
                units = [_unit(unit, top, shown, facts) for unit in range(start, min(start + CHUNK, len(names)))]
                text = f"prismaGallery.chunk({at},{_json(units)});\n"
                (data / f"units-{at:04d}.js").write_text(text, encoding="utf-8")
            index = _index(title, kind, names, top, shown, facts)
            (data / "index.js").write_text(f"prismaGallery.index({_json(index)});\n", encoding="utf-8")
        write_text(page, _page(title, folder=name))
        for each in old:
            shutil.rmtree(each, ignore_errors=True)
    return page


def data_folder(page: Path) -> Path:
    """Return the folder of scripts and sheets that a gallery's page names."""
    return page.parent / re.findall(r'src="(data-[0-9a-f]{8})/index\.js"', read_text(page))[-1]


def _folders(out: Path) -> list[Path]:
    return [path.parent for path in out.glob("data-" + "[0-9a-f]" * 8 + "/index.js")]


def unit_page(page: Path, unit: int) -> str:
    """Return a page of one unit of a written gallery, with its images inside.

    Raises:
        UnknownName: the gallery has no such unit.
    """
    data = data_folder(page)
    index = _read(data / "index.js")
    if not 0 <= unit < index["n"]:
        raise UnknownName(f"No {index['kind']} {unit}: they run from 0 to {index['n'] - 1}.")
    made = _read(data / f"units-{unit // CHUNK:04d}.js")[unit % CHUNK]
    made.pop("similar", None)  # of other pages
    wide, tall = index["size"]
    thumbs = []
    for at, row in enumerate(made["top"]):
        place = row[0] % ACROSS**2
        left, top = place % ACROSS * wide, place // ACROSS * tall
        with Image.open(data / f"{row[0] // ACROSS**2:04d}.jpg") as sheet:
            thumbs.append(sheet.crop((left, top, left + wide, top + tall)))
        row[0] = at
    names = [f"{unit} {index['names'][unit]}".strip()]
    one = {
        **index, "n": 1, "chunk": CHUNK, "thumbs": len(thumbs), "names": names,
        "sheets": [data_uri(sheet) for sheet in _sheets(thumbs)],
        **{name: index[name][unit : unit + 1] for name in ("search", "largest", "mean", "share")},
        "why": {name: reason for name, reason in index["why"].items() if name != "similar units"},
    }  # fmt: skip
    inside = _json({**one, "units": [made]}).replace("<", "\\u003c")
    return _page(index["title"], inside=inside)


def _read(script: Path) -> Any:
    """Return the data of a script: the last argument of its one call."""
    text = read_text(script)
    return json.loads(f"[{text[text.index('(') + 1 : text.rindex(')')]}]")[-1]


def _page(title: str, *, folder: str | None = None, inside: str | None = None) -> str:
    """Return the page of a gallery whose data lie in a folder, or of one unit whose data are ``inside``."""
    return rendered("gallery.html.j2", title=title, data=json.dumps({"scale": SCALE}), folder=folder, inside=inside)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("\u2028", " ").replace("\u2029", " ")


def _sheets(thumbs: list[Image.Image]) -> list[Image.Image]:
    sheets = []
    for start in range(0, len(thumbs), ACROSS**2):
        group = thumbs[start : start + ACROSS**2]
        wide, tall = group[0].size
        sheet = Image.new("RGB", (wide * ACROSS, tall * -(-len(group) // ACROSS)), (128, 128, 128))
        for at, thumb in enumerate(group):
            sheet.paste(thumb, (at % ACROSS * wide, at // ACROSS * tall))
        sheets.append(sheet)
    return sheets


def _index(title: str, kind: str, names: tuple[str, ...], top: Result, shown: Shown, facts: About) -> dict[str, Any]:
    counts = top.tensors["histogram"].sum(1).clamp_min(1)
    return {
        "title": title,
        "kind": kind,
        "unit": top.unit or "activation",
        "n": len(names),
        "chunk": CHUNK,
        "across": ACROSS,
        "thumbs": len(shown.thumbs),
        "size": list(shown.thumbs[0].size),
        "grid": list(shown.heat.shape[2:]),
        "names": list(names),
        "largest": [_number(x) for x in top.values[:, 0].tolist()],
        "mean": [_number(x) for x in top.tensors["mean"].tolist()],
        "share": [_number(x) for x in (top.tensors["positive"] / counts).tolist()],
        "search": [_words(unit, top, facts) for unit in range(len(names))],
        "edges": [round(x, 4) for x in top.tensors["edges"].tolist()],
        "seen": top.facts.get("seen", 0),
        "note": ("Its mean output at its top tokens" if kind == "head" else "One unit of it")
        + ", written at every token, adds this to the logits by the frozen path to the head.",
        "why": facts.why,
    }


def _words(unit: int, top: Result, facts: About) -> str:
    """Return what a unit is found by, besides its number and name."""
    examples = [_called(top, int(each)) for each in top.tensors["example"][unit, :3] if each >= 0]
    parts = [each[unit][:3] if each else [] for each in (facts.effects, facts.words)]
    return " · ".join(dict.fromkeys([name for part in parts for name, _ in part] + examples))


def _unit(unit: int, top: Result, shown: Shown, facts: About) -> dict[str, Any]:
    made: dict[str, Any] = {"top": [], "histogram": top.tensors["histogram"][unit].tolist()}
    for name in ("effects", "words", "similar"):
        rows = getattr(facts, name)
        if rows:
            made[name] = [[each, _number(value)] for each, value in rows[unit]]
    for rank in range(top.values.shape[1]):
        if shown.thumb[unit, rank] < 0 or not top.values[unit, rank]:  # at 0 a unit is off: no image is its top
            continue
        heat: np.ndarray = shown.heat[unit, rank]
        made["top"].append(
            [
                int(shown.thumb[unit, rank]),
                _number(float(top.values[unit, rank])),
                _spoken(shown, int(top.tensors["token"][unit, rank]), shown.spot[unit, rank].tolist()),
                shown.spot[unit, rank].tolist(),
                _called(top, int(top.tensors["example"][unit, rank])),
                base64.b64encode(heat.tobytes()).decode(),
            ]
        )
    return made


def _spoken(shown: Shown, token: int, spot: list[int]) -> str:
    frame, row, column = spot
    if row < 0:
        name = shown.names[token]
        return token_name(name) if name in ("cls", "dist") or name.startswith("reg") else name
    in_frame = f"frame {frame + 1}, " if any(each.startswith("f") for each in shown.names) else ""
    return f"{in_frame}row {row + 1}, column {column + 1}"


def _called(top: Result, example: int) -> str:
    """Return what an image is called: its label and path, else its number."""
    line = top.facts["examples"][str(example)]
    parts = [str(line[key]) for key in ("label", "path") if line.get(key) is not None]
    return ", ".join(parts) or f"image {example}"


def _number(value: float) -> float:
    return float(f"{value:.4g}")
