"""Readers of what libraries build their models from: norms, activations, linear layers, patch projections, MLPs.

torch's own classes are known. A plugin adds the classes of its library as data, by qualified name, and a class that
neither knows, a subclass included, is unsupported::

    READ = PartReader(norms={"acme.layers.RmsNorm": NormClass("rms")}, activations={"acme.layers.Quick": "quick_gelu"})
    READ.norm(upstream.norm)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, NamedTuple, cast

import torch

from prisma_core.maps.reader import Reader
from prisma_core.spec import Activation, MlpSpec, NormSpec
from prisma_core.toolbox.activations import computes
from prisma_core.toolbox.rows import linear_rows, norm_rows


class NormClass(NamedTuple):
    """The spec of a class of norms; ``eps`` is the attribute that holds it."""

    kind: Literal["ln", "rms"] = "ln"
    eps: str = "eps"
    in_float32: bool = False
    weight_in_float32: bool = True


class MlpNames(NamedTuple):
    """The paths of an MLP's parts; empty where it has none.

    Attributes:
        fc_in, fc_out: its linear layers.
        act: the activation, a module; empty where the MLP calls ``silu`` itself.
        fc_gate: the linear layer whose output goes through the activation, of a gated MLP.
        fused: ``fc_in`` makes gate and values in one, the gate first.
        gate_last: an attribute that says that the gate comes second instead.
        ln: a norm before ``fc_out``.
        pre_norm: a norm before all.
    """

    fc_in: str = "fc1"
    fc_out: str = "fc2"
    act: str = "act"
    fc_gate: str = ""
    fused: bool = False
    gate_last: str = ""
    ln: str = ""
    pre_norm: str = ""


NORMS = {
    "torch.nn.modules.normalization.LayerNorm": NormClass(),
    "torch.nn.modules.normalization.RMSNorm": NormClass("rms"),
}
ACTIVATIONS: dict[str, Activation] = {
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.ReLU": "relu",
}
TRANSFORMERS: dict[str, Activation] = {  # for the plugins of transformers' several families of models
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",  # sqrt(2 / pi) rounded to ten digits: 1e-12 apart
    "transformers.activations.AccurateGELUActivation": "gelu_tanh",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
    "transformers.activations.SiLUActivation": "silu",
}


@dataclass(frozen=True)
class PartReader:
    """Reads parts of upstream models; each method raises UnsupportedArchitecture for a class that it does not know.

    Attributes:
        norms, activations, mlps: the classes of a library, by qualified name.
        scales: its classes of layer scale.
    """

    norms: Mapping[str, NormClass] = field(default_factory=dict[str, NormClass])
    activations: Mapping[str, Activation] = field(default_factory=dict[str, Activation])
    mlps: Mapping[str, MlpNames] = field(default_factory=dict[str, MlpNames])
    scales: tuple[str, ...] = ()

    def norm(self, module: Reader) -> NormSpec | None:
        """Return the spec of a norm; None of an identity."""
        if module.is_a("Identity"):
            return None
        if (norm := module.of_class(self.norms) or module.of_class(NORMS)) is None:
            raise module.unsupported("a norm that is neither layer norm nor root mean square")
        if (eps := getattr(module, norm.eps)) is None:
            raise module.unsupported("a norm whose eps depends on the dtype")
        return NormSpec(**{**norm._asdict(), "eps": eps})

    def qk_norm(self, q: Reader, k: Reader) -> NormSpec | None:
        """Return the spec of the norm that queries and keys have each."""
        if self.norm(q) != self.norm(k):
            raise q.unsupported("queries and keys normed differently")
        return self.norm(q)

    def activation(self, module: Reader) -> Activation:
        """Return the name of an activation function."""
        name = module.of_class(self.activations) or module.of_class(ACTIVATIONS)
        if module.is_a("GELU"):
            name = "gelu_tanh" if module.approximate == "tanh" else "gelu"
        if name is None or not computes(module.module, name):
            raise module.unsupported("its activation function" if name is None else f"a function that is not {name}")
        held = [each for each in vars(module.module) if each[0] != "_"]  # it was tried with these
        module.record.update(f"{module.path}.{each}" for each in held)
        return name

    def linear(self, module: Reader) -> Reader:
        """Return a linear layer as it is."""
        if not module.is_a("Linear", "NonDynamicallyQuantizableLinear"):  # the second: in torch's own attention
            raise module.unsupported("a projection that is no linear layer")
        return module

    def embedding(self, module: Reader) -> Reader:
        """Return a table of vectors as it is."""
        if not module.is_a("Embedding") or module.max_norm is not None:
            raise module.unsupported("a table that is no plain embedding")
        return module

    def positions(self, module: Reader, name: str) -> Reader:
        """Return a table of positions, at a path from the module, which are looked up in order: ``position_ids``."""
        ids = module.get("position_ids")
        counted = ids is None or ids.is_meta or torch.equal(ids.flatten(), torch.arange(ids.numel()).to(ids))
        if not counted:
            raise module.unsupported("position_ids that do not count from 0")
        return self.embedding(at(module, name))

    def multihead(self, module: Reader) -> Reader:
        """Return torch's own attention as it is."""
        if not module.is_a("MultiheadAttention"):
            raise module.unsupported("its kind of attention")
        if module.has("bias_k") or module.has("bias_v") or module.add_zero_attn:
            raise module.unsupported("learned or empty tokens added to keys and values")
        self.linear(module.out_proj)
        return module

    def qkv_rows(
        self, module: Reader, source: str, target: str, names: Sequence[str] = ("q_proj", "k_proj", "v_proj")
    ) -> str:
        """Return the weight rows that join projections of queries, keys and values; zeros for missing biases.

        Args:
            names: the paths of the projections from ``module``, which is at ``source``.
        """
        biased = [self.linear(at(module, name)).has("bias") for name in names]
        if biased == [False, True, False]:
            raise module.unsupported("biases of keys alone")
        biases = [
            f"{source}.{name}.bias" if has_bias else "zeros" for name, has_bias in zip(names, biased, strict=True)
        ]
        joined = ", ".join(name for name, _ in groupby(biases))  # neighbours without a bias are filled as one
        return f"""
            [{", ".join(f"{source}.{name}.weight" for name in names)}]  ->  {target}.weight
            {f"[{joined}]" if any(biased) else "zeros"}                ->  {target}.bias
        """

    def classes(self, head: Reader) -> int | None:
        """Return the number of classes of a head; None of an identity."""
        return None if head.is_a("Identity") else self.linear(head).out_features

    def scaled(self, module: Reader) -> bool:
        """Return whether this is a layer scale; False of an identity."""
        if not module.is_a("Identity", *self.scales):
            raise module.unsupported("its kind of layer scale")
        return not module.is_a("Identity")

    def mlp(self, module: Reader, names: MlpNames | None = None) -> MlpSpec:
        """Return the spec of an MLP.

        Args:
            names: where ``module`` holds its parts; by default those of its class.
        """
        names = self._names(module, names)
        wide = self.linear(at(module, names.fc_in)).out_features
        for path in filter(None, (names.fc_out, names.fc_gate)):
            self.linear(at(module, path))
        act = at(module, names.act) if names.act else None
        if names.act and not isinstance(act, Reader):
            raise module.unsupported("an activation function that is no module")
        return MlpSpec(
            d_mlp=wide // 2 if names.fused else wide,
            act=self.activation(act) if isinstance(act, Reader) else "silu",
            gated=names.fused or bool(names.fc_gate),
            inner_norm=self.norm(at(module, names.ln)) if names.ln else None,
            pre_norm=self.norm(at(module, names.pre_norm)) if names.pre_norm else None,
        )

    def mlp_rows(self, module: Reader, source: str, target: str, names: MlpNames | None = None) -> str:
        """Return the weight rows of an MLP (see ``mlp``)."""
        names = self._names(module, names)
        fc_in, gate = f"{target}.fc_in", f"{target}.fc_gate"
        rows = linear_rows(f"{source}.{names.fc_out}", f"{target}.fc_out")
        for path, ours in ((names.ln, "ln"), (names.pre_norm, "pre_norm")):
            rows += norm_rows(f"{source}.{path}", f"{target}.{ours}") if path else ""
        if names.fused:
            first, second = (fc_in, gate) if _gate_last(module, names) else (gate, fc_in)
            return f"""{rows}
                {source}.{names.fc_in}.weight        ->  [{first}.weight, {second}.weight]
                {source}.{names.fc_in}.bias | zeros  ->  [{first}.bias, {second}.bias]
            """
        rows += linear_rows(f"{source}.{names.fc_gate}", gate) if names.fc_gate else ""
        return rows + linear_rows(f"{source}.{names.fc_in}", fc_in)

    def mlp_hooks(
        self, module: Reader, source: str, target: str, names: MlpNames | None = None, *, how: str = ""
    ) -> str:
        """Return the hook rows of an MLP (see ``mlp``).

        Args:
            how: the end of each row, an einops pattern behind a colon, where upstream has the axes in another order.
        """
        names = self._names(module, names)
        places = {names.fc_gate or names.fc_in: "hook_pre", f"{names.fc_out} : in": "hook_post"}
        if names.fused:
            value = "in" if _gate_last(module, names) else "in1"
            places |= {f"{names.act or '@ silu'} : in": "hook_pre", f"@ mul : {value}": "hook_pre_linear"}
            del places[names.fc_in]
        elif names.fc_gate:
            places[names.fc_in] = "hook_pre_linear"
        if names.ln:
            places |= {f"{names.ln} : in": "hook_mid", names.ln: "ln.hook_normalized"}
        if names.pre_norm:
            places[names.pre_norm] = "pre_norm.hook_normalized"
        rows = [(f"{source} {path}" if path[0] == "@" else f"{source}.{path}", ours) for path, ours in places.items()]
        return "".join(f"{place}  ->  {target}.{ours}  {how}\n" for place, ours in rows)

    def _names(self, module: Reader, names: MlpNames | None) -> MlpNames:
        if names is None and (names := module.of_class(self.mlps)) is None:
            raise module.unsupported("its kind of MLP")
        return names


def _gate_last(module: Reader, names: MlpNames) -> bool:
    return bool(names.gate_last) and bool(getattr(module, names.gate_last))


def at(reader: Reader, path: str) -> Any:
    """Return the attribute at a dotted path, the reader itself at an empty one."""
    value = cast("Any", reader)
    for name in filter(None, path.split(".")):
        value = getattr(value, name)
    return value


def plain_patches(proj: Reader, conv: Literal["Conv2d", "Conv3d"] = "Conv2d") -> None:
    """Check that a convolution cuts an image, or frames, into patches and multiplies each with a matrix.

    Raises:
        UnsupportedArchitecture: it does more: patches overlap, or are padded, dilated or split in groups.
    """
    if not proj.is_a(conv):
        raise proj.unsupported("a patch projection that is no convolution")
    if proj.kernel_size != proj.stride:
        raise proj.unsupported("patches that overlap")
    padded = proj.padding != "valid" and any(proj.padding)
    if padded or set(proj.dilation) != {1} or (proj.groups, proj.padding_mode) != (1, "zeros"):
        raise proj.unsupported("a patch projection that pads, skips or splits pixels")
