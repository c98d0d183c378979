"""Facts of blocks under TransformerLens' names: answered where all blocks agree, else where to read them."""

from __future__ import annotations

import copy
import pickle

import pytest

from prisma_core import ModelSpec, NotApplicable
from prisma_core.spec import DualSpec, NormSpec, TextSpec

VIT = ModelSpec.plain(
    d_model=15, layers=3, heads=5, patch=(2, 4), image=12, d_mlp=7, act="silu", gated=True, n_kv_heads=1, registers=2,
    norm=NormSpec(eps=0.25), in_channels=4,
)  # fmt: skip
TEXT = TextSpec.plain(d_model=8, layers=1, heads=4, n_ctx=6, n_vocab=11)
FACTS = {
    "n_layers": (3, 1), "n_heads": (5, 4), "n_key_value_heads": (1, 4), "d_head": (3, 2), "d_mlp": (7, 32),
    "act_fn": ("silu", "gelu"), "gated_mlp": (True, False), "eps": (0.25, 1e-6), "n_ctx": (21, 6), "d_model": (15, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_facts_of_all_blocks(name):
    assert (getattr(VIT, name), getattr(TEXT, name)) == FACTS[name]


def test_facts_of_one_kind():
    assert (VIT.patch_size, VIT.n_channels, VIT.n_classes) == ((2, 4), 4, 10)
    assert ModelSpec.plain(patch=4).patch_size == 4
    assert (TEXT.d_vocab, TEXT.d_pool) == (11, 8)


@pytest.mark.parametrize(
    ("name", "place", "facts"),
    [
        ("n_heads", "attn.n_heads", {"heads": 3}), ("d_mlp", "mlp.d_mlp", {"d_mlp": 9}),
        ("act_fn", "mlp.act", {"act": "relu"}), ("eps", "ln1.eps", {"norm": NormSpec(eps=0.5)}),
        ("d_mlp", "mlp.d_mlp", {"mlp": None}),
    ],
)  # fmt: skip
def test_blocks_that_differ(name, place, facts):
    plain, other = ModelSpec.plain(), ModelSpec.plain(**facts)
    mixed = plain.model_copy(update={"blocks": (*plain.blocks, other.blocks[0])})
    with pytest.raises(NotApplicable, match=rf"and .* in block 2\. Read spec\.blocks\[l\]\.{place}\."):
        getattr(mixed, name)


@pytest.mark.parametrize(("name", "facts"), [("d_mlp", {"mlp": None}), ("eps", {"norm": None})])
def test_parts_that_no_block_has(name, facts):
    with pytest.raises(NotApplicable, match=r"have no (mlp|ln1)"):
        getattr(ModelSpec.plain(**facts), name)


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("n_heads", r"spec\.vision\.n_heads or spec\.text\.n_heads"), ("d_model", r"spec\.vision\.d_model or"),
        ("patch_size", r"read spec\.vision\.patch_size\."), ("n_vocab", r"read spec\.text\.n_vocab\."),
    ],
)  # fmt: skip
def test_a_pair_names_its_towers(name, places):
    pair = DualSpec(vision=VIT, text=TEXT)
    with pytest.raises(AttributeError, match=places):
        getattr(pair, name)
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        pair.colour  # noqa: B018
    assert pickle.loads(pickle.dumps(copy.deepcopy(pair))) == pair
    assert DualSpec.model_validate_json(pair.model_dump_json()) == pair
