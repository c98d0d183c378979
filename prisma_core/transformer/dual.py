"""The canonical dual encoder: images and texts in one space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from prisma_core.errors import InputError, UnknownName, suggest
from prisma_core.errors.arguments import check_flags, expect, several, shown
from prisma_core.errors.migration import migration_hint
from prisma_core.hooks.point import HookPoint
from prisma_core.inputs import ImageLike
from prisma_core.model import Size, ZooModel, read_sample
from prisma_core.spec import DualSpec
from prisma_core.spec.layout import TokenLayout
from prisma_core.toolbox.arguments import checked
from prisma_core.transformer.recipes import RecipeCache
from prisma_core.transformer.stream import StreamCache
from prisma_core.transformer.text import HookedText, tokens_of
from prisma_core.transformer.vit import HookedViT


class DualCache(RecipeCache):
    """A cache of a pair of towers."""

    def _no_stream(self) -> str:
        return (
            "Decompositions read one transformer, and this cache is of a pair of towers. Take the part that is of one: "
            "cache.tower('vision') or cache.tower('text')."
        )

    def tower(self, name: str) -> StreamCache:
        """Return the part of the cache that is of one tower of its model, under the tower's own names.

        It is what ``model.vision.run_with_cache`` would have returned, and has its decompositions.

        Args:
            name: ``vision`` or ``text``.

        Raises:
            UnknownName: there is no such tower.
        """
        towers = cast("HookedDual", self.model).towers()
        names = [prefix.removesuffix(".") for prefix in towers]
        if expect(name, str, "the name of a tower") not in names:
            raise UnknownName(f"No tower {name!r}; there are {', '.join(names)}.{suggest(name, names)}")
        tower, prefix = towers[f"{name}."], f"{name}."
        store: Any = {each.removeprefix(prefix): x for each, x in self._entries.items() if each.startswith(prefix)}
        axes = {each.removeprefix(prefix): x for each, x in self.axes.items() if each.startswith(prefix)}
        source: dict[str, Any] = {"tokens": self.tokens} if tower.layout_for() is None else {"layout": self.layout}
        cache = StreamCache(store, axes=axes, model=tower, has_batch_dim=self.has_batch_dim, pos=self.pos, **source)
        cache.gradients = None if self.gradients is None else cast("DualCache", self.gradients).tower(name)
        return cache


class HookedDual(ZooModel):
    """A vision and a text tower, and how alike what they say is.

    Each tower is a model of its own: ``model.vision``, ``model.text``. Hook points of the whole begin with their
    names.

    Attributes:
        tokenizer: from texts to tokens ``[text pos]``; the text tower's own.
        preprocess: from images to the tensor the model takes; the vision tower's own.
        logit_scale: the logarithm of what similarities are multiplied with.
        logit_bias: what is added to them, if the spec has one.
    """

    spec: DualSpec
    cache_type = DualCache

    @checked
    def __init__(self, spec: DualSpec, stem: nn.Module | None = None):
        super().__init__()
        self.spec = spec
        self.vision = HookedViT(spec.vision, stem)
        self.text = HookedText(spec.text)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        if spec.logit_bias:
            self.logit_bias = nn.Parameter(torch.zeros(()))
        self.hook_image_embed = HookPoint("batch d_embed", "vision.logits / norm(vision.logits)")
        self.hook_text_embed = HookPoint("text d_embed", "text.logits / norm(text.logits)")
        bias = " + logit_bias" if spec.logit_bias else ""
        self.hook_logits = HookPoint("batch text", f"image_embed . text_embed * exp(logit_scale){bias}")

    @property
    def tokenizer(self) -> Any:
        return self.text.tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self.text.tokenizer = value

    @property
    def preprocess(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.vision.preprocess

    @preprocess.setter
    def preprocess(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if "vision" in self._modules:  # the base sets it before there is a tower
            self.vision.preprocess = value

    def layout_for(self, *inputs: Any) -> TokenLayout:
        return self.vision.layout_for(*inputs)

    def tokens_in(self, *inputs: Any, **kwargs: Any) -> Tensor | None:
        return inputs[1] if len(inputs) > 1 else kwargs.get("tokens")

    def attribute_hint(self, name: str) -> str | None:
        towers = [f"model.{tower}{name}" for tower, model in self.towers().items() if hasattr(model, name)]
        if name.startswith("_") or not towers:
            return migration_hint(name)
        return f"this is a pair of towers, and each has its own: {' or '.join(towers)}."

    def towers(self) -> Mapping[str, ZooModel]:
        return {"vision.": self.vision, "text.": self.text}

    def sizes(self) -> list[Size]:
        return self.vision.sizes()

    def sample_inputs(
        self, batch: int = 1, *, size: Size | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        batch = read_sample(batch, size, generator)
        return (
            *self.vision.sample_inputs(batch, size=size, generator=generator),
            *self.text.sample_inputs(batch + 1, generator=generator),
        )

    def forward(self, image: Tensor, tokens: Int[Tensor, "text pos"] | None = None) -> Float[Tensor, "batch text"]:
        """Return how alike each image and each text are.

        Args:
            image: what ``vision`` takes.
            tokens: what ``text`` takes: ``[text pos]``.

        Raises:
            InputError: there are no tokens, or an input is of another shape or kind.
        """
        if tokens is None:
            raise InputError(
                "Expected images and tokens [text pos], got no tokens: model(image, model.tokens(texts)). For one "
                "tower alone: model.encode_image(image), model.encode_text(texts), model.vision.run_with_cache(image)."
            )
        return self.compare(self.vision(image), self.text(tokens))

    def compare(
        self, seen: Float[Tensor, "batch d_embed"], read: Float[Tensor, "text d_embed"]
    ) -> Float[Tensor, "batch text"]:
        """Return how alike images and texts are, given what the towers make of them; hooks behind the towers run.

        Args:
            seen: outputs of ``vision``.
            read: outputs of ``text``.
        """
        for x, what in ((seen, "batch"), (read, "text")):
            if not isinstance(cast("object", x), Tensor) or x.ndim != 2:
                raise InputError(f"Expected vectors [{what} d_embed], got {shown(x)}.")
        seen = self.hook_image_embed(F.normalize(seen, dim=-1))
        read = self.hook_text_embed(F.normalize(read, dim=-1))
        logits = seen @ read.T * self.logit_scale.exp()
        if self.spec.logit_bias:
            logits = logits + self.logit_bias
        return self.hook_logits(logits)

    def encode_image(
        self, image: Tensor | ImageLike | Sequence[ImageLike], *, normalize: bool = False
    ) -> Float[Tensor, "batch d_embed"]:
        """Return the vectors ``[batch d_embed]`` of images, or of the tensor the model takes.

        Args:
            image: images, or the tensor the model takes.
            normalize: give unit vectors, as the model compares them. Hooks on ``vision.`` run always, those on
                ``image_embed``, the unit vectors, only then. The default is open_clip's and transformers'.
        """
        check_flags(normalize=normalize)
        features = self.vision(self._pixels(image))
        return self.hook_image_embed(F.normalize(features, dim=-1)) if normalize else features

    def encode_text(
        self, text: Tensor | str | Sequence[str], *, normalize: bool = False
    ) -> Float[Tensor, "text d_embed"]:
        """Return the vectors ``[text d_embed]`` of a text, a list of texts, or tokens ``[text pos]``.

        Args:
            text: a text, several, or tokens.
            normalize: as in ``encode_image``.
        """
        check_flags(normalize=normalize)
        features = self.text(self.tokens(text))
        return self.hook_text_embed(F.normalize(features, dim=-1)) if normalize else features

    def classify(
        self,
        image: Tensor | ImageLike | Sequence[ImageLike],
        labels: str | Sequence[str],
        *,
        template: str = "a photo of a {}.",
    ) -> Float[Tensor, "batch label"]:
        """Return the probability of each label for each image ``[batch label]``, with no training: zero-shot.

        >>> import prisma_core as prisma
        >>> clip = prisma.load("toy:clip-scenes")
        >>> clip.classify(torch.zeros(1, 3, 64, 64), ["red circle", "blue star"], template="a {}").shape
        torch.Size([1, 2])

        Args:
            image: images, or the tensor the model takes.
            labels: names of classes.
            template: the sentence they are put in, at ``{}``.

        Raises:
            InputError: there are no labels, or no place for them in the template.
        """
        given = cast("object", template)
        if not isinstance(given, str) or "{}" not in given:
            raise InputError(
                f"Expected one sentence with {{}} where the label goes, such as 'a photo of a {{}}.', got {given!r}. "
                "With several, take the mean of what classify returns for each."
            )
        expected = "names of classes, such as ['cat', 'dog']"
        names = [labels] if isinstance(labels, str) else several(labels, expected)
        for name in names:
            expect(name, str, expected)
        tokens = self.tokens([template.replace("{}", name) for name in names])
        return self(self._pixels(image), tokens).softmax(-1)

    def tokens(self, text: Tensor | str | Sequence[str]) -> Int[Tensor, "text pos"]:
        """Return tokens ``[text pos]`` of texts, as ``text.tokens`` does; with the same errors."""
        return tokens_of(self.text, text, self.reference)

    def _pixels(self, image: Any) -> Tensor:
        if isinstance(image, Tensor) and image.ndim >= 4:
            return image
        return self.preprocess(image).to(self.input_like)

    @property
    def input_like(self) -> Tensor:
        return self.vision.input_like
