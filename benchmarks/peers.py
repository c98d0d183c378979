"""The same activations by other libraries, on the same weights of transformers' ViT, in one process.

nnsight and torchlens trace any torch module; TransformerLens 4 bridges transformers' classes, ViT among them. Each
library has a copy of the model of its own. They are installed in an environment of their own (``python benchmarks
peers`` makes it), with Prisma beside them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from timing import Options, Row, Side, draw, timed
from torch import Tensor

import prisma_core as prisma

SIZES = {  # patch, width, layers, heads
    "ViT-Ti/16": (16, 192, 12, 3),
    "ViT-B/32": (32, 768, 12, 12),
    "ViT-B/16": (16, 768, 12, 12),
}
MODELS = tuple(SIZES)
LIBRARIES = ("nnsight", "torchlens", "transformer-lens")


def upstream_model(name: str) -> Any:
    """Return transformers' ViT of these sizes at 224 x 224, with 1,000 classes."""
    from transformers import ViTConfig, ViTForImageClassification

    patch, width, layers, heads = SIZES[name]
    sizes = {"patch_size": patch, "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    config = ViTConfig(**sizes, num_attention_heads=heads, num_labels=1000, architectures=["ViTForImageClassification"])
    model = ViTForImageClassification(config).eval()
    draw(model)
    return model


def nnsight(model: Any, image: Tensor, middle: int) -> dict[str, Side]:
    import nnsight

    traced = nnsight.NNsight(model)

    def residuals() -> object:
        with traced.trace(image):
            kept = nnsight.save([block.output for block in traced.vit.layers])
        return kept  # noqa: RET504  # nnsight takes the names that a trace assigns

    def one() -> object:
        with traced.trace(image):
            kept = nnsight.save(traced.vit.layers[middle].output)
        return kept  # noqa: RET504  # nnsight takes the names that a trace assigns

    return {"one layer": one, "residual stream": residuals}


def torchlens(model: Any, image: Tensor, middle: int) -> dict[str, Side]:
    import torchlens

    return {"everything": lambda: torchlens.trace(model, image)}


def transformer_lens(model: Any, image: Tensor, middle: int) -> dict[str, Side]:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers("google/vit-base-patch16-224", hf_model=model)
    return {
        "plain pass": lambda: bridge(image),
        "one layer": lambda: bridge.run_with_cache(image, names_filter=f"blocks.{middle}.hook_resid_post"),
        "residual stream": lambda: list(
            bridge.run_with_cache(image, names_filter=lambda name: name.endswith("hook_resid_post"))[1].values()
        ),
        "everything": lambda: bridge.run_with_cache(image),
    }


def prisma_sides(model: Any, image: Tensor, middle: int) -> dict[str, Any]:
    return {
        "plain pass": lambda: model(image),
        "one layer": lambda: model.run_with_cache(image, names=("resid_post", middle)),
        "residual stream": lambda: list(model.run_with_cache(image, names="resid_post")[1].values()),
        "everything": lambda: model.run_with_cache(image),
    }


def check_agreement(ours: list[Tensor], theirs: list[Tensor], library: str) -> None:
    """Stop where two libraries do not give the same residual stream: their times would compare different things."""
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, msg=lambda text: f"{library} differs: {text}")


def rows(options: Options) -> Iterator[Row]:
    if unknown := set(options.models) - set(SIZES):
        raise SystemExit(f"peers: no sizes for {', '.join(sorted(unknown))}; there are {', '.join(SIZES)}")
    with torch.no_grad():
        # All are adapted first: torchlens puts wrappers in the place of torch's functions, and leaves them there.
        upstreams = {name: upstream_model(name) for name in options.models}
        models: dict[str, Any] = {name: prisma.adapt(each) for name, each in upstreams.items()}
        for name, model in models.items():
            middle = model.spec.n_layers // 2
            for batch in options.batches:
                image = torch.randn(batch, 3, *model.spec.image_size)
                mine = prisma_sides(model, image, middle)
                for library in (nnsight, torchlens, transformer_lens):
                    title = library.__name__.replace("_", "-")
                    sides: dict[str, Any] = library(copy.deepcopy(upstreams[name]), image, middle)
                    if "residual stream" in sides:
                        check_agreement(mine["residual stream"](), sides["residual stream"](), title)
                    for what, side in sides.items():
                        yield timed(Row("peers", name, batch, what, title), mine[what], side, options)
