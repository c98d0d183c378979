"""Broken hook maps of models without a canonical form: a row at a wrong place, or one that nothing proves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prisma_conformance.subject import Subject

from prisma_core.contract.adapter import MapAdapter
from prisma_core.host import installed
from prisma_core.maps.places import HookMap
from prisma_core.maps.reader import Reader

SWIN, SWIN_V2, HIERA, CONVNEXT, SAM = (
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "hiera_tiny_224",
    "convnext_tiny",
    "samvit_base_patch16",
)


@dataclass(frozen=True)
class MapMutant:
    """One mistake in a hook map of timm's.

    Attributes:
        name: what is wrong.
        model: the architecture whose map it is made in.
        places: where hook points are read instead; their axes and formulas stay.
        axes: einops patterns or axes instead.
        says: what the check must find, in its own words.
        equations: formulas or prose behind ``=`` instead.
        exempt: what the adapter leaves out.
        check: the check that claims to catch it.
    """

    name: str
    model: str
    says: str
    places: tuple[tuple[str, str], ...] = ()
    axes: tuple[tuple[str, str], ...] = ()
    equations: tuple[tuple[str, str], ...] = ()
    exempt: tuple[tuple[str, str], ...] = ()
    check: str = "maps.proven"

    def subject(self) -> Subject:
        case = installed().source("timm").case(self.model)
        assert case is not None
        upstream = case.build()
        return Subject(case, broken(installed().adapter(upstream), self), upstream, seed=1)


def broken(adapter: Any, mutant: MapMutant) -> MapAdapter:
    """An adapter with the mistake in its table."""
    assert isinstance(adapter, MapAdapter)
    places, axes, equations = dict(mutant.places), dict(mutant.axes), dict(mutant.equations)

    def change(table: HookMap) -> HookMap:
        rows = {row.hook: row for row in table.rows}
        lines: list[str] = []
        assert set(places) | set(axes) | set(equations) <= set(rows)
        for hook, row in rows.items():
            equation = equations.get(hook, row.equation)
            line = f"{places.get(hook, row.place)} -> {hook} : {axes.get(hook, row.how)}"
            lines.append(line + (f" = {equation}" if equation else ""))
        return HookMap.parse("\n".join(lines), **table.sizes)

    class Broken(type(adapter)):  # type: ignore[misc]
        def hooks(self, upstream: Reader, spec: Any) -> HookMap:
            return change(super().hooks(upstream, spec))

        def exempt(self, upstream: Reader) -> dict[str, str]:
            return super().exempt(upstream) | dict(mutant.exempt)

    return Broken()


def _moved(hook: str, place: str) -> tuple[tuple[str, str], ...]:
    return ((hook, place),)


BLOCK = "layers.0.blocks.0"  # of Swin

MAP_MUTANTS = [
    MapMutant(
        "a norm of the neighbouring block",
        SWIN,
        "stages.0.blocks.0.ln1.hook_normalized = layers.0.blocks.0.norm1(resid_pre): off by",
        _moved("stages.0.blocks.0.ln1.hook_normalized", "layers.0.blocks.1.norm1"),
    ),
    MapMutant(
        "queries and keys exchanged",
        HIERA,
        "blocks.1.attn.hook_attn_scores = q . k * blocks.1.attn.scale: off by",
        (
            ("blocks.1.attn.hook_q", "blocks.1.attn @ scaled_dot_product_attention : in1"),
            ("blocks.1.attn.hook_k", "blocks.1.attn @ scaled_dot_product_attention : in"),
        ),
    ),
    MapMutant(
        "queries and keys exchanged, beside a bias",
        SWIN,
        "stages.0.blocks.0.attn: scores = q . k * scale + a bias, the same for every input: off by",
        (
            ("stages.0.blocks.0.attn.hook_q", f"{BLOCK}.attn @ unbind : out1"),
            ("stages.0.blocks.0.attn.hook_k", f"{BLOCK}.attn @ unbind"),
        ),
    ),
    MapMutant(
        "scores after the softmax",
        SWIN,
        "stages.0.blocks.0.attn: scores = q . k * scale + a bias, the same for every input: off by",
        _moved("stages.0.blocks.0.attn.hook_attn_scores", f"{BLOCK}.attn.softmax"),
    ),
    MapMutant(
        "a block's input for its output",
        CONVNEXT,
        "stages.2.blocks.0.hook_resid_post = resid_pre + mlp_out: off by",
        _moved("stages.2.blocks.0.hook_resid_post", "stages.2.blocks.0 : in"),
        check="algebra",
    ),
    MapMutant(
        "the last stage's input for its output",
        CONVNEXT,
        "hook_pooled = head.global_pool(stages.3.blocks.0.resid_post): off by",
        _moved("stages.3.blocks.0.hook_resid_post", "stages.3.blocks.0 : in"),
    ),
    MapMutant(
        "values for what heads return",
        SWIN,
        "stages.0.blocks.1.attn.hook_z = pattern v: off by",
        _moved("stages.0.blocks.1.attn.hook_z", "layers.0.blocks.1.attn @ matmul#1 : in1"),
        check="algebra",
    ),
    MapMutant(
        "an MLP's inner activations before for after",
        HIERA,
        "blocks.0.mlp.hook_post = blocks.0.mlp.act(pre): off by",
        _moved("blocks.0.mlp.hook_post", "blocks.0.mlp.fc1"),
    ),
    MapMutant(
        "an MLP's inner activations after for before",
        CONVNEXT,
        "stages.0.blocks.0.mlp.hook_pre = stages.0.blocks.0.mlp.fc1(ln.normalized): off by",
        _moved("stages.0.blocks.0.mlp.hook_pre", "stages.0.blocks.0.mlp.act"),
    ),
    MapMutant(
        "what a norm reads for what it gives",
        SAM,
        "blocks.1.ln1.hook_normalized = blocks.1.norm1(resid_pre): off by",
        _moved("blocks.1.ln1.hook_normalized", "blocks.1.norm1 : in"),
    ),
    MapMutant(
        "the last norm's input",
        SWIN,
        "ln_final.hook_normalized = norm(stages.1.blocks.0.resid_post): off by",
        _moved("ln_final.hook_normalized", "norm : in"),
    ),
    MapMutant(
        "another stage's downsampling",
        CONVNEXT,
        "stages.2.hook_downsample = stages.2.downsample(stages.1.blocks.0.resid_post): off by",
        _moved("stages.2.hook_downsample", "stages.1.downsample"),
    ),
    MapMutant(
        "the embedding behind its positions",
        SAM,
        "hook_embed = patch_embed(input): off by",
        _moved("hook_embed", "norm_pre : in"),
    ),
    MapMutant(
        "a norm's input for the stream",
        SWIN,
        "hook_resid_mid = resid_pre + attn_out, with every hook point edited: off by",
        _moved("stages.1.blocks.0.hook_resid_pre", "layers.1.blocks.0.norm1 : in"),
        check="algebra",
    ),
    MapMutant(
        "normed queries for queries, where scores are cosines",
        SWIN_V2,
        "stages.0.blocks.1.attn: q, k, v = qkv(windows of resid_pre): off by",
        _moved("stages.0.blocks.1.attn.hook_q", "layers.0.blocks.1.attn @ normalize"),
    ),
    MapMutant(
        "two summands exchanged",
        HIERA,
        "blocks.1.hook_attn_out = ls1(attn.proj(attn.z)): off by",
        (("blocks.1.hook_attn_out", "blocks.1 @ add : in"), ("blocks.1.hook_shortcut", "blocks.1.drop_path1")),
    ),
    MapMutant(
        "an embedding that nothing proves",
        SWIN,
        "1 hook points could hold anything, for no equation fails when they are changed: hook_embed",
        equations=(("hook_embed", "patches times weights, normed"),),
    ),
    MapMutant(
        "rows named columns",
        SWIN,
        "blocks.1.hook_resid_mid has the axes 'batch column row d_model': expected 'row column'",
        axes=(("stages.0.blocks.1.hook_resid_mid", "batch column row d_model"),),
    ),
    MapMutant(
        "columns read as rows",
        CONVNEXT,
        "hook_embed has the axes 'batch row column d_model', and so 16 rows and 8 columns of an image of 32 x 64",
        axes=(("hook_embed", "batch d_model column row -> batch row column d_model"),),
    ),
    MapMutant(
        "heads named windows",
        SWIN,
        "hook_pattern has the axes 'batch head window query_pos key_pos': expected the heads before queries and keys",
        axes=(
            (
                "stages.0.blocks.0.attn.hook_pattern",
                "(batch head) window query_pos key_pos -> batch head window query_pos key_pos",
            ),
        ),
    ),
    MapMutant(
        "heads named positions",
        SAM,
        "blocks.0.attn.hook_z has the axes 'batch window head pos d_head': expected the heads before the last",
        axes=(("blocks.0.attn.hook_z", "(batch window head) pos d_head -> batch window head pos d_head"),),
    ),
    MapMutant(
        "windows named positions",
        SWIN,
        "attn.hook_v has the axes 'batch pos window head d_head': expected 'batch window' first, as scores have it",
        axes=(("stages.0.blocks.0.attn.hook_v", "(batch pos) head window d_head -> batch pos window head d_head"),),
    ),
    MapMutant(
        "queries named keys",
        HIERA,
        "hook_pattern has the axes 'batch window head key_pos query_pos': expected 'query_pos key_pos' last",
        axes=(
            (
                "blocks.1.attn.hook_pattern",
                "batch head window key_pos query_pos -> batch window head key_pos query_pos",
            ),
        ),
    ),
    MapMutant(
        "an exemption that is not needed",
        SAM,
        "exempt() names 'hook_neck', which is proven by 'hook_neck = neck(blocks.1.resid_post)': take it out",
        exempt=(("hook_neck", "two convolutions"),),
    ),
]
