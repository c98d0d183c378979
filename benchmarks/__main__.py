"""Time Prisma: every cell is the ratio of two sides that run in turn in one process.

python benchmarks                                     every group, every cell; hours on two cores
python benchmarks passes --models vit_base_patch32_224 --batches 1 8 --budget 15
python benchmarks peers                               makes an environment for the other libraries first
python benchmarks sweeps --write                      also into docs/speed.md
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from timing import Options, Row, conditions

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "speed.md"
GROUPS = {
    "passes": "plain, with caches of several sizes, with gradients, compiled",
    "sweeps": "all heads patched, against hooks on timm and against the passes that must be made",
    "starts": "import and load, as whole processes",
    "harvest": "harvests against bare loops, shuffled reading against reading in order",
    "peers": "nnsight, torchlens and TransformerLens on the same weights",
}
COLUMNS = ("model", "batch", "what", "against", "ratio", "seconds", "runs")
console = Console(soft_wrap=True, stderr=True)


def cells(row: Row) -> list[str]:
    """Return a row as text, in the order of the columns."""
    note = f" ({row.note})" if row.note else ""
    ratio = "-" if row.ratio is None else f"{row.ratio:.3f}"
    batch = str(row.batch) if row.batch else ""
    return [row.model, batch, row.what, row.against + note, ratio, f"{row.seconds or '-'}", f"{row.runs or '-'}"]


def among_peers(folder: Path) -> Path:
    """Return the Python of an environment that has the other libraries, made if it is not there."""
    python = folder / "bin" / "python"
    if not python.is_file():
        console.print(f"installing the other libraries into {folder}")
        venv.create(folder, with_pip=True)
        libraries = importlib.import_module("peers").LIBRARIES
        subprocess.run([python, "-m", "pip", "install", "-q", "-e", f"{ROOT}[timm]", *libraries], check=True)
    return python


def elsewhere(folder: Path, arguments: list[str]) -> tuple[str, list[Row]]:
    """Run the comparison with other libraries in its own environment."""
    with tempfile.TemporaryDirectory() as out:
        found = Path(out) / "rows.json"
        command = [among_peers(folder), Path(__file__).parent, "peers", *arguments, "--json", found]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        answer = json.loads(found.read_text(encoding="utf-8"))["peers"]
    return answer["conditions"], [Row(**row) for row in answer["rows"]]


def shown(rows: Iterator[Row]) -> list[Row]:
    """Return the rows, each printed as soon as it is there."""
    kept: list[Row] = []
    for row in rows:
        console.print("  ".join(each for each in cells(row) if each))
        kept.append(row)
    return kept


def write(group: str, title: str, rows: list[Row]) -> None:
    """Put a group's table into the page of the docs."""
    begin, end = f"<!-- {group}: written by python benchmarks --write -->\n", f"<!-- end of {group} -->\n"
    lines = [f"{title}:", "", f"| {' | '.join(COLUMNS)} |", "| --- | ---: | --- | --- | ---: | ---: | ---: |"]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(begin)
    PAGE.write_text(before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1], encoding="utf-8")


def main() -> None:
    listed = "\n".join(f"  {name:8} {what}" for name, what in GROUPS.items())
    parser = argparse.ArgumentParser(
        prog="python benchmarks",
        description=f"{__doc__}\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="which groups (default: all)")
    parser.add_argument("--models", nargs="+", help="names in timm (default: those of each group)")
    parser.add_argument("--batches", nargs="+", type=int, help="batch sizes (default: 1, 8 and 32)")
    parser.add_argument("--budget", type=float, default=15, help="seconds for each pair (default: 15; 3 runs at least)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: of this process, on a busy machine"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled rows out")
    parser.add_argument("--peers", type=Path, default=ROOT / "build" / "peers", help="where the other libraries are")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--write", action="store_true", help="write the tables of docs/speed.md")
    given = parser.parse_args()
    if unknown := [group for group in given.groups if group not in GROUPS]:
        parser.error(f"no group {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    written = {}
    for group in given.groups or GROUPS:
        module = importlib.import_module(group)
        options = Options(
            models=tuple(given.models or module.MODELS),
            batches=tuple(given.batches or (1, 8, 32)),
            budget=given.budget,
            device=torch.device(given.device),
            clock=time.process_time if given.clock == "cpu" else time.perf_counter,
            compiled=not given.no_compile,
        )
        console.print(f"{group}: {GROUPS[group]}")
        if group == "peers" and importlib.util.find_spec("nnsight") is None:
            asked = ["--models", *options.models, "--batches", *map(str, options.batches)]
            asked += ["--budget", str(options.budget), "--clock", given.clock]
            title, rows = elsewhere(given.peers, asked)
        else:
            libraries = ("torch", "timm", *(module.LIBRARIES if group == "peers" else ()))
            title = conditions(options, **{library: version(library) for library in libraries})
            rows = shown(module.rows(options))
        table = Table(*COLUMNS, title=f"{group}: {title}")
        for row in rows:
            table.add_row(*cells(row))
        Console(soft_wrap=True).print(table)
        written[group] = {"conditions": title, "rows": [asdict(row) for row in rows]}
        if given.json:
            given.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        if given.write:
            write(group, title, rows)


if __name__ == "__main__":
    sys.exit(main())
