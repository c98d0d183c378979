"""Parts of CLIP's towers: norms, activations and linear layers, with their rows."""

from __future__ import annotations

from prisma_core.plugin import TRANSFORMERS, EmbedSpec, Interpolation, NormClass, PartReader, Reader, plain_patches

READ = PartReader(
    norms={
        "open_clip.transformer.LayerNorm": NormClass(),
        "open_clip.transformer.LayerNormFp32": NormClass(in_float32=True),
    },
    # Of a built model: a configuration may name another activation than its weights were trained with.
    activations={**TRANSFORMERS, "open_clip.transformer.QuickGELU": "quick_gelu"},
    scales=("open_clip.transformer.LayerScale",),
)
norm, linear = READ.norm, READ.linear


def patches(proj: Reader, *, interpolation: Interpolation | None = None) -> EmbedSpec:
    """Return the spec of a convolution that cuts an image into patches and multiplies each with a matrix."""
    plain_patches(proj)
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
