"""Models that take videos: what they take, which token is where, positions by frame, and views of a cache by time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import prisma_core as prisma
from prisma_core import HookedViT, InputError, ModelSpec, SpecError, TokenLayout, UnknownName
from prisma_core.cli.outline import shapes
from prisma_core.saving.facts import SavedFacts
from prisma_core.spec import EmbedSpec, Interpolation, RopeCount, RopeSpec
from prisma_core.transformer.rope import count_tables

FRAMES, ROWS, COLUMNS, TUBE, PATCH = 3, 2, 4, 2, (4, 3)
LAYOUT = TokenLayout(cls=1, frames=FRAMES, rows=ROWS, columns=COLUMNS)
SHAPE = (FRAMES * TUBE, 2, ROWS * PATCH[0], COLUMNS * PATCH[1])  # frame channel height width
Make = Callable[..., HookedViT]


def embedding(**facts: object) -> EmbedSpec:
    return EmbedSpec(**{"patch": PATCH, "tubelet": TUBE, "in_channels": 2, **facts})


@pytest.fixture
def film(make: Make) -> Make:
    """Build a model of videos out of the one of images that has these facts, every parameter random."""

    def built(
        *, rope: RopeSpec | None = None, cls: int = 1, embed: EmbedSpec | None = None, **facts: object
    ) -> HookedViT:
        spec = make(cls=cls, **facts).spec
        changed = {
            "image_size": SHAPE[2:],
            "embed": embed or embedding(),
            "layout": LAYOUT.model_copy(update={"cls": cls}),
            "rope": rope,
        }
        model = HookedViT(ModelSpec.model_validate(spec.model_dump() | {k: _plain(v) for k, v in changed.items()}))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        return model.eval()

    return built


def _plain(value: object) -> object:
    return value.model_dump() if hasattr(value, "model_dump") else value


def video(batch: int = 2, *shape: int) -> Tensor:
    return torch.randn(batch, *(shape or SHAPE), generator=torch.Generator().manual_seed(3), dtype=torch.float64)


# ---------------------------------------------------------------- patches


def test_a_patch_is_the_sum_over_its_tubelet_frame_by_frame_and_row_by_row(film: Make) -> None:
    model, x = film(), video()
    _, cache = model.run_with_cache(x, names="embed")
    weight, bias = model.embed.proj.weight, model.embed.proj.bias
    for token, (t, r, c) in enumerate((t, r, c) for t in range(FRAMES) for r in range(ROWS) for c in range(COLUMNS)):
        down, across = PATCH
        part = x[:, t * TUBE : (t + 1) * TUBE, :, r * down : (r + 1) * down, c * across : (c + 1) * across]
        expected = torch.einsum("bfchw,dcfhw->bd", part, weight) + bias
        torch.testing.assert_close(cache["embed"][:, token], expected)
        assert LAYOUT.token_names()[1 + token] == f"f{t}r{r}c{c}"


def test_shapes_and_samples_are_those_of_videos(film: Make) -> None:
    model = film()
    assert model.spec.n_frames == SHAPE[0]
    assert model.sizes() == [(SHAPE[0], *SHAPE[2:])]
    assert [tuple(x.shape) for x in model.sample_inputs(3)] == [(3, *SHAPE)]
    found = shapes(model, batch=2)
    assert found["hook_embed"] == (2, LAYOUT.n_patches, 18)
    assert found["blocks.0.attn.hook_pattern"] == (2, 4, LAYOUT.n_tokens, LAYOUT.n_tokens)
    assert model.layout_for(video()) == LAYOUT == model.fixed_layout


def test_a_saved_model_of_videos_comes_back(film: Make, tmp_path: Path) -> None:
    model = film()
    back = prisma.load(f"file:{prisma.save(model, tmp_path)}")
    assert isinstance(back, HookedViT)
    assert back.spec == model.spec
    torch.testing.assert_close(back(video()), model(video()), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ((2, *SHAPE[1:]), r"a video \[batch 6 2 8 12\], got shape \[2, 2, 8, 12\]\. Add a batch axis: video\[None\]"),
        ((1, 4, *SHAPE[1:]), "got 4 frames: this model takes videos of one length"),
        ((1, SHAPE[0], 3, *SHAPE[2:]), "Expected 2 channels in a video"),
        ((1, SHAPE[0], 2, 8, 8), "takes one size"),
        ((1, 2, 8), "Expected a video"),
    ],
)
def test_what_is_no_video(film: Make, shape: tuple[int, ...], told: str) -> None:
    with pytest.raises(InputError, match=told):
        film()(torch.randn(shape))


def test_what_videos_cannot_have() -> None:
    with pytest.raises(SpecError, match="one convolution"):
        embedding(stem="opaque")
    with pytest.raises(SpecError, match="only videos have a length"):
        EmbedSpec(patch=(4, 4), any_length=True, pos=False)
    with pytest.raises(SpecError, match="only videos have a length"):
        embedding(any_length=True)


def test_frames_need_a_tubelet(film: Make) -> None:
    facts = film().spec.model_dump()
    with pytest.raises(ValidationError, match="3 frames of patches need a video"):
        ModelSpec.model_validate(facts | {"embed": EmbedSpec(patch=PATCH, in_channels=2).model_dump()})


# ---------------------------------------------------------------- other sizes


@pytest.mark.parametrize("grid", [(4, 6), (3, 2), (1, 5)])
def test_positions_of_each_frame_are_resized_on_their_own(film: Make, grid: tuple[int, int]) -> None:
    how = Interpolation(in_float32=False)
    model = film(embed=embedding(interpolation=how))
    made = model.embed.positions((FRAMES, *grid))
    assert made.shape == (1 + FRAMES * grid[0] * grid[1], 18)
    torch.testing.assert_close(made[:1], model.embed.pos_embed[:1])
    per = grid[0] * grid[1]
    for frame in range(FRAMES):
        own = model.embed.pos_embed[LAYOUT.slice(f"frame {frame}")].T.reshape(1, 18, ROWS, COLUMNS)
        resized = torch.nn.functional.interpolate(own, grid, mode="bicubic", antialias=True)
        torch.testing.assert_close(made[1 + frame * per : 1 + (frame + 1) * per], resized[0].flatten(1).T)
    model(video(1, SHAPE[0], 2, grid[0] * PATCH[0], grid[1] * PATCH[1]))


ROPE = RopeSpec(layout="half", grid=RopeCount(pairs=1, theta=7.0, rows=ROWS, columns=COLUMNS))


def test_rotary_tables_turn_by_frame_row_and_column() -> None:
    spec = RopeCount(pairs=2, theta=100.0, tiled=True, rows=ROWS, columns=COLUMNS)
    like = torch.empty((), dtype=torch.float64)
    cos, sin = count_tables(spec, "interleaved", LAYOUT.n_patches, 1, 14, like)
    assert cos.shape == sin.shape == (LAYOUT.n_tokens, 1, 14)
    assert torch.equal(cos[0], torch.ones(1, 14, dtype=torch.float64))
    token = 1 + 2 * ROWS * COLUMNS + 1 * COLUMNS + 3  # frame 2, row 1, column 3
    waves = torch.tensor([1.0, 0.1], dtype=torch.float64).repeat(2)
    angles = torch.cat([2 * waves, 1 * waves, 3 * waves, torch.zeros(2)])
    torch.testing.assert_close(cos[token, 0], angles.cos())
    torch.testing.assert_close(sin[token, 0], angles.sin())
    apart, _ = count_tables(spec.model_copy(update={"tiled": False}), "interleaved", LAYOUT.n_patches, 1, 14, like)
    torch.testing.assert_close(apart[token, 0, :4], (2 * waves).cos()[[0, 0, 1, 1]])


def test_a_video_of_any_length(film: Make) -> None:
    embed = embedding(pos=False, any_length=True)
    model = film(rope=ROPE, cls=0, embed=embed, pool="avg")
    with torch.no_grad():
        tables = count_tables(ROPE.grid, "half", LAYOUT.n_patches, 0, 6, model.rope_cos)
        model.rope_cos.copy_(tables[0]), model.rope_sin.copy_(tables[1])
    assert model.sizes() == [(6, 8, 12), (10, 8, 12)]
    assert model.fixed_layout is None
    longer = video(2, 10, *SHAPE[1:])
    _, cache = model.run_with_cache(longer)
    assert cache.layout is not None
    assert cache.layout.frames == 5
    assert cache.patches("resid_post", 1).shape == (2, 5, ROWS, COLUMNS, 18)
    torch.testing.assert_close(cache.frame(1, "rot_q", 0), cache.patches("rot_q", 0)[:, 1])
    # Rotary positions are relative: the first frames of a longer video turn as those of a shorter one.
    _, short = model.run_with_cache(longer[:, :6], names="rot_k")
    torch.testing.assert_close(cache["rot_k", 0][:, : LAYOUT.n_patches], short["rot_k", 0])
    with pytest.raises(InputError, match=r"multiple of 2 frames, got 7"):
        model(video(1, 7, *SHAPE[1:]))
    stream = cache["resid_pre", 1]
    torch.testing.assert_close(model(stream, start_at_layer=1, grid=(5, ROWS, COLUMNS)), model(longer))
    with pytest.raises(InputError, match=r"a grid of 3x2x4: give grid=\(frames, rows, columns\)"):
        model(stream, start_at_layer=1)


def test_facts_survive_json(film: Make) -> None:
    spec = film(rope=ROPE, embed=embedding(pos=False, any_length=True)).spec
    assert SavedFacts.model_validate_json(SavedFacts(spec=spec).to_json()).spec == spec


# ---------------------------------------------------------------- by time


def test_a_cache_by_time(film: Make) -> None:
    _, cache = film().run_with_cache(video())
    grid = cache.patches("resid_post", 1)
    assert grid.shape == (2, FRAMES, ROWS, COLUMNS, 18)
    for frame in range(FRAMES):
        assert torch.equal(cache.frame(frame, "resid_post", 1), grid[:, frame])
        assert torch.equal(cache["resid_post", 1][:, LAYOUT.slice(f"frame {frame}")], grid[:, frame].flatten(1, 2))
    assert torch.equal(cache.frame(-1, "resid_post", 1), grid[:, -1])
    assert torch.equal(cache.frame(1, "embed"), cache.patches("embed")[:, 1])
    read = cache.frame(2, "pattern", 0, axis="key_pos")
    assert read.shape == (2, 4, LAYOUT.n_tokens, ROWS, COLUMNS)
    assert torch.equal(read.flatten(-2), cache["pattern", 0][..., LAYOUT.slice("frame 2")])


@pytest.mark.parametrize("frame", [0, 1, 2, -1])
def test_one_frame_alone_is_cached(film: Make, frame: int) -> None:
    model, x = film(), video()
    _, whole = model.run_with_cache(x, names="resid_post")
    _, part = model.run_with_cache(x, names="resid_post", pos=f"frame {frame}")
    assert torch.equal(part["resid_post", 0], whole["resid_post", 0][:, LAYOUT.slice(f"frame {frame}")])
    assert torch.equal(part.frame(frame, "resid_post", 0), whole.frame(frame, "resid_post", 0))
    with model.caching("resid_post", pos=f"frame {frame}") as scoped:
        model(x)
    assert torch.equal(scoped["resid_post", 0], part["resid_post", 0])
    with pytest.raises(InputError, match="not in the cache"):
        part.frame((frame + 1) % FRAMES, "resid_post", 0)


def test_the_last_frame_of_a_longer_and_larger_video(film: Make) -> None:
    embed = embedding(pos=False, any_length=True, interpolation=Interpolation())
    model, x = film(rope=ROPE, embed=embed), video(1, 10, 2, 12, 9)
    _, whole = model.run_with_cache(x, names="resid_post")
    _, part = model.run_with_cache(x, names="resid_post", pos="frame 1")
    assert torch.equal(part.frame(1, "resid_post", 0), whole.patches("resid_post", 0)[:, 1])
    _, last = model.run_with_cache(x, names="resid_post", pos="frame -1")
    assert torch.equal(last["resid_post", 0], whole["resid_post", 0][:, -9:])


@pytest.mark.parametrize("name", ["frame 3", "frame -4", "frame two", "frame "])
def test_a_frame_that_is_not_there(name: str) -> None:
    with pytest.raises(UnknownName, match=r"frames of patches run from 0 to 2"):
        LAYOUT.slice(name)


def test_a_frame_edited_changes_that_frame_alone_before_attention(film: Make) -> None:
    model, x = film(), video()

    def still(resid: Tensor, at: object) -> Tensor:
        resid[:, LAYOUT.slice("frame 1")] = 0
        return resid

    _, clean = model.run_with_cache(x)
    _, edited = model.run_with_cache(x, hooks={"full_embed": still})
    changed = (edited["resid_pre", 0] - clean["resid_pre", 0]).abs().sum(-1) > 0
    assert changed.any(0).nonzero().flatten().tolist() == list(range(LAYOUT.n_tokens))[LAYOUT.slice("frame 1")]
    assert not torch.equal(edited["hook_logits"], clean["hook_logits"])
