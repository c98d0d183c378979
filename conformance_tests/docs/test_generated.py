"""The generated pages of the docs are up to date, and the house is as they draw it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch
from docs_folder import DOCS, script

from prisma_core import plugin
from prisma_core.maps.rule import Rule
from prisma_core.transformer.vit import HookedViT

ROOT = Path(__file__).parents[2]


def test_generated_pages_are_up_to_date() -> None:
    torch.set_default_dtype(torch.float32)
    pages = script("generate").pages()
    del pages[DOCS / "commands.md"]  # each release of typer writes it in its own way: the test below reads it
    stale = [path.name for path, text in pages.items() if path.read_text("utf-8") != text]
    assert stale == [], "run python docs/generate.py"


def test_every_row_of_the_page_of_tensors_is_a_rule() -> None:
    page = script("canonical")
    rows = re.findall(r"`([^`]*->[^`]*)`", page.ROWS)
    assert len(rows) > 10
    for row in rows:
        Rule.parse(row.replace("\\|", "|").replace("[q.", "[{l}.q.").replace("SOURCE", "source"))


def test_every_field_of_a_spec_stands_on_the_page_of_tensors() -> None:
    page = script("canonical").page()
    # Sizes and numbers that every model has, and details of fields that the page names.
    plain = {"d_model", "image_size", "patch", "layout", "blocks", "embed", "pool", "rows", "columns", "eps", "n_heads"}
    plain |= {"attn"}
    details = {"d_head", "d_mlp", "any_length", "stem", "by_token", "pos_grid", "pos_factorized", "order", "n_latents"}
    details |= {"d_latent", "latent_norm", "latents", "in_float32", "weight_in_float32", "ln1"}
    kinds = ("ModelSpec", "EmbedSpec", "TokenLayout", "BlockSpec", "AttentionSpec", "MlpSpec", "NormSpec", "PoolSpec")
    for kind in kinds:
        fields = {f"{kind}.{name}" for name in set(getattr(plugin, kind).model_fields) - plain - details}
        fields.discard("ModelSpec.kind")
        missing = {field for field in fields if f"`{field}=" not in page}
        assert not missing, missing


def test_the_rooms_are_few_and_every_module_is_in_one() -> None:
    house = script("house")
    rooms = {room.name: room.lines for room in house.rooms()}
    core = ROOT / "prisma_core"
    modules = [path for path in core.rglob("*.py") if "templates" not in path.parts]
    assert len([path for path in core.iterdir() if any(path.glob("*.py"))]) <= 12
    assert len(list(core.glob("*.py"))) <= 6
    assert sum(rooms[name] for name in house.SMALL_CORE) <= 3000
    every = [*modules, *(ROOT / "plugins").rglob("*.py")]
    assert [path.name for path in every if len(path.read_text("utf-8").splitlines()) > 400] == []
    in_rooms = {path.relative_to(core).parts[0].removesuffix(".py") for path in modules} - {"__init__"}
    assert in_rooms == set(rooms), "a module of prisma_core is in no room"


def test_modules_of_tests_are_short_and_have_names_of_their_own() -> None:
    modules = [path for path in (ROOT / "conformance_tests").rglob("*.py") if path.name != "conftest.py"]
    assert [path.name for path in modules if len(path.read_text("utf-8").splitlines()) > 400] == []
    assert [name for name, n in Counter(path.name for path in modules).items() if n > 1] == []


def test_the_figure_of_a_block_shows_hook_points() -> None:
    block, generate = script("block"), script("generate")
    with torch.device("meta"):
        model = HookedViT(generate.base())
    points = {name for query in block.names() for name in model.resolve((query, 3))}
    plain = {name for name, point in model.hook_points().items() if ".3." in name and not point.derived}
    assert points == plain
