"""The two-layer perceptron of a block."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from prisma_core.hooks.point import HookPoint
from prisma_core.spec import MlpSpec
from prisma_core.toolbox.activations import ACTIVATIONS
from prisma_core.transformer.norm import norm_or_identity
from prisma_core.transformer.weights import WeightViews, held


class MLP(WeightViews):
    """``act(x W_in + b_in) W_out + b_out``, or gated: ``(act(x W_gate + b_gate) * (x W_in + b_in)) W_out + b_out``.

    Hook points are TransformerLens': ``hook_pre`` is what the activation function reads, ``hook_post`` what the output
    projection reads. With an inner norm, ``hook_mid`` comes before it and ``hook_post`` after.
    """

    def __init__(self, spec: MlpSpec, d_in: int, d_out: int, tokens: str = "batch pos"):
        super().__init__()
        self.spec = spec
        neurons = f"{tokens} d_mlp"
        self.pre_norm = norm_or_identity(spec.pre_norm, d_in, f"{tokens} d_model")
        if spec.gated:
            self.fc_gate = nn.Linear(d_in, spec.d_mlp)
            self.hook_pre = HookPoint(neurons, "x W_gate + b_gate")
            self.hook_pre_linear = HookPoint(neurons, "x W_in + b_in")
        else:
            self.hook_pre = HookPoint(neurons, "x W_in + b_in")
        self.fc_in = nn.Linear(d_in, spec.d_mlp)
        activated = "act(pre) * pre_linear" if spec.gated else "act(pre)"
        if spec.inner_norm is not None:
            self.hook_mid = HookPoint(neurons, activated)
        self.ln = norm_or_identity(spec.inner_norm, spec.d_mlp, neurons)
        self.hook_post = HookPoint(neurons, activated if spec.inner_norm is None else "ln(mid)")
        self.fc_out = nn.Linear(spec.d_mlp, d_out)
        self.act = ACTIVATIONS[spec.act]

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Input weights, a view: ``[d_model d_mlp]``."""
        return held(self.fc_in, "weight").T

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        """Gate weights of a gated MLP, a view: ``[d_model d_mlp]``."""
        return held(self.fc_gate, "weight").T

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Output weights, a view: ``[d_mlp d_model]``."""
        return held(self.fc_out, "weight").T

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"]:
        """Input bias: ``[d_mlp]``."""
        return held(self.fc_in, "bias")

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Output bias: ``[d_model]``."""
        return held(self.fc_out, "bias")

    def forward(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_out"]:
        x = self.pre_norm(x)
        if self.spec.gated:
            activated = self.act(self.hook_pre(self.fc_gate(x))) * self.hook_pre_linear(self.fc_in(x))
        else:
            activated = self.act(self.hook_pre(self.fc_in(x)))
        if self.spec.inner_norm is not None:
            activated = self.hook_mid(activated)
        return self.fc_out(self.hook_post(self.ln(activated)))
