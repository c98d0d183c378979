"""Where upstream models come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from prisma_core.inputs import PicturePreprocess
from prisma_core.inputs.video import VideoPreprocess

if TYPE_CHECKING:
    from PIL.Image import Image

    from prisma_core.plugin.case import Case


@dataclass(frozen=True)
class Loaded:
    """What a source hands over: a model, and what is known about its inputs and outputs.

    Attributes:
        model: an upstream model, or one that is hooked already.
        preprocess: from pictures, or videos, to its input.
        labels: names of its classes.
        tokenizer: from texts to tokens ``[text pos]``, for models that read.
    """

    model: nn.Module
    preprocess: PicturePreprocess | VideoPreprocess | None = None
    labels: tuple[str, ...] | None = None
    tokenizer: Callable[[Sequence[str]], Tensor] | None = None


@dataclass(frozen=True)
class ModelInfo:
    """One line of ``prisma models``.

    Attributes:
        reference: what ``load`` takes.
        family: the module or group it belongs to.
        pretrained: whether there are trained weights.
        note: anything else worth a word.
    """

    reference: str
    family: str
    pretrained: bool
    note: str = ""


class Source(ABC):
    """Turns references ``name:rest`` into upstream models.

    Attributes:
        name: the part of a reference before the colon.
        library: the package it needs, if any.
        install: the command that installs it.
    """

    name: ClassVar[str]
    library: ClassVar[str | None] = None
    install: ClassVar[str] = ""

    @abstractmethod
    def load(self, rest: str, **options: Any) -> Loaded:
        """Return the model a reference names.

        Args:
            rest: the reference behind the colon.
            options: what the caller gave to ``load``. A source that downloads takes ``pretrained``: False asks for the
                same model with weights drawn at random and no network call. ``prisma info`` does.

        Raises:
            UnknownName: there is none of this name; the nearest are suggested.
            LoadError: there is, but it cannot be read or reached.
        """

    @abstractmethod
    def models(self) -> Iterator[ModelInfo]:
        """Yield what can be loaded, without any network call."""

    def loadable(self, rests: Collection[str]) -> Collection[str] | None:
        """Return those of some references, each behind its colon, that an adapter takes; None if it is not known.

        No network call, and quickly: ``prisma models`` asks for all it lists.
        """
        return None

    def sample(self, rest: str, seed: int = 0) -> Image | None:
        """Return a picture of the kind the model was made for, without any network call, or None if there is none."""
        return None

    def keep(self, companion: object, folder: Path) -> bool:
        """Write what makes a tokenizer or a processor again into an empty folder; False if it is of no kind known.

        ``prisma.save`` asks every source whose library is there, and tries what ``kept`` returns before it relies on
        it. No code goes into the folder: it may come from a stranger.

        Raises:
            LoadError: it is of this library, but cannot be kept: its files cannot be reached, or do not say it all.
        """
        return False

    def kept(self, folder: Path) -> Any:
        """Return what ``keep`` wrote into a folder, made again with no network call.

        Raises:
            LoadError: the files cannot be read.
        """
        raise NotImplementedError

    def case(self, rest: str) -> Case | None:
        """Return the conformance case of a reference's architecture, or None if only its real size can be checked."""
        return None
