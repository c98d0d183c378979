"""Files of caches."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from prisma_core import ActivationCache, InputError, LoadError, NotApplicable, UnknownName


def same(left: ActivationCache, right: ActivationCache) -> bool:
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def test_files(vit, image, tmp_path):
    _, cache = vit.run_with_cache(image, loss=torch.sum, names=["resid_post", "resid_pre", "q", "pattern"], pos=[0, 3])
    path = cache.save(tmp_path / "new" / "cache.safetensors")
    read = ActivationCache.load(path)
    assert same(read, cache)
    assert same(read.grad, cache.grad)
    assert read.layout == vit.layout
    assert read.has_batch_dim
    assert read.positions() == [0, 3]
    assert torch.equal(read.cls("resid_post", 1), cache.cls("resid_post", 1))
    with pytest.raises(UnknownName, match="is not in this cache"):
        read["z", 0]
    with pytest.raises(NotApplicable, match="no model"):
        read.accumulated_resid()
    again = ActivationCache.load(path, model=vit)
    assert torch.equal(again.accumulated_resid(), cache.accumulated_resid())
    alone = vit.run_with_cache(image[:1], remove_batch_dim=True)[1].save(tmp_path / "alone.safetensors")
    assert not ActivationCache.load(alone).has_batch_dim


def test_files_that_are_no_cache(vit, make, image, tmp_path):
    _, cache = vit.run_with_cache(image)
    path = cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(LoadError, match="cache of another model"):
        ActivationCache.load(path, model=make(layers=3))
    with pytest.raises(InputError, match=r"ends in .safetensors"):
        cache.save(tmp_path / "cache.pt")
    whole = path.read_bytes()
    for name, content, words in (
        ("truncated", whole[: len(whole) // 2], "truncated or corrupt"),
        ("short", whole[:5], "truncated or corrupt"),
        ("empty", b"", "truncated or corrupt"),
        ("noise", b"\xff" * 1000, "truncated or corrupt"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LoadError, match=words):
            ActivationCache.load(tmp_path / name)
    with pytest.raises(LoadError, match="No file at"):
        ActivationCache.load(tmp_path / "missing.safetensors")
    tensors = {"blocks.0.hook_z": torch.zeros(2)}
    save_file(tensors, tmp_path / "tensors")
    with pytest.raises(LoadError, match="holds tensors but no cache"):
        ActivationCache.load(tmp_path / "tensors")
    facts = {"names": ["other"], "axes": {}, "layout": None, "has_batch_dim": True, "pos": None}
    for name, text, words in (
        ("nonsense", "{", "is no readable JSON"),
        ("unknown", json.dumps(facts | {"new": 1}), "does not describe a cache"),
        ("other", json.dumps(facts), "does not hold the tensors it names"),
    ):
        save_file(tensors, tmp_path / name, metadata={"prisma_cache": text})
        with pytest.raises(LoadError, match=words):
            ActivationCache.load(tmp_path / name)
