"""Sources: upstream models by reference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor, nn

from prisma_core.errors import LoadError, qualified_name
from prisma_core.inputs import ImagePreprocess
from prisma_core.inputs.video import VideoPreprocess

if TYPE_CHECKING:
    from PIL.Image import Image

    from prisma_core.contract.case import Case


class Reference(NamedTuple):
    """The name of a model: ``source:rest``.

    >>> str(Reference("timm", "vit_base_patch16_224"))
    'timm:vit_base_patch16_224'
    """

    source: str
    rest: str

    def __str__(self) -> str:
        return f"{self.source}:{self.rest}"


@dataclass(frozen=True)
class Loaded:
    """An upstream model, and what its library knows about its inputs and outputs.

    Attributes:
        model: an upstream model, or one that is hooked already.
        preprocess: from images, or videos, to its input.
        labels: names of its classes.
        tokenizer: from texts to tokens ``[text pos]``, for models that read.
    """

    model: nn.Module
    preprocess: ImagePreprocess | VideoPreprocess | None = None
    labels: tuple[str, ...] | None = None
    tokenizer: Callable[[Sequence[str]], Tensor] | None = None


@dataclass(frozen=True)
class ModelInfo:
    """One line of ``prisma models``.

    Attributes:
        reference: as ``load`` takes it.
        family: the module or group it belongs to.
        pretrained: whether there are trained weights.
        note: anything else worth a word.
    """

    reference: str
    family: str
    pretrained: bool
    note: str = ""

    @property
    def rest(self) -> str:
        """The reference behind its colon."""
        return self.reference.partition(":")[2]


class Source(ABC):
    """Turns references ``name:rest`` into upstream models.

    Attributes:
        name: the part of a reference before the colon.
        library: the package it needs, if any.
        install: the command that installs it.
        unlisted: a regular expression of references, behind the colon, that it takes without listing them, such as
            names on a hub: a reference without its source is answered with this one.
    """

    name: ClassVar[str]
    library: ClassVar[str | None] = None
    install: ClassVar[str] = ""
    unlisted: ClassVar[str | None] = None

    @abstractmethod
    def load(self, rest: str, **options: Any) -> Loaded:
        """Load the model of a reference.

        Args:
            rest: the reference behind the colon.
            options: the caller's keywords of ``load``. A source that downloads takes ``pretrained``: False asks for the
                same model with weights drawn at random and no network call. ``prisma info`` does.

        Raises:
            UnknownName: there is none of this name; the nearest are suggested.
            LoadError: there is, but it cannot be read or reached.
        """

    def describe(self, upstream: nn.Module) -> Loaded:
        """Return a module of the source's library with what the library says about it: preprocessing, labels.

        ``prisma.adapt`` asks the source whose library the module's class comes from. No network call.
        """
        return Loaded(upstream)

    @abstractmethod
    def models(self) -> Iterator[ModelInfo]:
        """List the models that can be loaded, without any network call."""

    def loadable(self, rests: Collection[str]) -> Collection[str] | None:
        """Select the references, each behind its colon, that an adapter takes; None if that is not known.

        No network call, and quickly: ``prisma models`` asks for all it lists.
        """
        return None

    def sample(self, rest: str, seed: int = 0) -> Image | Sequence[Image] | None:
        """An image of the kind the model was made for, or the frames of a video; None if there is none.

        No network call.
        """
        return None

    def checkpoints(self, rest: str) -> dict[int, str]:
        """References of the checkpoints along a model's training, by step, the model itself last; none for most."""
        return {}

    def save_processor(self, processor: Any, folder: Path) -> None:
        """Write a tokenizer or image processor into an empty folder, without any code.

        ``prisma.save`` asks the source whose library, or whose own package, the object's class comes from, and
        compares what ``load_processor`` makes of the folder. The default is the object's own ``save_pretrained``.

        Raises:
            LoadError: it has no such method, its files cannot be reached, or they do not say it all.
        """
        if not hasattr(processor, "save_pretrained"):
            raise LoadError(f"{qualified_name(processor)} has no save_pretrained")
        processor.save_pretrained(folder)

    def load_processor(self, folder: Path) -> Any:
        """Return what ``save_processor`` wrote, made again with no network call; no code in the folder is run.

        Raises:
            LoadError: the files cannot be read.
        """
        raise LoadError(f"the source {self.name!r} reads no tokenizers and no image processors")

    def case(self, rest: str) -> Case | None:
        """The conformance case of a reference's architecture, or None if only its real size can be checked."""
        return None
