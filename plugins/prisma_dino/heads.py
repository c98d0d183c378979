"""Heads over a backbone: features of its last layers, linear classifiers, the projection head of training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prisma_core import HookedViT
from prisma_core.plugin import Count, Indices, InputError, LoadError, checked
from prisma_dino import state


@checked
def last_layers(model: HookedViT, image: Tensor, n: Count | Indices = 1, *, norm: bool = True) -> list[Tensor]:
    """Return all tokens behind the last blocks, in the order of the blocks: a list of ``[batch pos d_model]``.

    ``model.layout_for(image)`` says which token is which. Gradients flow.

    Args:
        n: how many of the last blocks, or which ones.
        norm: whether the final norm is applied to each.

    Raises:
        InputError: there are no such blocks, or no final norm.

    Source: ``get_intermediate_layers`` of Meta's models.
    """
    if not isinstance(model, HookedViT):
        raise InputError(
            f"Expected a vision transformer in canonical form (HookedViT), got {type(model).__name__}. Of a pair of "
            "towers give model.vision; what other models have is in model.hook_points()."
        )
    depth = model.spec.n_layers
    layers = _layers(n, depth)
    if norm and model.spec.ln_final is None:
        raise InputError("This model has no final norm: give norm=False.")
    names = [f"blocks.{layer}.hook_resid_post" for layer in sorted(set(layers))]
    _, cache = model.run_with_cache(image, names=names, output=False, detach=False)
    found = [cache[name] for name in names]
    return [model.ln_final(tokens) for tokens in found] if norm else found


def _layers(n: int | Sequence[int], depth: int) -> list[int]:
    layers = range(depth - n, depth) if isinstance(n, int) else n
    lowest = 0 if isinstance(n, int) else -depth
    if not all(lowest <= layer < depth for layer in layers):
        raise InputError(f"No layers n={n!r}: this model has {depth} blocks.")
    return [layer % depth for layer in layers]


@checked
def linear_input(
    model: HookedViT, image: Tensor, n: Count = 1, *, avg: bool = True, interleaved: bool = False
) -> Tensor:
    """Return what Meta's linear classifiers read: class tokens of the last ``n`` blocks, normed, one after the other.

    Args:
        avg: the mean of the last block's patches comes behind them.
        interleaved: the first DINO's order instead, channel by channel: class token, mean, class token, ...

    Layout: ``[batch (n + avg) * d_model]``.

    Raises:
        InputError: no such layers, or an order that does not go with them.

    Source: the evaluations of facebookresearch's dino, dinov2 and dinov3.
    """
    if interleaved and (n != 1 or not avg):
        raise InputError(f"interleaved=True pairs one class token with one mean; got n={n}, avg={avg}.")
    layers = last_layers(model, image, n)
    tokens = [layer[:, 0] for layer in layers]
    if avg:
        tokens.append(layers[-1][:, model.spec.layout.n_prefix :].mean(dim=1))
    return torch.stack(tokens, dim=-1).flatten(1) if interleaved else torch.cat(tokens, dim=-1)


@checked
def load_linear_head(path: str | Path) -> nn.Linear:
    """Return the linear classifier in one of Meta's files, for ``linear_input``.

    DINOv2's ``*_linear_head.pth`` reads ``n=1``, its ``*_linear4_head.pth`` ``n=4``, both with ``avg=True``. The first
    DINO's ``*_linearweights.pth`` reads ``n=4, avg=False`` for small models, ``n=1, interleaved=True`` for base ones.

    Raises:
        LoadError: the file cannot be read safely, or is no linear layer.
    """
    tensors = {name.removeprefix("linear."): tensor for name, tensor in state.read(path).items()}
    if set(tensors) != {"weight", "bias"} or tensors["weight"].ndim != 2:
        raise LoadError(
            f"{path} is no linear classifier: expected weight and bias, got {', '.join(list(tensors)[:6])}."
        )
    with torch.device("meta"):
        head = nn.Linear(tensors["weight"].shape[1], tensors["weight"].shape[0])
    head.load_state_dict(tensors, strict=True, assign=True)
    return head.eval()


class DinoHead(nn.Module):
    """The projection that DINO is trained through: an MLP, unit length, and prototypes.

    Attributes:
        mlp: from the normed class token to a bottleneck.
        prototypes: ``[prototype d_bottleneck]``; of unit length where training held them so.

    Source: "Emerging properties in self-supervised vision transformers" (Caron et al. 2021), appendix C.
    """

    def __init__(self, mlp: nn.Sequential, prototypes: Tensor):
        super().__init__()
        self.mlp = mlp
        self.prototypes = nn.Parameter(prototypes)

    def forward(self, pooled: Tensor) -> Tensor:
        x = self.mlp(pooled)
        eps = 1e-6 if x.dtype == torch.float16 else 1e-12
        return F.normalize(x, dim=-1, eps=eps) @ self.prototypes.T


@checked
def load_head(path: str | Path, key: str | None = None, *, name: str | None = None) -> DinoHead:
    """Return the projection head in a checkpoint of DINO's training, for a model's pooled output.

    Args:
        path: the checkpoint.
        key: which network's; None prefers the teacher's.
        name: ``head``, ``dino_head`` or ``ibot_head``; None takes the first of these that is there.

    Raises:
        LoadError: the file cannot be read safely, or holds no such head.
        InputError: it holds no such network.
    """
    tensors = state.read(path, key)
    for prefix in [name] if name is not None else ["head", "dino_head", "ibot_head"]:
        head = {at.removeprefix(f"{prefix}."): tensor for at, tensor in tensors.items() if at.startswith(f"{prefix}.")}
        if head:
            return _head(head, path)
    what = "projection head" if name is None else f"head {name!r}"
    raise LoadError(f"{path} holds no {what}; its tensors are {', '.join(list(tensors)[:4])}, ...")


def _head(tensors: Mapping[str, Tensor], path: str | Path) -> DinoHead:
    lasts = {name.removeprefix("last_layer."): x for name, x in tensors.items() if name.startswith("last_layer.")}
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):  # how newer versions of torch call them
        lasts = {old if name == f"parametrizations.weight.{new}" else name: x for name, x in lasts.items()}
    if set(lasts) == {"weight_g", "weight_v"}:
        prototypes = lasts["weight_g"] * F.normalize(lasts["weight_v"], dim=1, eps=0.0)
    elif set(lasts) == {"weight"}:
        prototypes = lasts["weight"]
    else:
        raise LoadError(f"{path}: expected a last layer with weight_g and weight_v, or weight; got {', '.join(lasts)}.")
    rest = {name: x for name, x in tensors.items() if not name.startswith("last_layer.")}
    mlp = _mlp(rest, path)
    if prototypes.ndim != 2 or mlp[-1].out_features != prototypes.shape[1]:
        raise LoadError(f"{path}: the head's MLP and its last layer do not fit together.")
    return DinoHead(mlp, prototypes).eval()


def _mlp(tensors: Mapping[str, Tensor], path: str | Path) -> nn.Sequential:
    """Return the MLP: matrices are linear layers, vectors with running means batch norms, gaps between them GELUs."""
    places: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"mlp\.(?:(\d+)\.)?(\w+)", name)
        if match is None:
            raise LoadError(f"{path}: the head's {name} is neither of its MLP nor of its last layer.")
        places.setdefault(int(match[1] or 0), {})[match[2]] = tensor
    if not places:
        raise LoadError(f"{path}: the head has no MLP.")
    layers: list[nn.Module] = []
    for place in range(max(places) + 1):
        head = places.get(place, {})
        weight = head.get("weight")
        if not head:
            layers.append(nn.GELU())
            continue
        if weight is not None and weight.ndim == 2:
            layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in head)
        elif weight is not None and "running_mean" in head:
            layer = nn.BatchNorm1d(len(weight))
        else:
            raise LoadError(f"{path}: the head's mlp.{place} is neither a linear layer nor a batch norm.")
        layer.load_state_dict(head, strict=True)
        layers.append(layer)
    return nn.Sequential(*layers)
