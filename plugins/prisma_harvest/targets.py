"""Units to search top examples for, from files and words: probes, rows, texts, features of sparse coders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prisma_core import HookedDual, InputError, Result, UnknownName
from prisma_core.plugin import read_checkpoint
from prisma_harvest.manifest import Manifest
from prisma_harvest.passes import Pass
from prisma_harvest.reading import Harvest, Name

_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")


def of_rows(path: Path) -> dict[str, Any]:
    """Return the rows of a file with one tensor ``[direction d]``.

    Raises:
        InputError: it holds something else.
        LoadError: it cannot be read.
    """
    tensors = read_checkpoint(path)
    if len(tensors) != 1 or (one := next(iter(tensors.values()))).ndim != 2:
        said = ", ".join(f"{name} {list(each.shape)}" for name, each in tensors.items())
        raise InputError(f"Expected one tensor [direction d] in {path}, got {said or 'none'}.")
    return {"directions": one}


def of_probe(path: Path, source: Harvest | Pass, name: Name) -> dict[str, Any]:
    """Return the directions of a saved probe at a hook point, with its classes as labels.

    Raises:
        InputError: the file is no probe's.
        UnknownName: the probe does not read this hook point.
    """
    from prisma_lens.covectors import check_probe

    probe, full = Result.load(path), _full(source, name)
    check_probe(probe)
    weight = probe.tensors.get(f"{full}/weight")
    if weight is None:
        raise UnknownName(f"The probe in {path} reads {', '.join(probe.facts['names'])}, and this is {full}.")
    return {"directions": weight, "labels": list(probe.facts["rows"])}


class TextReading(nn.Module):
    """The cosine of rows and texts: of rows of a stream, behind the tower's last norm, pooling and projection.

    Args:
        tower: the vision tower.
        texts: of unit length, ``[text d]``.
        stream: whether rows are of the stream, or outputs already.
    """

    texts: Tensor

    def __init__(self, tower: nn.Module, texts: Tensor, stream: bool):
        super().__init__()
        self.tower, self.stream = tower, stream
        self.register_buffer("texts", texts)

    def forward(self, rows: Tensor) -> Tensor:
        from prisma_lens.readouts import token_outputs

        rows = rows.to(self.texts)
        outputs = token_outputs(self.tower, rows) if self.stream else rows  # type: ignore[arg-type]
        return outputs / outputs.norm(dim=-1, keepdim=True).clamp_min(1e-12) @ self.texts.T


def of_texts(texts: Sequence[str], model: Any, source: Harvest | Pass, name: Name) -> dict[str, Any]:
    """Return how alike texts and tokens are, each token taken alone, as the logit lens takes it.

    Raises:
        InputError: the model is no dual encoder, or the hook point no stream nor output of its vision tower.
    """
    if not isinstance(model, HookedDual):
        raise InputError("--text needs a dual encoder; a classifier's classes are the units of hook_logits.")
    full = _full(source, name)
    last = full.rpartition(".")[2]
    if last not in (*_STREAM, "hook_logits"):
        raise InputError(f"--text reads the stream or the output, {', '.join((*_STREAM, 'hook_logits'))}, not {full}.")
    return {"encode": TextReading(model.vision, model.encode_text(texts, normalize=True).detach(), last in _STREAM),
            "labels": list(texts)}  # fmt: skip


def of_coder(name: str, source: Harvest | Pass, query: Name) -> dict[str, Any]:
    """Return the features of a sparse coder, with their names where they have any.

    Args:
        name: of the catalogue, or a file or folder.

    Raises:
        InputError: it was trained on another model, hook point or tokens; with all that differs.
    """
    from prisma_sae import open_coder

    coder = open_coder(name)
    manifest = source.manifest if isinstance(source, Harvest) else source.manifest("float32", 1)
    if differences := _differences(coder.facts, manifest, _full(source, query)):
        raise InputError(f"This coder does not belong here: {'; '.join(differences)}.")
    labels = coder.facts.labels
    named = [labels.get(at, str(at)) for at in range(coder.facts.d_sae)]
    return {"encode": coder.encode, **({"labels": named} if labels else {})}


def _differences(facts: Any, manifest: Manifest, full: str) -> list[str]:
    """Return what differs between what a coder was trained on and what was read."""
    from prisma_sae.binding import other_model

    model = manifest.model
    differences = other_model(facts, model.reference, lambda: model.weights, lambda: model.behaviour)
    if facts.hook is not None and full not in (facts.hook, f"vision.{facts.hook}"):
        differences.append(f"it reads {facts.hook}, and this is {full}")
    read = "all" if manifest.pos is None else manifest.pos
    if facts.tokens is not None and facts.tokens != read:
        differences.append(f"it was trained on the tokens {facts.tokens!r}, and these are {read!r}")
    return differences


def _full(source: Harvest | Pass, name: Name) -> str:
    return source.point(name).name if isinstance(source, Harvest) else source.points[0].name
