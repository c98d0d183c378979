"""Files: caches and models come back as they were, and damaged ones are errors in words."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from prisma_conformance.strategies import SEEDS, inputs, random_model, specs
from safetensors.torch import save_file

import prisma_core as prisma
from prisma_core import ActivationCache, LoadError, ModelSpec, PrismaError
from prisma_core.files.checkpoint import read_checkpoint
from prisma_core.saving.folder import SPEC, WEIGHTS, tensors_of
from prisma_core.spec import AnySpec

from .drawing import Drawn, models, same

DTYPES = st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16])


@given(models(), DTYPES, st.booleans(), st.booleans())
def test_a_cache_comes_back(drawn: Drawn, dtype: torch.dtype | None, gradients: bool, with_model: bool) -> None:
    loss = (lambda output: output.square().sum()) if gradients else None
    _, cache = drawn.model.run_with_cache(*drawn.inputs, names=drawn.names, dtype=dtype, loss=loss)
    with TemporaryDirectory() as folder:
        path = cache.save(Path(folder) / "cache.safetensors")
        back = ActivationCache.load(path, drawn.model if with_model else None)
    assert list(back) == list(cache)
    assert back.axes == cache.axes
    assert back.layout == cache.layout
    assert (back.gradients is None) == (not gradients)
    for ours, theirs in ((back, cache), *([(back.grad, cache.grad)] if gradients else [])):
        assert all(same(ours[name], x) and ours[name].dtype == x.dtype for name, x in theirs.items())
    if with_model:
        assert type(back) is type(cache)


@given(specs(), SEEDS, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.data())
@torch.no_grad()
def test_a_model_comes_back(spec: AnySpec, seed: int, dtype: torch.dtype, data: st.DataObject) -> None:
    model = random_model(spec, seed, dtype)
    model.reference = data.draw(st.none() | st.text(max_size=9))
    n_classes = getattr(spec, "n_classes", None)
    if n_classes:
        model.labels = tuple(data.draw(st.lists(st.text(max_size=5), min_size=n_classes, max_size=n_classes)))
    for parameter in model.parameters():
        parameter.requires_grad_(data.draw(st.booleans()))
    with TemporaryDirectory() as folder:
        back: Any = prisma.load(f"file:{prisma.save(model, folder)}")
    assert back.spec == spec
    assert (back.reference, back.labels) == (model.reference, model.labels)
    theirs = tensors_of(model)
    assert tensors_of(back).keys() == theirs.keys()
    for name, tensor in tensors_of(back).items():
        assert same(tensor, theirs[name])
        assert tensor.requires_grad == theirs[name].requires_grad
    arguments = data.draw(inputs(spec, dtype=dtype))
    assert same(back(*arguments), model(*arguments))


STATE = {"weight": torch.arange(60.0).view(6, 10), "bias": torch.ones(3, dtype=torch.float16)}


@st.composite
def damages(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes cut short, with some replaced, or with others behind them."""
    how = draw(st.sampled_from(["cut", "replace", "append"]))
    if how == "cut":
        return data[: draw(st.integers(0, len(data) - 1))]
    if how == "append":
        return data + draw(st.binary(min_size=1, max_size=9))
    edited = bytearray(data)
    for place in draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=4)):
        edited[place] = draw(st.integers(0, 255))
    return bytes(edited)


@given(st.sampled_from(["safetensors", "pt", "legacy"]), st.data())
def test_a_damaged_checkpoint_is_an_error_in_words_or_holds_tensors(kind: str, data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"model.{'safetensors' if kind == 'safetensors' else 'pt'}"
        if kind == "safetensors":
            save_file(STATE, path)
        else:
            torch.save(STATE, path, _use_new_zipfile_serialization=kind == "pt")
        path.write_bytes(data.draw(damages(path.read_bytes())))
        try:
            state = read_checkpoint(path)
        except LoadError as error:
            assert path.name in str(error)  # noqa: PT017  # either is right
            return
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
PLAIN = ModelSpec.plain(layers=1)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to everything in a JSON value, itself left out."""
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    below = [((*path, key), inner) for key, inner in steps]
    return [*(at for at, _ in below), *(at for here, inner in below for at in leaves(inner, here))]


@given(st.data())
@torch.no_grad()
def test_an_edited_spec_is_an_error_in_words_or_a_model(data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        model = random_model(PLAIN)
        prisma.save(model, folder)
        path = Path(folder) / SPEC
        spec = json.loads(path.read_text())
        *outer, last = data.draw(st.sampled_from(leaves(spec)))
        place = spec
        for key in outer:
            place = place[key]
        if data.draw(st.booleans()):
            place[last] = data.draw(JSON)
        else:
            del place[last]
        path.write_text(json.dumps(spec))
        try:
            back: Any = prisma.load(f"file:{folder}")
            back(*back.sample_inputs())
        except PrismaError:
            pass
        assert (Path(folder) / WEIGHTS).is_file()
