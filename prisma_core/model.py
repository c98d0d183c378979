"""What the canonical models share: where they came from, and inputs to try them on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

import torch
from torch import Tensor

from prisma_core.errors import InputError
from prisma_core.hooks.model import HookedModel

if TYPE_CHECKING:
    from prisma_core.inputs import PicturePreprocess
    from prisma_core.inputs.video import VideoPreprocess
    from prisma_core.maps.weights import Origin

Size = tuple[int, ...]


@dataclass(frozen=True)
class Absent:
    """Stands for a companion that nobody gave: false, and whoever uses it is told how to give it.

    Attributes:
        what: the model's attribute that holds it.
        how: where it comes from, in a sentence.
    """

    what: str
    how: str

    def __bool__(self) -> Literal[False]:
        return False

    def __call__(self, *arguments: Any, **options: Any) -> NoReturn:
        raise InputError(f"This model came without a {self.what}. {self.how}")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_") or "how" not in vars(self):  # a copy that is not filled yet
            raise AttributeError(name)
        raise AttributeError(f"{name}: this model came without a {self.what}. {self.how}")


NO_PREPROCESS = Absent(
    "preprocess",
    "Set model.preprocess = prisma_core.inputs.Preprocess(size=model.spec.image_size, mean=..., std=...), with the "
    "mean and deviation it was trained with; some sources take them when they load: mean=, std=.",
)


class ZooModel(HookedModel):
    """A model in canonical form, described by its spec.

    Attributes:
        spec: the facts.
        preprocess: from pictures, or videos, to the tensor the model takes; set by whoever loaded the model. Where
            nobody did it is false, and calling it says what to set.
        labels: names of the classes, if the model has any.
        reference: what it was loaded from.
        origin: what it was adapted from.
    """

    spec: Any  # each model says which of AnySpec

    def __init__(self) -> None:
        super().__init__()
        self.preprocess: PicturePreprocess | VideoPreprocess | Absent | None = NO_PREPROCESS
        self.labels: tuple[str, ...] | None = None
        self.reference: str | None = None
        self.origin: Origin | None = None

    def towers(self) -> Mapping[str, ZooModel]:
        """Return the transformers this model is made of, by the prefix of their hook points."""
        return {"": self}

    def companions(self) -> Mapping[str, Callable[[Any], Tensor]]:
        """Return the attributes that hold what another library made, each with a way to try it: equal results mean
        that two are the same."""
        return {}

    def unsaved_behaviour(self) -> str | None:
        """Return what the model does that no spec says, to follow "This model"; None for most.

        Who makes such a model says it here: what is made from the spec alone, a saved file, would lack it.
        """
        towers = (tower for tower in self.towers().values() if tower is not self)
        return next((said for tower in towers if (said := tower.unsaved_behaviour())), None)

    @abstractmethod
    def sizes(self) -> list[Size]:
        """Return the sizes of input to try: the native one first, then others the model admits."""

    @abstractmethod
    def sample_inputs(
        self, batch: int = 1, *, size: Size | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Return inputs of the right shapes, drawn at random on the CPU: ``model(*model.sample_inputs())``.

        Args:
            batch: how many.
            size: one of ``sizes()``; default the native one.
            generator: of the numbers; default torch's.
        """


def check_place(what: str, x: Tensor, weight: Tensor | None) -> None:
    """Refuse an input that is not where the weights are, or not of their dtype.

    Raises:
        InputError: with both, and what moves it.
    """
    if weight is None:
        return
    if x.device != weight.device:
        raise InputError(
            f"Expected the {what} on {weight.device}, where the model is; it is on {x.device}. "
            f"Move it: {what}.to({str(weight.device)!r})."
        )
    if x.dtype == weight.dtype or not (x.is_floating_point() and weight.is_floating_point()):
        return
    if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):  # else torch brings the two together
        raise InputError(
            f"Expected the {what} in {weight.dtype}, as the model's weights are; it is in {x.dtype}. "
            f"Convert it: {what}.to({weight.dtype}), or the model: model.to({x.dtype})."
        )


def may_look(x: Tensor) -> bool:
    """Return whether a check may look at the numbers of an input.

    On a GPU it would stop the queue at every call, and neither ``torch.compile`` nor ``torch.vmap`` can trace it.
    """
    transformed = cast("Any", torch)._C._functorch.maybe_current_level() is not None
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed


def layer_index(index: int | None, default: int, n: int) -> int:
    """Return which layer an index means; negative ones count from the end, and ``n`` is past the last.

    Raises:
        InputError: there is none.
    """
    if index is None:
        return default
    if not -n <= index <= n:
        raise InputError(f"No layer {index}: layers run from 0 to {n - 1}, and {n} is past the last.")
    return index if index >= 0 else n + index
