"""Write the generated pages of the docs (hook points, commands, techniques, references, the maps) from the code.

``--check`` compares, by its exit status.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
import typer
from typer.cli import get_docs_for_click

from prisma_core.cli.app import build
from prisma_core.cli.info import folded, hook_rows
from prisma_core.host import Host
from prisma_core.spec import ModelSpec, NormSpec, PoolSpec, RopeSpec
from prisma_core.transformer.vit import HookedViT

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))
import block  # noqa: E402  # the modules beside this one
import house  # noqa: E402
import technique_kinds  # noqa: E402
import techniques  # noqa: E402

PAGE, DESIGN, FIGURE = DOCS / "hook-points.md", DOCS / "design.md", DOCS / "images" / "house.svg"
TECHNIQUES = DOCS / "techniques.md"
KINDS = DOCS / "technique-kinds.md"
COMMANDS = DOCS / "commands.md"
ROOMS = re.compile(r"(<!-- rooms: written by python docs/generate.py -->\n).*?(<!-- end of rooms -->)", re.DOTALL)
LN = NormSpec(eps=1e-6)
HEAD = """<!-- Written by `python docs/generate.py` from the code. Change the code, not this page. -->
# Hook points

Every place where an activation can be read (`run_with_cache`) and replaced (`run_with_hooks`), in the order in
which they fire. Names are TransformerLens'. `prisma info REFERENCE` shows the same for any model.

Shapes are those of a ViT-B/16 at 224 x 224 and a batch of 1: 12 layers, `d_model` 768, 12 heads of 64, `d_mlp`
3072, 197 tokens (a class token and 14 x 14 patches), 1000 classes. `{0-11}` stands for a layer. Points marked
*derived* are computed only when they are asked for by name: a glob reaches them only if it spells out their last
part (`*hook_result`).

How to name them: exactly (`blocks.3.attn.hook_z`), by shorthand (`z`, `resid_post`, `ln1.scale`), by shorthand and
layer (`("z", 3)`, `("resid_post", -1)`), by glob (`*hook_pattern`), by a predicate, or by any collection of these.
A name that matches nothing is an error which suggests the nearest.

The scores are what goes into the softmax: scaled, with any bias added. The pattern is what comes out. `attn_out`
and `mlp_out` are what is added to the residual stream, after layer scale or a norm behind the branch. Asking for
scores or patterns, or editing a norm's scale, makes that layer compute step by step instead of in one fused kernel;
the result then equals the fused one to rounding. Where only some queries' rows are kept (`pos="cls"`), these rows are
computed beside the fused kernel, and the pass is the plain one to the bit. A full cache of a canonical
model holds sums of the stream, patterns and outputs of norms as functions of the other activations until they are first
asked for; `cache.nbytes` says what it takes.
"""


def base() -> ModelSpec:
    """Return the facts of a ViT-B/16."""
    return ModelSpec.plain(d_model=768, layers=12, heads=12, patch=16, image=224, n_classes=1000)


def variants() -> dict[str, ModelSpec]:
    """Return the facts that add hook points or change what they are, each by its heading."""
    spec = base()
    block = spec.blocks[0]
    attn, mlp = block.attn, block.mlp
    assert mlp is not None

    def each(**changes: object) -> ModelSpec:
        return spec.model_copy(update={"blocks": (block.model_copy(update=changes),) * 12})

    def with_attn(**changes: object) -> ModelSpec:
        return each(attn=attn.model_copy(update=changes))

    def with_mlp(**changes: object) -> ModelSpec:
        return each(mlp=mlp.model_copy(update=changes))

    pool_attn = PoolSpec(kind="attention", attn=attn, mlp=mlp, norm=LN)
    return {
        "A norm before the blocks": spec.model_copy(update={"ln_pre": LN}),
        "A norm of the patch embedding": spec.model_copy(update={"embed": spec.embed.model_copy(update={"norm": LN})}),
        "Rotary positions": spec.model_copy(update={"rope": RopeSpec(layout="half")}),
        "Biases of the scores": with_attn(bias=True),
        "Norms of queries and keys": with_attn(qk_norm=LN),
        "Fewer keys and values than queries (here 4 for 12)": with_attn(n_kv_heads=4),
        "A norm before attention's output projection": with_attn(inner_norm=LN),
        "Root mean square norms": each(ln1=NormSpec(kind="rms", eps=1e-6), ln2=NormSpec(kind="rms", eps=1e-6)),
        "Gated MLPs": with_mlp(gated=True),
        "A norm inside the MLP": with_mlp(inner_norm=LN),
        "A second norm before the MLP": with_mlp(pre_norm=LN),
        "Norms behind the branches (`res_post`)": each(kind="res_post"),
        "Attention and MLP side by side (`parallel`)": each(kind="parallel", ln2=None),
        "Several attentions side by side, then several MLPs (here 2)": each(n_parallel=2),
        "Blocks without an MLP": each(mlp=None, ln2=None),
        "Pooling by the mean, and a norm after it": spec.model_copy(
            update={"pool": PoolSpec(kind="avg"), "ln_final": None, "ln_pool": LN}
        ),
        "Pooling by attention": spec.model_copy(update={"pool": pool_attn}),
        "No pooling": spec.model_copy(update={"pool": PoolSpec(kind="none")}),
    }


def page() -> str:
    """Return the page's text."""
    rows = _rows(base())
    seen = set(rows)
    parts = [HEAD, "## A plain pre-norm model\n", *_table(rows), ""]
    parts += ["## What other facts add or change\n", "Only what differs from the table above.\n"]
    for heading, spec in variants().items():
        new = [row for row in _rows(spec) if row not in seen]
        if new:
            parts += [f"### {heading}\n", *_table(new), ""]
    return "\n".join(parts)


def commands() -> str:
    """Return the page of every command with its arguments and options."""
    command = typer.main.get_command(build(Host()))
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="prisma"), name="prisma")
    return "<!-- Written by `python docs/generate.py` from the commands. -->\n" + text.replace(
        "# `prisma`\n", "# The command line\n", 1
    )


def _rows(spec: ModelSpec) -> list[tuple[str, str, str, str]]:
    with torch.device("meta"):
        model = HookedViT(spec)
    return [
        (
            f"`{row['name']}`",
            row["axes"],
            " ".join(map(str, row["shape"])),
            f"`{row['equation']}`" + (" *derived*" if row["derived"] else ""),
        )
        for row in folded(hook_rows(model))
    ]


def _table(rows: list[tuple[str, str, str, str]]) -> list[str]:
    head = ["| hook point | axes | shape | what it is |", "| --- | --- | --- | --- |"]
    return head + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def pages() -> dict[Path, str]:
    """Return the text of every generated file."""
    design = DESIGN.read_text(encoding="utf-8")
    table = house.table().replace("\\", r"\\")
    references = {DOCS / "reference" / f"{name}.md": techniques.reference(name) for name in techniques.REFERENCES}
    return {
        PAGE: page(),
        TECHNIQUES: techniques.page(),
        DOCS / "gallery.md": techniques.gallery(),
        KINDS: technique_kinds.page(),
        **references,
        DESIGN: ROOMS.sub(rf"\g<1>{table}\n\g<2>", design),
        FIGURE: house.figure(),
        DOCS / "images" / "block.svg": block.figure(),
        COMMANDS: commands(),
    }


def main() -> int:
    if "--check" in sys.argv[1:]:
        return int(any(path.read_text(encoding="utf-8") != text for path, text in pages().items()))
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
