"""The base of the canonical transformers: blocks, final norm, pooling and head."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from prisma_core.errors import InputError, NotApplicable, UnknownName, suggest
from prisma_core.errors.arguments import number, shown
from prisma_core.model import ZooModel
from prisma_core.toolbox.additions import changed_part
from prisma_core.transformer.circuits import Circuits
from prisma_core.transformer.stream.readout import Readout


class Tower(Circuits, ZooModel):
    """One transformer, of images or of texts: a model of its own, or one side of a dual encoder."""

    blocks: nn.ModuleList
    ln_final: nn.Module
    ln_pool: nn.Module
    head: nn.Linear

    @abstractmethod
    def plain(self) -> Tower:
        """Return a model as the spec makes it, without weights."""

    def unsaved_behaviour(self) -> str | None:
        with torch.device("meta"):
            return super().unsaved_behaviour() or changed_part(self, self.plain())

    def _check_stream(self, x: Tensor) -> None:
        if not isinstance(cast("object", x), Tensor) or x.shape[-1:] != (self.spec.d_model,):
            raise InputError(f"Expected a residual stream [batch pos {self.spec.d_model}], got {shown(x)}.")

    def readout_names(self) -> list[str]:
        """Return the hook points whose activations ``readouts`` needs."""
        return []

    @abstractmethod
    def readouts(self, store: Mapping[str, Tensor], *, n_tokens: int | None, tokens: Tensor | None) -> list[Readout]:
        """Return the linear maps from the normed stream to the vectors that each head reads.

        Args:
            store: activations of a pass, by full name: those of ``readout_names``.
            n_tokens: the length of the ``pos`` axis, where it is known.
            tokens: the tokens of the texts ``[text pos]``, for a model that reads texts.

        Raises:
            NotApplicable: the output is no linear function of the stream, or depends on an input that is not given.
        """


def class_index(model: Tower, key: int | str) -> int:
    """Return which class an index or a label means.

    Raises:
        NotApplicable: there are no classes.
        UnknownName: no such class.
        InputError: neither a label nor a whole number.
    """
    labels, n = model.labels or (), model.spec.n_classes
    if n is None:
        raise NotApplicable(
            "This model has no head, so there are no logits to count. Give a direction in its output instead, as "
            "floating point numbers."
        )
    if isinstance(key, str):
        if key in labels:
            return labels.index(key)
        alike = [index for index, label in enumerate(labels) if _words(label) == _words(key)]
        if len(alike) != 1:
            raise UnknownName(f"No class {key!r} among the model's {len(labels)} labels.{suggest(key, labels)}")
        return alike[0]
    index = number(key, "a class as its label, or its index")
    if not 0 <= index < n:
        raise UnknownName(f"No class {index}: they run from 0 to {n - 1}.")
    return index


def _words(label: str) -> list[str]:
    """Return the words of a label: an emoji before them, capitals and punctuation do not count."""
    return re.findall(r"\w+", label.casefold())
