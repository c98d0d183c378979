"""What the towers of CLIP models share: norms, activations and linear layers, with the rows that go with them."""

from __future__ import annotations

from prisma_core.maps.reader import Reader
from prisma_core.spec import Activation, EmbedSpec, Interpolation, NormSpec

IDENTITY = "torch.nn.modules.linear.Identity"
LINEAR = "torch.nn.modules.linear.Linear"
LAYER_NORMS = ("torch.nn.modules.normalization.LayerNorm", "open_clip.transformer.LayerNorm")
LAYER_NORM_FLOAT32 = "open_clip.transformer.LayerNormFp32"
RMS_NORM = "transformers.models.siglip2.modeling_siglip2.RMSNorm"

# The activation is what upstream built: a config may say another one than its weights were trained with.
ACTIVATIONS: dict[str, Activation] = {
    "open_clip.transformer.QuickGELU": "quick_gelu",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.SiLUActivation": "silu",
    "torch.nn.modules.activation.ReLU": "relu",
}


def norm(module: Reader) -> NormSpec | None:
    """Return the facts of a norm; None of an identity."""
    if module.is_a(IDENTITY):
        return None
    if module.is_a(*LAYER_NORMS):
        return NormSpec(eps=module.eps)
    if module.is_a(LAYER_NORM_FLOAT32):
        return NormSpec(eps=module.eps, in_float32=True)
    raise module.unsupported("a norm that is no layer norm")


def activation(module: Reader) -> Activation:
    """Return the name of an activation function."""
    if module.is_a("torch.nn.modules.activation.GELU"):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    if module.is_a("transformers.activations.GELUActivation"):
        return "gelu"
    for name, kind in ACTIVATIONS.items():
        if module.is_a(name):
            return kind
    raise module.unsupported("its activation function")


def patches(proj: Reader, *, interpolation: Interpolation | None = None) -> EmbedSpec:
    """Return the facts of a convolution that cuts a picture into patches and multiplies each with a matrix."""
    if not proj.is_a("torch.nn.modules.conv.Conv2d") or proj.kernel_size != proj.stride:
        raise proj.unsupported("patches that overlap")
    padding = (0, 0) if proj.padding == "valid" else proj.padding
    if (*padding, *proj.dilation, proj.groups, proj.padding_mode) != (0, 0, 1, 1, 1, "zeros"):
        raise proj.unsupported("a patch projection that pads, skips or splits pixels")
    return EmbedSpec(patch=proj.kernel_size, in_channels=proj.in_channels, interpolation=interpolation)


def matrix_rows(source: str, target: str) -> str:
    """Return the rows of a matrix that is multiplied from the right, ``[in out]``, without a bias."""
    return f"""
        {source}  ->  {target}.weight  :  i o -> o i
        zeros     ->  {target}.bias
    """


def norm_hooks(source: str, target: str, out: str | None = None) -> str:
    """Return the hook rows of a norm; ``out`` is another hook point that holds its output."""
    rows = f"{source}  ->  {target}.hook_normalized\n"
    return rows + (f"{source}  ->  {out}\n" if out else "")
