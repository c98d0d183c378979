"""The sparse coder: one form in memory for all kinds and all file formats.

Equation:
    u = normalize(x) - b_in;  h = u W_enc + b_enc;  f = activate(h);  y = f W_dec + b_dec (+ x W_skip^T), and y in the
    input's units again. Gated: f = [u W_enc + b_gate > 0] activate(u (W_enc e^r_mag) + b_mag).
Cost:
    Two products of [tokens, d_in] with [d_in, d_sae] a pass; at d_sae = 64 d_in, some eight blocks of the model.
Misleads:
    A coder is of one model, one place and one set of tokens. Elsewhere it computes numbers all the same: ``splice`` and
    ``evaluate`` compare its facts with the model's.
Source:
    Bricken et al. 2023 (standard); Gao et al. 2024 (TopK); Rajamanoharan et al. 2024 (gated, JumpReLU); Bussmann et al.
    2024 (BatchTopK), 2025 (Matryoshka); Dunefsky et al. 2024 (transcoders); Fel et al. 2025 (archetypal).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, ValidationError
from torch import Tensor, nn

from prisma_core import InputError, LoadError
from prisma_core.plugin import Count, Facts, check_shapes, checked, format_fields, printable, shown
from prisma_sae.activations import Activation, Normalize, Statistics, activate, normalized

Kind = Literal["standard", "topk", "batchtopk", "jumprelu", "gated", "transcoder", "matryoshka", "archetypal"]
Tokens = Literal["all", "cls", "patches"]


class CoderFacts(Facts):
    """The facts of a sparse coder, besides its tensors.

    Attributes:
        kind: how it was trained, for people; what is computed follows from the other facts.
        d_in, d_sae, d_out: widths of the input, the features and the output.
        activation, k, normalize: see ``prisma_sae.activations``.
        soft_cap: features are ``cap * tanh(f / cap)``.
        restores: whether the output is brought back to the input's units.
        groups: of a Matryoshka coder, the lengths of the prefixes that reconstruct by themselves.
        model: the reference of the model it was trained on, such as ``timm:vit_base_patch16_224``; None if unknown.
        also: further references of the same weights.
        weights: the SHA-256 of that model's weights.
        hook, hook_out: the hook points that it reads and, of a transcoder, writes.
        tokens: the tokens it was trained on; None if unknown.
        layout: the format that it was read from.
        figures: what it was measured at when it was published or trained: ``l0``, ``explained_variance``, ...
        labels: names of features, by feature.
        more: whatever else the file says.
    """

    kind: Kind
    d_in: int = Field(gt=0)
    d_sae: int = Field(gt=0)
    d_out: int = Field(gt=0)
    activation: Activation = "relu"
    k: int | None = None
    normalize: Normalize = "none"
    soft_cap: float | None = Field(default=None, ge=1e-6)
    restores: bool = True
    groups: tuple[int, ...] = ()
    model: str | None = None
    also: tuple[str, ...] = ()
    weights: str | None = None
    hook: str | None = None
    hook_out: str | None = None
    tokens: Tokens | None = None
    layout: str = ""
    figures: Mapping[str, float] = Field(default_factory=dict[str, float])
    labels: Mapping[int, str] = Field(default_factory=dict[int, str])
    more: Mapping[str, Any] = Field(default_factory=dict[str, Any])


TENSORS = (
    *("W_enc", "b_enc", "W_dec", "b_dec", "b_in", "W_skip", "threshold", "b_gate", "r_mag", "b_mag"),
    *("input_mean", "input_scale"),
)

_CHOOSING = ("topk", "topk-signed", "topk-abs", "groupmax")  # features by comparing them with others


class SparseCoder(nn.Module):
    """A sparse autoencoder or transcoder.

    >>> coder = SparseCoder(CoderFacts(kind="standard", d_in=2, d_sae=4, d_out=2), {
    ...     "W_enc": torch.tensor([[1., -1, 0, 0], [0, 0, 1, -1]]), "b_enc": torch.zeros(4),
    ...     "W_dec": torch.tensor([[1., 0], [-1, 0], [0, 1], [0, -1]]), "b_dec": torch.zeros(2)})
    >>> coder.encode(torch.tensor([3., -2]))
    tensor([3., 0., 0., 2.])
    >>> coder(torch.tensor([3., -2]))
    tensor([ 3., -2.])

    Args:
        facts: what it is.
        tensors: ``W_enc [d_in d_sae]``, ``W_dec [d_sae d_out]``, ``b_enc [d_sae]`` (of a gated one ``b_gate``,
            ``r_mag``, ``b_mag`` in its place); where there are any, ``b_dec [d_out]``, ``b_in [d_in]`` (taken off the
            input), ``W_skip [d_out d_in]``, ``threshold`` (a number or ``[d_sae]``), ``input_mean``, ``input_scale``.
            Of several dtypes they become the one that holds them all.

    Raises:
        LoadError: a tensor is missing, unknown or misshapen, or an activation lacks its ``k`` or threshold.
    """

    @checked
    def __init__(self, facts: CoderFacts, tensors: Mapping[str, Tensor]):
        super().__init__()
        self.facts = facts
        _check(facts, tensors)
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
        for name in TENSORS:
            self.register_buffer(name, tensors[name].to(dtype) if name in tensors else None)

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes at another hook point than it reads."""
        return self.facts.hook_out not in (None, self.facts.hook)

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by name."""
        return dict(self.state_dict())

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the features of activations, in the coder's dtype."""
        return self.features(self._read(x)[0])

    def decode(
        self, features: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """Return the reconstruction from features.

        Args:
            x: the activations that were encoded: needed where the coder normalises by the input's own statistics, or
                has a skip connection.

        Raises:
            InputError: ``x`` is needed and was not given, or the features are another coder's or another input's.
        """
        features = self._fitting(features, self.facts.d_sae, "features").to(self.W_dec.dtype)
        if isinstance(x, Tensor) and x.shape[:-1] != features.shape[:-1]:
            raise InputError(f"Expected the activations that {shown(features)} were encoded from, got {shown(x)}.")
        by_input = self.facts.normalize in ("layer_norm", "constant_norm_rescale") and self.facts.restores
        if x is None and (by_input or self.W_skip is not None):
            why = "has a skip connection" if self.W_skip is not None else f"normalises by {self.facts.normalize}"
            raise InputError(f"This coder {why}: its output needs the input too, as in decode(features, x).")
        empty = features.new_zeros(self.facts.d_in)
        _, statistics, x = self._read(empty if x is None else x)
        y = features @ self.W_dec
        y = y if self.b_dec is None else y + self.b_dec
        if self.W_skip is not None:
            y = y + x @ self.W_skip.mT
        return statistics.restore(y) if self.facts.restores else y

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return the reconstruction of activations, or of a transcoder the output that it predicts."""
        return self.decode(self.encode(x), x)

    @checked
    def first(self, n: Count) -> SparseCoder:
        """Return the coder of the first ``n`` features: of a Matryoshka coder, the one trained on that prefix.

        Raises:
            InputError: there are not as many, or which of them are on depends on the others, as with TopK.
        """
        if not 0 < n <= self.facts.d_sae:
            raise InputError(f"Expected 1 to {self.facts.d_sae} features, got {n}.")
        if n < self.facts.d_sae and self.facts.activation in _CHOOSING:
            raise InputError(
                f"Which features are on by {self.facts.activation} depends on all {self.facts.d_sae}, so the first {n} "
                f"are no coder of their own: f = coder.encode(x); f[..., {n}:] = 0; coder.decode(f, x)."
            )
        axes = {"W_enc": 1, "W_dec": 0} | dict.fromkeys(("b_enc", "b_gate", "r_mag", "b_mag", "threshold"), 0)
        tensors = {
            name: tensor.narrow(axes[name], 0, n) if name in axes and tensor.ndim else tensor
            for name, tensor in self.tensors().items()
        }
        groups, labels = tuple(group for group in self.facts.groups if group <= n), self.facts.labels
        update = {"d_sae": n, "groups": groups, "labels": {i: name for i, name in labels.items() if i < n}}
        return SparseCoder(self.facts.model_copy(update=update), tensors)

    def with_facts(self, **changes: Any) -> SparseCoder:
        """Return the coder with other facts over the same tensors, such as ``hook=`` where a file does not say it.

        Raises:
            InputError: no such fact, or a value that it cannot have.
        """
        try:
            facts = CoderFacts.model_validate({**self.facts.model_dump(), **changes})
        except ValidationError as error:
            raise InputError(f"These facts do not fit a sparse coder: {format_fields(error)}.") from error
        return SparseCoder(facts, self.tensors())

    def features(self, u: Tensor) -> Tensor:
        """Return the features of inputs that are normalised and cast.

        Raises:
            InputError: they are of another width.
        """
        facts, u = self.facts, self._fitting(u, self.facts.d_in, "activations")
        u = u if self.b_in is None else u - self.b_in
        if self.r_mag is not None:
            open_gates = (u @ self.W_enc + self.b_gate) > 0
            h = u @ (self.W_enc * self.r_mag.exp()) + self.b_mag
            f = open_gates * activate(h, facts.activation, facts.k, self.threshold)
        else:
            f = activate(u @ self.W_enc + self.b_enc, facts.activation, facts.k, self.threshold)
        return f if facts.soft_cap is None else facts.soft_cap * torch.tanh(f / facts.soft_cap)

    def _fitting(self, x: Tensor, width: int, what: str) -> Tensor:
        if not isinstance(x, Tensor) or x.shape[-1:] != (width,) or x.is_complex():
            raise InputError(f"Expected {what} [... {width}] for this coder, real ones, got {shown(x)}.")
        if x.device != self.W_enc.device:
            raise InputError(
                f"The {what} are on {x.device}, and this coder on {self.W_enc.device}: coder.to({str(x.device)!r})."
            )
        return x

    def _read(self, x: Tensor) -> tuple[Tensor, Statistics, Tensor]:
        """Return an input normalised, what undoes that, and the input itself, in the coder's dtype."""
        x = self._fitting(x, self.facts.d_in, "activations").to(self.W_enc.dtype)
        u, statistics = normalized(x, self.facts.normalize, self.input_mean, self.input_scale)
        return u, statistics, x

    def extra_repr(self) -> str:
        facts = self.facts
        place = " -> ".join(name for name in (facts.hook, facts.hook_out) if name)
        about = (facts.kind, f"{facts.d_in} -> {facts.d_sae}", place, facts.tokens and f"tokens {facts.tokens}")
        return printable(", ".join(each for each in (*about, facts.model) if each))

    def __getattr__(self, name: str) -> Any:  # buffers, for type checkers
        return super().__getattr__(name)


def _check(facts: CoderFacts, tensors: Mapping[str, Tensor]) -> None:
    d_in, d_sae, d_out = (torch.Size([size]) for size in (facts.d_in, facts.d_sae, facts.d_out))
    shapes = {"W_enc": d_in + d_sae, "W_dec": d_sae + d_out}
    gated = dict.fromkeys(("b_gate", "r_mag", "b_mag"), d_sae)
    shapes |= gated if facts.kind == "gated" or "r_mag" in tensors else {"b_enc": d_sae}
    optional = {"b_dec": d_out, "b_in": d_in, "W_skip": d_out + d_in}
    if facts.normalize == "standardize":
        optional |= {"input_mean": d_in, "input_scale": torch.Size()}
    shapes |= {name: shape for name, shape in optional.items() if name in tensors}
    if facts.activation in ("jumprelu", "jump-signed"):
        one = "threshold" in tensors and not tensors["threshold"].ndim
        shapes["threshold"] = torch.Size() if one else d_sae
    check_shapes(tensors, shapes, f"This {facts.kind} coder ({facts.layout or 'no file'})")
    if facts.activation in _CHOOSING:
        if facts.k is None or not 0 < facts.k <= facts.d_sae:
            raise LoadError(f"The activation {facts.activation} needs k from 1 to {facts.d_sae}, got {facts.k}.")
        if facts.activation == "groupmax" and facts.d_sae % facts.k:
            raise LoadError(f"{facts.d_sae} features do not fall into {facts.k} equal groups.")
