"""Parts of transformers' video models: norms, activations, tubelets, unfused attention."""

from __future__ import annotations

from typing import Any

from prisma_core.plugin import (
    TRANSFORMERS,
    AttentionSpec,
    EmbedSpec,
    PartReader,
    Reader,
    TokenLayout,
    masks_as_built,
    plain_patches,
)

READ = PartReader(activations=TRANSFORMERS)
norm, linear, classes = READ.norm, READ.linear, READ.classes

IGNORED = {
    "*.config": "what the model was built from; facts are read off the modules",
    "*.name_or_path": "where it came from",
    "*.warnings_issued": "what was said before",
    "*.generation_config": "of text",
    "*.loss_type": "of training",
    "*.kernel_config": "which kernels run",
    "*.num_labels": "the width of the head",
    "*.gradient_checkpointing": "memory in training",
    "*.*_plan": "how weights are spread over devices",
    "*.all_tied_weights_keys": "how weights are saved",
    "*.attention_dropout": "off in evaluation",
    "*.dropout_prob": "off in evaluation",
    "*.is_causal": "read in canonical models; elsewhere upstream's own code obeys it",
    "*.all_head_size": "heads times their width",
    "*.hidden_size": "the width of the stream",
    "*.num_patches": "the product of the layout's sides",
    "*.num_channels": "the channels of the tubelet projection",
    "GELUActivation.act": "the function that the class is named after",
    "GELUTanh.act": "the function that the class is named after",
}


def attention(module: Reader, heads: int, d_head: int, *projections: Reader) -> AttentionSpec:
    """Return the spec of a plain attention with these projections of queries, keys, values and output."""
    masks_as_built(module)
    for projection in projections:
        linear(projection)
    return AttentionSpec(n_heads=heads, n_kv_heads=heads, d_head=d_head, scale=module.scaling)


def frames(patches: Reader) -> int:
    """Return how many frames a tubelet embedding was built for, those that fill no tubelet left out."""
    depth, down, across = patches.projection.kernel_size
    height, width = patches.image_size
    return patches.num_patches // max(1, (height // down) * (width // across)) * depth


def tubelets(
    proj: Reader, image_size: tuple[int, int], frames: int, *, cls: int = 0, **facts: Any
) -> tuple[EmbedSpec, TokenLayout]:
    """Return the facts of a tubelet projection for videos of this size, and the layout of what it makes.

    Args:
        proj: a Conv3d over frame, row and column.
        image_size: height and width of a frame.
        frames: how many there are.
        cls: class tokens before the patches.
        facts: further facts of the embedding.
    """
    plain_patches(proj, "Conv3d")
    depth, down, across = proj.kernel_size
    if frames < depth:
        raise proj.unsupported("videos shorter than a tubelet")
    layout = TokenLayout(cls=cls, frames=frames // depth, rows=image_size[0] // down, columns=image_size[1] // across)
    return EmbedSpec(patch=(down, across), tubelet=depth, in_channels=proj.in_channels, **facts), layout


def dtype_of(upstream: Reader) -> dict[str, Any]:
    """Return dtype and device of a model's weights, as arguments."""
    tensor = next(upstream.module.parameters())
    return {"dtype": tensor.dtype, "device": tensor.device}
