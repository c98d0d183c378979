"""The facts of a model's parts: frozen, checked, and the same after a trip through JSON. No field switches hooks on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from prisma_core.spec.brief import BriefModel

Side = Annotated[int, Field(gt=0)]  # pixels, or patches
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"]


class Facts(BriefModel):
    """Base of all specs: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NormSpec(Facts):
    """A norm over the last axis: layer norm or root mean square, with its own eps.

    Attributes:
        in_float32: computed in float32 whatever comes in, even float64.
        weight_in_float32: so is the product with the weight; False: that follows in the dtype that came in.
    """

    kind: Literal["ln", "rms"] = "ln"
    eps: float = Field(gt=0, lt=1)
    in_float32: bool = False
    weight_in_float32: bool = True

    @model_validator(mode="after")
    def _weight_last(self) -> NormSpec:
        if not self.weight_in_float32 and (self.kind != "rms" or not self.in_float32):
            raise ValueError("weight_in_float32=False goes with a root mean square norm in float32")
        return self


class RopeGrid(Facts):
    """Rule by which rotary tables follow another grid of patches: row and column each turn half of the channel pairs.

    Attributes:
        coordinates: ``index``: counted, plus ``offset``; the angle is coordinate times wave. ``centred``: patch centres
            from -1 to 1 over the image; the angle is 2 pi coordinate / wave. ``radians``: patch centres from -2 pi to
            2 pi, rounded to float32; the angle is coordinate times wave.
        waves: periods for ``centred``, frequencies for the others.
        column_waves: those of columns, where rows have others.
        column_first: columns turn the first pairs of channels, rows the second.
        normalize: what centred coordinates are divided by: each axis' own side, the shorter or the longer one.
        reference: rows and columns of the grid that counted coordinates are rescaled to.
        in_float32: cos and sin are rounded to float32.
        angles_in_float32: so are the angles that they are taken of.
    """

    coordinates: Literal["index", "centred", "radians"]
    waves: tuple[float, ...]
    column_waves: tuple[float, ...] | None = None
    column_first: bool = False
    offset: float = 0.0
    normalize: Literal["separate", "min", "max"] = "separate"
    reference: tuple[Side, Side] | None = None
    in_float32: bool = False
    angles_in_float32: bool = False


class RopeCount(Facts):
    """Rule by which rotary tables follow another video: frame, row and column each turn their channels, the rest stays.

    Tokens are counted through, as if every frame had the native rows and columns, whatever its size: upstream's way.

    Attributes:
        pairs: how many pairs of channels each of frame, row and column turns.
        theta: pair ``i`` turns by the coordinate times ``theta ** (-i / pairs)``.
        tiled: the tables hold an axis' frequencies one after the other, twice over, whichever channels turn together;
            False: each twice in a row.
        rows, columns: of a native frame.
    """

    pairs: int = Field(gt=0)
    theta: float = Field(gt=0)
    tiled: bool = False
    rows: int = Field(gt=0)
    columns: int = Field(gt=0)


class RopeSpec(Facts):
    """Rotary positions, kept as tables of cos and sin; prefix rows are the identity.

    Attributes:
        layout: which channels turn together: neighbours, or the two halves of a head.
        per_layer: the tables have a layer axis.
        per_head: the tables have a head axis.
        in_float32: queries and keys are turned in float32 whatever they are, even float64.
        grid: how to make tables for another image size; None if the size is fixed.
    """

    layout: Literal["interleaved", "half"]
    per_layer: bool = False
    per_head: bool = False
    in_float32: bool = False
    grid: RopeGrid | RopeCount | None = None


class AttentionSpec(Facts):
    """Softmax attention.

    Attributes:
        n_kv_heads: key and value heads; each serves ``n_heads / n_kv_heads`` query heads.
        scale: what scores are multiplied with before the softmax.
        qk_norm: a norm of queries and keys, for each head or over all of them.
        qk_norm_over: the width of that norm.
        inner_norm: a norm before the output projection.
        bias: ``attn_bias [head query_pos key_pos]`` is added to the scores.
    """

    n_heads: int = Field(gt=0)
    n_kv_heads: int = Field(gt=0)
    d_head: int = Field(gt=0)
    scale: float = Field(gt=0)
    qk_norm: NormSpec | None = None
    qk_norm_over: Literal["head", "all_heads"] = "head"
    inner_norm: NormSpec | None = None
    bias: bool = False

    @model_validator(mode="after")
    def _grouped(self) -> AttentionSpec:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        return self


class MlpSpec(Facts):
    """A two-layer perceptron, gated or not.

    Attributes:
        gated: ``act(x W_gate) * (x W_in)``.
        inner_norm: a norm before the output projection.
        pre_norm: an extra norm before the input projection, besides the block's.
    """

    d_mlp: int = Field(gt=0)
    act: Activation
    gated: bool = False
    inner_norm: NormSpec | None = None
    pre_norm: NormSpec | None = None


class BlockSpec(Facts):
    """One transformer block.

    Attributes:
        kind: ``pre``: norms before attention and MLP. ``res_post``: norms after them, before the addition.
            ``post``: norms after the addition, of the stream itself, as in BERT.
            ``parallel``: attention and MLP read the same normed stream and are added together.
        n_parallel: how many attentions, then how many MLPs, run side by side, each with a norm and a scale of its own.
        attn_scale, mlp_scale: a learned scale per channel (layer scale) on what is added to the stream.
    """

    kind: Literal["pre", "res_post", "parallel", "post"] = "pre"
    n_parallel: int = Field(default=1, gt=0)
    attn: AttentionSpec
    mlp: MlpSpec | None
    ln1: NormSpec | None
    ln2: NormSpec | None
    attn_scale: bool = False
    mlp_scale: bool = False

    @model_validator(mode="after")
    def _side_by_side(self) -> BlockSpec:
        if self.n_parallel > 1 and self.kind != "pre":
            raise ValueError(f"n_parallel={self.n_parallel} goes with kind='pre', not with {self.kind!r}")
        if self.kind == "post" and self.mlp is None:
            raise ValueError("a post-norm block has an MLP")
        return self


class Interpolation(Facts):
    """Rule by which a grid of positions follows another image size.

    Attributes:
        mode, antialias, align_corners: of ``torch.nn.functional.interpolate``.
        square: resized to a square of the longer side, then cut to the grid.
        offset: the grid is scaled by (side + offset) / native side, instead of to its sides.
        in_float32: computed in float32 whatever the positions are, even float64.
        rounded: what else goes through float32: ``prefix``, the positions before those that are resized; ``native``,
            those of the native size, which are not resized.
        weights_in_float32: computed as sums of positions by weights in float32, instead of by torch's function: of the
            four around a patch, in the dtype of the positions; antialiased, of all, in float32.
    """

    mode: Literal["bicubic", "bilinear"] = "bicubic"
    antialias: bool = True
    align_corners: bool = False
    square: bool = False
    offset: float = 0.0
    in_float32: bool = True
    rounded: Literal["", "prefix", "native"] = ""
    weights_in_float32: bool = False

    @model_validator(mode="after")
    def _weights(self) -> Interpolation:
        same = self.antialias == self.in_float32 and not (self.antialias and self.align_corners)
        if self.weights_in_float32 and (self.mode != "bilinear" or self.square or self.offset or not same):
            raise ValueError(
                "weights_in_float32 goes with mode='bilinear' alone, and with in_float32=True where antialias=True, "
                "where align_corners=False"
            )
        return self


class EmbedSpec(Facts):
    """From pixels to tokens.

    Attributes:
        patch: height and width of a patch.
        tubelet: how many frames a patch spans, for models that take videos; None for those that take images.
        any_length: videos may have another number of frames than the native one.
        in_channels: channels of the image.
        stem: ``conv``: one convolution a patch. ``opaque``: upstream's own module, which returns tokens.
        by_token: patches are copied so that a token's channels lie side by side in memory, where upstream copies them
            too: sums that norms take in float32 are rounded in another order otherwise.
        norm: a norm of the patch embedding.
        pos: a learned or fixed embedding is added to the tokens.
        pos_grid: rows and columns that positions are kept for, where those are not the native layout's.
        pos_factorized: one embedding for each row and one for each column are kept, and added.
        interpolation: how positions follow another image size; None if the size is fixed.
    """

    patch: tuple[Side, Side]
    tubelet: int | None = Field(default=None, gt=0)
    any_length: bool = False
    in_channels: int = Field(default=3, gt=0)
    stem: Literal["conv", "opaque"] = "conv"
    by_token: bool = False
    norm: NormSpec | None = None
    pos: bool = True
    pos_grid: tuple[Side, Side] | None = None
    pos_factorized: bool = False
    interpolation: Interpolation | None = None

    @model_validator(mode="after")
    def _together(self) -> EmbedSpec:
        if self.pos_grid is not None and self.interpolation is None:
            raise ValueError("positions of another grid than the native one need an interpolation")
        if self.tubelet is not None and (self.stem == "opaque" or self.pos_factorized):
            raise ValueError("a video's patches come from one convolution, and its positions are not factorized")
        if self.any_length and (self.tubelet is None or self.pos):
            raise ValueError("only videos have a length, and one without a position embedding for every frame")
        return self


class PoolSpec(Facts):
    """From tokens to the vectors the head reads.

    Attributes:
        kind: ``none``: all tokens. ``patches``: all but the prefix. ``token``: the first. ``avg``: the mean.
            ``token_and_avg``: the first, then the mean, side by side. ``attention``: learned queries (latents).
        with_prefix: whether class and register tokens take part in the mean or the attention.
        attn, mlp, norm: of attention pooling; the MLP, with its norm, is added to what attention returns.
        n_latents: how many learned queries there are.
        d_latent: their width, where it is not the tokens'.
        latent_norm: a norm of the queries before they are projected.
        latents: which of them the head reads: the ``first``, or the ``mean``.
    """

    kind: Literal["none", "patches", "token", "avg", "token_and_avg", "attention"]
    with_prefix: bool = False
    attn: AttentionSpec | None = None
    n_latents: int = Field(default=1, gt=0)
    d_latent: int | None = Field(default=None, gt=0)
    latent_norm: NormSpec | None = None
    latents: Literal["first", "mean"] = "first"
    mlp: MlpSpec | None = None
    norm: NormSpec | None = None

    @model_validator(mode="after")
    def _attention(self) -> PoolSpec:
        if (self.attn is not None) != (self.kind == "attention"):
            raise ValueError("attention pooling, and no other, has an attention")
        if self.kind == "patches" and self.with_prefix:
            raise ValueError("patches with the prefix are all tokens: that is kind='none'")
        return self
