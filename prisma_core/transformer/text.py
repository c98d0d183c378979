"""The canonical text transformer: one tower of a dual encoder, or a model of its own."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from prisma_core.errors import InputError, NotApplicable
from prisma_core.errors.arguments import shown
from prisma_core.errors.migration import migration_hint
from prisma_core.hooks.point import HookPoint
from prisma_core.inputs.checks import check_place, check_plain, may_look
from prisma_core.model import MissingProcessor, Processor, Size, layer_index, read_sample
from prisma_core.spec import TextPoolSpec, TextSpec
from prisma_core.toolbox.arguments import checked
from prisma_core.toolbox.precision import joining, matrix_dtype
from prisma_core.transformer.block import STREAM, make_block
from prisma_core.transformer.mlp import MLP
from prisma_core.transformer.norm import norm_or_identity
from prisma_core.transformer.stream import StreamCache
from prisma_core.transformer.stream.readout import Readout
from prisma_core.transformer.tower import Tower

Tokenizer = Callable[[Sequence[str]], Tensor]


class TokenEmbed(nn.Module):
    """One row for every token of the vocabulary, and one for every position.

    Attributes:
        W_E: ``[vocab d_model]``.
        suffix: what stands behind the text, where the spec has it: ``[d_model]``.
        pos_embed: ``[pos d_model]``; one row more, the first, where padding has one of its own.
    """

    def __init__(self, spec: TextSpec):
        super().__init__()
        self.W_E = nn.Parameter(torch.zeros(spec.n_vocab, spec.d_model))
        if spec.suffix:
            self.suffix = nn.Parameter(torch.zeros(spec.d_model))
        self.pos_embed = nn.Parameter(torch.zeros(spec.n_tokens + int(spec.pos_by_text), spec.d_model))

    def forward(self, tokens: Int[Tensor, "batch token"]) -> Float[Tensor, "batch token d_model"]:
        """Return the rows of tokens: ``[batch token d_model]``."""
        return self.W_E[tokens]


NO_IMAGES = MissingProcessor("This model reads texts, not images: model.tokens(texts) makes its input.")


class HookedText(Tower):
    """A text transformer whose every inside can be read and replaced.

    Args:
        spec: the facts; weights are whatever the parts initialise themselves with until loaded.

    Attributes:
        tokenizer: from texts to tokens ``[text pos]``; set when the model is loaded.
    """

    spec: TextSpec
    cache_type = StreamCache
    tokenizer = Processor()

    @checked
    def __init__(self, spec: TextSpec):
        super().__init__()
        self.spec = spec
        self.preprocess = NO_IMAGES
        self.tokenizer = None
        self.embed = TokenEmbed(spec)
        self.hook_embed = HookPoint("batch token d_model" if spec.suffix else STREAM, "W_E[token]")
        self.hook_pos_embed = HookPoint(STREAM, "the position embedding")
        self.hook_full_embed = HookPoint(STREAM, f"embed{', suffix behind it,' if spec.suffix else ''} + pos_embed")
        if spec.ln_pre is not None:
            self.ln_pre = norm_or_identity(spec.ln_pre, spec.d_model)
            self.hook_ln_pre = HookPoint(STREAM, "ln_pre(full_embed)")
        self.blocks = nn.ModuleList(make_block(block, spec.d_model, spec.n_tokens, None) for block in spec.blocks)
        if spec.ln_final is not None:
            self.ln_final = norm_or_identity(spec.ln_final, spec.d_model)
            self.hook_ln_final = HookPoint(STREAM, "ln_final(resid_post of the last block)")
        pooled = STREAM if spec.pool.kind == "none" else "batch d_model"
        self.hook_pooled = HookPoint(pooled, f"the stream pooled by {spec.pool.kind}, before ln_pool")
        self.ln_pool = norm_or_identity(spec.ln_pool, spec.d_model, pooled)
        if spec.n_classes is not None:
            if spec.head is None:
                self.head = nn.Linear(spec.d_model, spec.n_classes)
            else:
                self.head_mlp = MLP(spec.head, spec.d_model, spec.n_classes, pooled.removesuffix(" d_model"))
        read = "ln_pool(pooled)" if spec.ln_pool else "pooled"
        axes = pooled if spec.n_classes is None else pooled.replace("d_model", "class")
        self.hook_logits = HookPoint(axes, f"head({read})" if spec.n_classes is not None else read)

    def plain(self) -> HookedText:
        return HookedText(self.spec)

    def attribute_hint(self, name: str) -> str | None:
        if name == "layout":
            return "texts have no rows and columns of patches; positions of tokens are numbers."
        return migration_hint(name)

    def sizes(self) -> list[Size]:
        return [(self.spec.n_ctx,), (max(min(2, self.spec.n_ctx), self.spec.n_ctx - 2),)]

    def sample_inputs(
        self, batch: int = 1, *, size: Size | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        batch, length = read_sample(batch, size, generator), size[0] if size else self.spec.n_ctx
        special = {self.spec.pad_id, self.spec.pool.eos_id}
        with torch.device("cpu"):
            plain = torch.tensor([token for token in range(self.spec.n_vocab) if token not in special])
            tokens = plain[torch.randint(len(plain), (batch, length), generator=generator)]
            # Texts of different lengths: the end of the text stands somewhere, and only padding comes after it.
            ends = torch.randint(min(1, length - 1), length, (batch,), generator=generator)
            after = torch.arange(length) > ends[:, None]
            if self.spec.pad_id is not None:
                tokens = torch.where(after, self.spec.pad_id, tokens)
            if self.spec.pool.eos_id is not None:
                tokens[torch.arange(batch), ends] = self.spec.pool.eos_id
        return (tokens,)

    def forward(self, tokens: Int[Tensor, "batch pos"], *, stop_at_layer: int | None = None) -> Tensor:
        """Return the pooled and projected text, or all tokens where nothing pools.

        Args:
            tokens: ``[batch pos]``, at most ``n_ctx`` of them.
            stop_at_layer: return the residual stream before this block instead; negative counts from the end.

        Raises:
            InputError: tokens of another shape or kind.
        """
        self._check(tokens)
        dtype = matrix_dtype(self.blocks)  # rows are looked up: in which dtype the blocks say
        x = self.hook_embed(self.embed(tokens)).to(dtype=dtype)
        if self.spec.suffix:
            x = torch.cat([x, joining(self.embed.suffix, x, self.blocks).expand(x.shape[0], 1, -1)], dim=1)
        pos = joining(self.positions(tokens), x, self.blocks)
        if self.hook_pos_embed.wanted:
            pos = self.hook_pos_embed(pos.expand(x.shape).clone())  # a cache must not see later edits of weights
        x = self.hook_full_embed(x + pos)
        if self.spec.ln_pre is not None:
            x = self.hook_ln_pre(self.ln_pre(x))
        mask = self._mask(tokens)
        for index in range(layer_index(stop_at_layer, len(self.blocks), len(self.blocks))):
            x = self.blocks[index](x, None, mask)
        return x if stop_at_layer is not None else self.unembed(x, tokens)

    def readouts(self, store: Mapping[str, Tensor], *, n_tokens: int | None, tokens: Tensor | None) -> list[Readout]:
        if self.spec.head is not None:
            raise NotApplicable(
                "This model's head is an MLP, so its output is no sum over components of the stream. decompose_resid, "
                "stack_head_results and accumulated_resid hold all the same."
            )
        head = self.head if self.spec.n_classes is not None else None
        if self.spec.pool.kind == "none":
            return [Readout(head, ())]
        if tokens is None:
            raise NotApplicable(
                "Which token the model reads depends on the text, which this cache does not know. Give it: "
                "cache.tokens = tokens."
            )
        return [Readout(head, (self.shares(tokens.to(self.embed.W_E.device)),))]

    def positions(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "*batch pos d_model"]:
        """Return the position embedding of each token, for one text where all have the same."""
        if not isinstance(cast("object", tokens), Tensor) or tokens.ndim != 2:
            self._check(tokens)
        if self.spec.pos_by_text:
            text = (tokens != self.spec.pad_id).int()
            return self.embed.pos_embed[text.cumsum(1) * text]
        return self.embed.pos_embed[: tokens.shape[1] + int(self.spec.suffix)]

    def tokens(self, text: Tensor | str | Sequence[str]) -> Int[Tensor, "text pos"]:
        """Return tokens ``[text pos]`` of texts, on the model's device; tokens come back as they are.

        Raises:
            InputError: there is no tokenizer, or these are no texts.
        """
        return tokens_of(self, text, self.reference)

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """The token embedding: ``[vocab d_model]``."""
        return self.embed.W_E

    @property
    def W_pos(self) -> Float[Tensor, "pos d_model"]:
        """The position embedding: ``[pos d_model]``; one row more, the first, where padding has one of its own."""
        return self.embed.pos_embed

    def unembed(self, x: Float[Tensor, "batch pos d_model"], tokens: Int[Tensor, "batch pos"]) -> Tensor:
        """Return the output for a residual stream ``[batch pos d_model]``: final norm, pooling, projection."""
        self._check_stream(x)
        if not isinstance(cast("object", tokens), Tensor) or tokens.ndim != 2:
            self._check(tokens)
        if self.spec.ln_final is not None:
            x = self.hook_ln_final(self.ln_final(x))
        pooled = self.ln_pool(self.hook_pooled(pool_tokens(self.spec.pool, x, tokens, self.spec.pad_id)))
        if self.spec.n_classes is not None:
            pooled = self.head(pooled) if self.spec.head is None else self.head_mlp(pooled)
        return self.hook_logits(pooled)

    def shares(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
        """Return the share of each token, and of what stands behind the text, in what is pooled."""
        self._check(tokens)
        eye = torch.eye(tokens.shape[1] + int(self.spec.suffix), device=tokens.device, dtype=self.embed.W_E.dtype)
        return pool_tokens(self.spec.pool, eye.expand(len(tokens), -1, -1), tokens, self.spec.pad_id)

    def tokens_in(self, *inputs: Any, **kwargs: Any) -> Tensor | None:
        return next(iter(inputs), kwargs.get("tokens"))

    def _mask(self, tokens: Tensor) -> Bool[Tensor, "#batch 1 query_pos key_pos"] | None:
        """Return which keys each query may read, or None if all."""
        n = tokens.shape[1] + int(self.spec.suffix)
        mask = None
        if self.spec.causal:
            mask = torch.ones(n, n, dtype=torch.bool, device=tokens.device).tril()[None, None]
        if self.spec.pad_id is not None:
            text = tokens != self.spec.pad_id
            if self.spec.suffix:
                text = torch.cat([text, text.new_ones(text.shape[0], 1)], dim=1)
            text = text.roll(self.spec.pad_lag, dims=1)[:, None, None, :].expand(-1, 1, n, n)
            mask = text if mask is None else mask & text
        return mask

    def _check(self, tokens: Tensor) -> None:
        value = cast("object", tokens)
        if not isinstance(value, Tensor):
            raise InputError(
                f"Expected tokens [batch pos], got {shown(value)}. The model's tokenizer makes them of text."
            )
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise InputError(
                f"Expected tokens [batch pos] of whole numbers, got shape {list(tokens.shape)} of {tokens.dtype}."
            )
        check_plain("tokens", tokens)
        check_place("tokens", tokens, self.embed.W_E)
        if tokens.shape[1] > self.spec.n_ctx:
            raise InputError(f"Expected at most {self.spec.n_ctx} tokens, got {tokens.shape[1]}: cut the text.")
        if may_look(tokens) and tokens.numel():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.spec.n_vocab:
                raise InputError(f"Expected tokens from 0 to {self.spec.n_vocab - 1}, got {low} to {high}.")


def tokens_of(model: HookedText, text: Tensor | str | Sequence[str], reference: str | None) -> Int[Tensor, "text pos"]:
    """Return ``tokens`` of a text tower, for it or the whole it is part of, which was loaded from ``reference``."""
    if isinstance(text, Tensor):
        return text
    several = cast("Iterable[object]", text) if isinstance(cast("object", text), Iterable) else ()
    texts = [text] if isinstance(text, str) else list(several)
    if not texts or not all(isinstance(each, str) for each in texts):
        raise InputError(f"Expected a text, a list of texts or a tensor of tokens [text pos], got {str(text)[:80]}.")
    if model.tokenizer is None:
        call = f"prisma.load({reference!r}).tokenizer" if reference else "open_clip.get_tokenizer(NAME)"
        raise InputError(
            f"This model has no tokenizer: an adapted model comes without. Set model.tokenizer = {call}, or "
            "give tokens [text pos]."
        )
    tokens = model.tokenizer(cast("list[str]", texts)).to(model.embed.W_E.device)
    cut = _cut(model, cast("list[str]", texts), tokens)
    if cut:
        warnings.warn(
            f"{len(cut)} of {len(texts)} texts are longer than the {model.spec.n_ctx} tokens that this model reads: "
            f"what stands behind was left out. The first: {cut[0][:40]!r}...",
            stacklevel=3,
        )
    return tokens


def _cut(model: HookedText, texts: Sequence[str], tokens: Tensor) -> list[str]:
    """Return the texts whose end the tokenizer left out: without their last letter they make the same tokens."""
    # A byte is a token at most, so few texts are long enough to be asked about.
    long = [index for index, text in enumerate(texts) if len(text.encode(errors="replace")) > model.spec.n_ctx - 2]
    shorter = {index: re.sub(r"\w\W*\Z", "", texts[index]) for index in long}
    candidates = [index for index in long if shorter[index] not in ("", texts[index])]
    if model.tokenizer is None or not candidates:
        return []
    again = model.tokenizer([shorter[index] for index in candidates]).to(tokens.device)
    if again.shape[1:] != tokens.shape[1:]:  # filled up to the longest: nothing was cut
        return []
    return [texts[index] for index, row in zip(candidates, again, strict=True) if torch.equal(row, tokens[index])]


def pool_tokens(
    spec: TextPoolSpec,
    x: Float[Tensor, "batch pos d_model"],
    tokens: Int[Tensor, "batch pos"],
    pad_id: int | None = None,
) -> Float[Tensor, "batch *pos d_model"]:
    """Return the vectors that a pooling takes from the stream."""
    if spec.kind == "none":
        return x
    if spec.kind == "avg":
        text = (tokens != pad_id)[..., None]
        return (x * text).sum(1) / text.sum(1)
    if spec.kind in ("first", "last"):
        return x[:, 0 if spec.kind == "first" else -1]
    order = tokens if spec.kind == "argmax" else (tokens == spec.eos_id).int()
    return x[torch.arange(x.shape[0], device=x.device), order.argmax(-1)]
