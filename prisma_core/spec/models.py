"""The facts of whole models: a vision transformer, a text transformer, the two as a dual encoder; and hooked ones."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from pydantic import Field, model_validator

from prisma_core.errors.arguments import number, sides
from prisma_core.spec.alike import AllBlocks
from prisma_core.spec.layout import TokenLayout
from prisma_core.spec.parts import BlockSpec, EmbedSpec, Facts, MlpSpec, NormSpec, PoolSpec, RopeSpec, Side
from prisma_core.spec.plain import LN, PARTS, facts_by_part, plain_block


class ModelSpec(AllBlocks, Facts):
    """Everything about a vision transformer but its weights.

    Attributes:
        image_size: height and width of an image, or of a video's frames.
        n_heads_out: 2: a second head reads the distillation token, and the logits are the mean of both.
    """

    kind: Literal["vision"] = "vision"
    d_model: int = Field(gt=0)
    image_size: tuple[Side, Side]
    embed: EmbedSpec
    layout: TokenLayout
    blocks: tuple[BlockSpec, ...] = Field(min_length=1)
    rope: RopeSpec | None = None
    ln_pre: NormSpec | None = None
    ln_final: NormSpec | None = None
    pool: PoolSpec
    ln_pool: NormSpec | None = None
    d_pool: int = Field(gt=0)
    n_classes: int | None = Field(default=None, gt=0)
    n_heads_out: Literal[1, 2] = 1

    @classmethod
    def plain(
        cls,
        /,
        *,
        d_model: int = 12,
        layers: int = 2,
        heads: int = 2,
        patch: int | tuple[int, int] = 4,
        image: int | tuple[int, int] = (8, 12),
        norm: NormSpec | None = LN,
        **facts: Any,
    ) -> ModelSpec:
        """Return the spec of a plain ViT, or of one that differs from it in a few facts.

        Plain means: patches, a class token, learned positions, pre-norm blocks with GELU MLPs of ``4 * d_model``
        neurons, a final norm, and a head of 10 classes that reads the class token.

        Args:
            d_model: width of the residual stream.
            layers: how many blocks; all are alike.
            heads: how many heads, of ``d_model // heads`` channels each.
            patch: height and width of a patch, in pixels; one number for both.
            image: height and width of an image, in pixels; one number for both.
            norm: every norm of the stream; None for none.
            facts: what else differs: fields of ``ModelSpec``, ``EmbedSpec``, ``TokenLayout``, ``PoolSpec``,
                ``BlockSpec``, ``AttentionSpec`` and ``MlpSpec``. A field that several have (``inner_norm``) is set in
                each. ``kind`` is the block's; that of the pooling is ``pool="avg"``.

        Raises:
            InputError: there is no such fact.
            SpecError: the facts contradict each other.

        >>> spec = ModelSpec.plain(d_model=12, heads=2, patch=4, image=(8, 12), registers=2, gated=True, pool="avg")
        >>> spec.layout.n_tokens, spec.blocks[0].attn.d_head, spec.n_classes
        (9, 6, 10)
        """
        patch, image = sides(patch, "the patch"), sides(image, "the image")
        kinds = (cls, EmbedSpec, TokenLayout, PoolSpec, *PARTS)
        hidden = [(cls, "kind"), (EmbedSpec, "norm"), *((PoolSpec, name) for name in ("kind", "attn", "mlp", "norm"))]
        by_part = facts_by_part(facts, kinds, hidden)
        block = plain_block(d_model, heads, norm, by_part)
        whole: dict[str, Any] = {"pool": "token", **by_part.pop(cls)}
        if isinstance(kind := whole["pool"], str):
            attn = block.attn if kind == "attention" else None
            whole["pool"] = {"kind": kind, "attn": attn, **by_part[PoolSpec]}
            whole = {"d_pool": 2 * d_model if kind == "token_and_avg" else d_model, **whole}
        grid = {"rows": image[0] // patch[0], "columns": image[1] // patch[1]}
        plain: dict[str, Any] = {
            "d_model": d_model,
            "image_size": image,
            "embed": {"patch": patch, **by_part[EmbedSpec]},
            "layout": {"cls": 1, **grid, **by_part[TokenLayout]},
            "blocks": (block,) * number(layers, "how many layers", 0, 1 << 12),
            "ln_final": norm,
            "d_pool": d_model,
            "n_classes": 10,
        }
        return cls(**plain | whole)

    @model_validator(mode="after")
    def _together(self) -> ModelSpec:
        if self.n_heads_out == 2 and (self.pool.kind != "token" or self.ln_pool is not None):
            raise ValueError("two heads read the class and the distillation token, with no norm between")
        attns = [block.attn for block in self.blocks]
        if self.rope is not None and len({attn.d_head for attn in attns}) > 1:
            raise ValueError("rotary tables have one width, so the heads of all blocks have it too")
        heads = {n for attn in attns for n in (attn.n_heads, attn.n_kv_heads)}
        if self.rope is not None and self.rope.per_head and len(heads) > 1:
            raise ValueError("rotary tables of each head (per_head) need as many keys as queries, in every block")
        if self.layout.frames > 1 and self.embed.tubelet is None:
            raise ValueError(f"{self.layout.frames} frames of patches need a video: give the embedding a tubelet")
        grid = tuple(side // patch for side, patch in zip(self.image_size, self.embed.patch, strict=True))
        if grid != (self.layout.rows, self.layout.columns):
            raise ValueError(
                f"an image of {self.image_size} pixels has {grid} rows and columns of patches of {self.embed.patch}, "
                f"and the layout says {(self.layout.rows, self.layout.columns)}"
            )
        if self.layout.order != "frame row column":
            raise ValueError(f"patches of a canonical model run frame by frame, not in the order {self.layout.order!r}")
        if any(block.kind == "post" for block in self.blocks):
            raise ValueError("post-norm models of images are not covered: blocks of kind 'post' are those of texts")
        return self

    @property
    def patch_size(self) -> int | tuple[int, int]:
        """The side of a patch in pixels; height and width where it is not square."""
        height, width = self.embed.patch
        return height if height == width else (height, width)

    @property
    def fixed_size(self) -> bool:
        """Whether it takes images of its native size alone: positions, or biases of attention, follow no other."""
        return self.embed.interpolation is None or any(block.attn.bias for block in self.blocks)

    @property
    def n_ctx(self) -> int:
        """Tokens of an image of the native size, or of a video, prefix tokens included."""
        return self.layout.n_tokens

    @property
    def n_channels(self) -> int:
        """Channels of an image."""
        return self.embed.in_channels

    @property
    def n_frames(self) -> int | None:
        """Frames of the video it takes; None for a model of images."""
        return None if self.embed.tubelet is None else self.layout.frames * self.embed.tubelet


class TextPoolSpec(Facts):
    """From a text's tokens to the one vector the head reads.

    Attributes:
        kind: ``argmax``: at the largest token id, where CLIP's end of text stands. ``eos``: at the first ``eos_id``.
            ``first`` and ``last``: at that position. ``avg``: the mean of the tokens that are no padding. ``none``: all
            tokens.
    """

    kind: Literal["argmax", "eos", "first", "last", "avg", "none"]
    eos_id: int | None = None

    @model_validator(mode="after")
    def _eos(self) -> TextPoolSpec:
        if (self.eos_id is not None) != (self.kind == "eos"):
            raise ValueError("pooling at the end of text, and no other, needs its id")
        return self


class TextSpec(AllBlocks, Facts):
    """Everything about a text transformer but its weights.

    Attributes:
        n_vocab: tokens in the vocabulary.
        n_ctx: the longest text, in tokens.
        causal: a token attends to itself and to those before it alone.
        suffix: a learned token stands behind the text (CoCa's class token).
        pad_id: the padding token, which is masked as a key; None where padding is attended to like any other token.
        pad_lag: how many places too late padding is hidden: CoCa's published weights were trained with a slip of 1.
        pos_by_text: positions count the tokens that are no padding, from row 1 on; padding has row 0.
        ln_pre: a norm of the embeddings.
        n_classes: the width of the output projection; None where there is none.
        head: an MLP in the place of the projection.
    """

    kind: Literal["text"] = "text"
    d_model: int = Field(gt=0)
    n_vocab: int = Field(gt=0)
    n_ctx: int = Field(gt=0)
    causal: bool
    suffix: bool = False
    pad_id: int | None = None
    pad_lag: int = Field(default=0, ge=0)
    pos_by_text: bool = False
    blocks: tuple[BlockSpec, ...] = Field(min_length=1)
    ln_pre: NormSpec | None = None
    ln_final: NormSpec | None = None
    pool: TextPoolSpec
    ln_pool: NormSpec | None = None
    n_classes: int | None = Field(default=None, gt=0)
    head: MlpSpec | None = None

    @classmethod
    def plain(
        cls,
        /,
        *,
        d_model: int = 12,
        layers: int = 2,
        heads: int = 2,
        norm: NormSpec | None = LN,
        **facts: Any,
    ) -> TextSpec:
        """Return the spec of a plain causal text transformer, or of one that differs from it in a few facts.

        Plain means: 20 tokens of vocabulary, texts of at most 8, pre-norm blocks with GELU MLPs of ``4 * d_model``
        neurons, a final norm, and a projection to ``d_model`` that reads the largest token id, as CLIP's does.

        Args:
            d_model, layers, heads, norm: as in ``ModelSpec.plain``.
            facts: what else differs: fields of ``TextSpec``, ``BlockSpec``, ``AttentionSpec`` and ``MlpSpec``. ``kind``
                is the block's; that of the pooling is ``pool="last"``.

        Raises:
            InputError: there is no such fact.
            SpecError: the facts contradict each other.

        >>> spec = TextSpec.plain(heads=3, n_ctx=16, pool="last")
        >>> spec.n_tokens, spec.blocks[0].attn.d_head
        (16, 4)
        """
        by_part = facts_by_part(facts, (cls, *PARTS), [(cls, "kind")])
        block = plain_block(d_model, heads, norm, by_part)
        plain = {"n_vocab": 20, "n_ctx": 8, "causal": True, "ln_final": norm, "pool": "argmax", "n_classes": d_model}
        whole: dict[str, Any] = {
            **plain,
            "d_model": d_model,
            "blocks": (block,) * number(layers, "layers", 0, 1 << 12),
            **by_part.pop(cls),
        }
        if isinstance(kind := whole["pool"], str):
            whole["pool"] = {"kind": kind}
        return cls(**whole)

    @model_validator(mode="after")
    def _positions(self) -> TextSpec:
        if self.pos_by_text and (self.pad_id is None or self.suffix):
            raise ValueError("positions that count text need a padding to leave out, and nothing behind it")
        if self.pool.kind == "avg" and (self.pad_id is None or self.suffix):
            raise ValueError("a mean of the tokens that are no padding needs a padding, and nothing behind it")
        if self.head is not None and self.n_classes is None:
            raise ValueError("an MLP in the place of the projection needs n_classes, its width")
        return self

    @property
    def d_pool(self) -> int:
        """Width of what the head reads."""
        return self.d_model

    @property
    def d_vocab(self) -> int:
        """Tokens in the vocabulary."""
        return self.n_vocab

    @property
    def n_tokens(self) -> int:
        """The longest text, in tokens, with what stands behind it."""
        return self.n_ctx + int(self.suffix)


class DualSpec(Facts):
    """Everything about a dual encoder but its weights.

    Attributes:
        logit_bias: a learned number is added to every similarity.
    """

    kind: Literal["dual"] = "dual"
    vision: ModelSpec
    text: TextSpec
    logit_bias: bool = False

    def __getattr__(self, name: str) -> Any:
        """Say which tower to ask for a fact of one transformer."""
        towers = {"vision": ModelSpec, "text": TextSpec}
        places = [
            f"spec.{tower}.{name}"
            for tower, kind in towers.items()
            if name in {*kind.model_fields, *vars(kind), *vars(AllBlocks)}
        ]
        if name.startswith("_") or not places:
            return getattr(super(), "__getattr__")(name)  # noqa: B009
        raise AttributeError(f"A dual encoder has two transformers: read {' or '.join(places)}.")


class MapSpec(Facts):
    """The inputs of a model that has a hook map but no canonical form.

    Attributes:
        shape: of one input, the batch left out: ``(3, 224, 224)`` for an image, ``(8, 3, 224, 224)`` for a video.
        sizes: other lengths of the last axes it admits, such as heights and widths; none where the size is fixed.
        layout: which token is where along the ``pos`` axes of its hook points, at the native size; a ``pos`` beside an
            axis ``frame`` counts one frame's tokens. Of an input of another size there are more patches or fewer, as
            large as at the native one. None where ``pos`` counts something else.
        n_classes: the width of its head; None where there is none.
        pixels: height and width of the patches, where the output is the pixels of each patch, in the values of the
            input: ``[batch patch pixel]``, patches row by row, a patch's pixels in the order row, column, channel.
    """

    kind: Literal["map"] = "map"
    shape: tuple[int, ...] = Field(min_length=1)
    sizes: tuple[tuple[int, ...], ...] = ()
    layout: TokenLayout | None = None
    n_classes: int | None = Field(default=None, gt=0)
    pixels: tuple[Side, Side] | None = None


AnySpec: TypeAlias = ModelSpec | TextSpec | DualSpec
