"""Probes over a harvest: what they find is what was planted, whatever the order on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planted import marked, planted
from prisma_harvest import Harvest, harvest
from prisma_lens import probe, probe_harvest
from torch import Tensor
from twins import rejects

from prisma_core import InputError, UnknownName

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
LATE, EARLY = "blocks.1.hook_resid_post", "blocks.0.hook_resid_pre"
LABELS = torch.tensor([1] * 96 + [0] * 96)  # by class on disk: in order, the last batches have one class alone
OPTIONS: dict[str, Any] = {"preprocess": None, "workers": 0, "shard": 64, "dtype": "float32"}
IMAGES = torch.cat([marked(0.4, 1, batch=96), marked(-0.4, 2, batch=96)])


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> Harvest:
    out: Path = tmp_path_factory.mktemp("acts")
    return harvest(planted(), list(IMAGES), [LATE, EARLY], out=out, **OPTIONS)


def test_the_mark_is_read_where_it_has_been_copied(acts: Harvest) -> None:
    def truth(study: Any) -> None:
        result = study(acts, LABELS, [LATE, EARLY], tokens="cls", batch=32)
        assert result.sel(place="L1", task="probe").values.item() > 0.95
        assert result.sel(place="L1", task="control").values.item() < 0.8
        assert result.sel(place="L0", task="probe").values.item() < 0.8  # before anything reached the class token
        model, whole = planted(), probe(planted(), [(IMAGES, LABELS)], [("resid_post", 1)], tokens="cls")
        assert result.facts["held_out"] == whole.facts["held_out"] == 48
        _, cache = model.run_with_cache(torch.cat([marked(0.4, 99), marked(-0.4, 98)]), names=LATE)
        weight, bias = (result.tensors[f"{LATE}/{part}"] for part in ("weight", "bias"))
        said: Tensor = (cache[LATE][:, 0].float() @ weight.T + bias).flatten()
        assert said[0] > 0 > said[1]

    rejects(truth, probe_harvest, "y[at][ours]", "y[: len(at)][ours]")


def test_no_held_out_example_is_fitted(tmp_path: Path) -> None:
    """As many examples as dimensions: fitted on everything, shuffled labels would be learned by heart."""
    few = harvest(planted(), list(IMAGES[84:108]), LATE, out=tmp_path, **OPTIONS)

    def truth(study: Any) -> None:
        result = study(few, LABELS[84:108], epochs=200, batch=8, held_out=0.5, alpha=1e-9)
        assert result.sel(task="control").values.item() < 0.8

    rejects(truth, probe_harvest, "ours = test[at] == held", "ours = (test[at] == held) | ~torch.tensor(held)")


def test_every_patch_has_its_label(acts: Harvest) -> None:
    labels = torch.zeros(192, 9, dtype=torch.long)
    labels[:, 4] = 1
    result = probe_harvest(acts, labels, ("resid_pre", 0), tokens="patches", epochs=20, batch=32)
    assert result.sel(task="probe").values.item() > 0.97
    assert result.facts["held_out"] == 48 * 9


def test_what_does_not_fit_is_said(acts: Harvest, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="open_harvest"):
        probe_harvest([IMAGES], LABELS)
    with pytest.raises(InputError, match=r"\[192\]"):
        probe_harvest(acts, LABELS[:5])
    with pytest.raises(UnknownName, match="mlp_out"):
        probe_harvest(acts, LABELS, "mlp_out")
    with pytest.raises(InputError, match="no registers"):
        probe_harvest(acts, LABELS, tokens="registers")
    patches = harvest(planted(), list(IMAGES[:4]), LATE, out=tmp_path, pos="patches", **OPTIONS)
    with pytest.raises(InputError, match="holds no cls"):
        probe_harvest(patches, LABELS[:4], tokens="cls")
    with pytest.raises(InputError, match="loss"):
        probe_harvest(acts, LABELS, loss="no such loss")
    heads = harvest(planted(), list(IMAGES[:4]), ["blocks.0.attn.hook_z"], out=tmp_path, **OPTIONS)
    with pytest.raises(InputError, match=r"pos head d_head"):
        probe_harvest(heads, LABELS[:4])
