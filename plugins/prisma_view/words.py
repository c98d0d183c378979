"""The sentences of the page."""

from __future__ import annotations

import re
from typing import Any

from prisma_core.plugin import MapSpec, Share, checked
from prisma_view.findings import Report


def stage_name(stage: str) -> str:
    """``0_pre`` is the embedding, ``3_pre`` the stream after block 2."""
    if stage == "final_post":
        return "after the last block"
    layer = int(stage.removesuffix("_pre"))
    return "embedding" if layer == 0 else f"after block {layer - 1}"


def component_name(label: str) -> str:
    """``3_attn_out`` is the attention of block 3."""
    match = re.fullmatch(r"(\d+)_(attn|mlp)_out", label)
    if match:
        return f"block {match[1]} {'attention' if match[2] == 'attn' else 'MLP'}"
    return {"embed": "patches and tokens", "pos_embed": "positions", "ln_pre": "embedding"}.get(label, label)


def rest_name(found: Report) -> str:
    """Say what an attribution by layer leaves over."""
    return "biases" if found.model.spec.pool.mlp is None else "biases, pooling's MLP"


def token_name(name: str) -> str:
    """``reg0`` is the first register."""
    if name.startswith("reg"):
        return f"register {int(name[3:]) + 1}"
    return {"cls": "class token", "dist": "distillation token"}[name]


@checked
def percent(chance: Share) -> str:
    """Return a probability in words.

    >>> percent(0.25)
    '25%'
    """
    return f"{chance:.0%}" if chance >= 0.01 else "less than 1%"


def verdict(found: Report) -> str:
    """Say what the model sees in the image, and how sure it is."""
    best = found.best
    chance = float(found.logits.softmax(-1)[best])
    runner = int(found.logits.topk(2).indices[1])
    first, second = found.symbol(best).name, found.symbol(runner).name
    return f"This one is {percent(chance)} sure of “{first}”; next comes “{second}”."


def lens_words(found: Report) -> str:
    """Say how the patches come to their answers."""
    if found.lens is None:
        return ""
    patches = found.lens.logits[:, found.layout.slice("patches")].argmax(-1)
    shares = (patches == patches[-1]).float().mean(-1)
    classes, counts = patches[-1].unique(return_counts=True)
    order = counts.argsort(descending=True)[:3].tolist()
    names = [f"{found.symbol(int(classes[i])).emoji} {found.symbol(int(classes[i])).name}" for i in order]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    settled = next(i for i, share in enumerate(shares.tolist()) if share >= 0.5)
    when = stage_name(found.lens.stages[settled])
    return f"At the end most patches say {listed}. Half of all patches hold their final answer from {_at(when)} on."


def _at(stage: str) -> str:
    spoken = {"embedding": "the embedding", "after the last block": "the very last block"}
    return spoken.get(stage, stage.removeprefix("after "))


def patch_words(found: Report, where: str) -> str:
    """Say which head has the most effect, and what it does."""
    assert found.patching is not None
    change, guess = found.patching.change[where], found.patching.guess[where]
    layer, head = divmod(int(change.abs().argmax()), change.shape[1])
    kept, put = found.symbol(found.patching.kept), found.symbol(found.patching.put)
    before, after = found.patching.before, found.patching.before + float(change[layer, head])
    said = found.symbol(int(guess[layer, head]))
    turned = int((guess != found.best).sum())
    result = (
        f"and the model now says {said.emoji} {said.name}"
        if int(guess[layer, head]) != found.best
        else f"though the model still says {said.emoji} {said.name}"
    )
    others = {0: "No single head", 1: "One head"}.get(turned, f"{turned} heads")
    return (
        f"Head {head} of block {layer} has the most effect: with its output taken from the second image, the lead of "
        f"“{kept.name}” over “{put.name}” goes from {before:+.1f} to {after:+.1f}, {result}. "
        f"{others} of {guess.numel()} can change the answer alone."
    )


def facts(model: Any) -> list[tuple[str, str]]:
    """Return what there is to know about a model of images or videos, or a pair of towers."""
    spec = getattr(model, "vision", model).spec
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    count = f"{n_parameters / 1e6:.1f} million" if n_parameters >= 1e6 else f"{n_parameters / 1e3:.0f} thousand"
    rows = [("parameters", count)]
    if isinstance(spec, MapSpec):
        return [("input", " by ".join(map(str, spec.shape))), *rows, ("runs", "upstream's own code")]
    height, width = spec.image_size
    heads = list(dict.fromkeys(block.attn.n_heads for block in spec.blocks))
    return [
        ("blocks", str(spec.n_layers)),
        ("heads in each", " or ".join(map(str, heads))),
        ("width", str(spec.d_model)),
        ("image", f"{width} by {height} pixels"),
        *([("frames", str(spec.n_frames))] if spec.n_frames is not None else []),
        ("patches", f"{spec.layout.columns} by {spec.layout.rows}"),
        *([("outputs", str(spec.n_classes))] if spec.n_classes is not None else []),
        *rows,
    ]
