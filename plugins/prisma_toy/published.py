"""The Prisma project's published toys: ``.pth`` files of its training code, as a module that computes what they did.

A file holds ``model_state_dict``, with one of two sets of names: ``blocks.0.attn.W_Q`` of the hooked models (2024), or
``blocks.0.attention.qkv.weight`` of those before them, which are rewritten to the first. Heads, widths, patches and
image size are the shapes of the tensors; a norm is there if its weights are. What no tensor shows stands in
``Options``, with what the project's configuration has unless told otherwise.

Source: github.com/soniajoseph/ViT-Prisma, ``vit_prisma/models`` and ``vit_prisma/training``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from prisma_core import InputError, LoadError
from prisma_core.plugin import check_axes, check_shapes, depth_in
from prisma_toy.options import Options

Shapes = Mapping[str, torch.Size]
ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}


AXES = {"pos_embed.W_pos": 2, "blocks.0.attn.W_Q": 3, "head.W_H": 2, "head.weight": 2, "position_embedding": 3}
INSTEAD = (
    "Expected the tensors of one model under the names that docs/models-toy.md lists. IGNORE and mask are of attention "
    "that hides tokens: if nothing was hidden, take them out of the file."
)


class Norm(nn.Module):
    """A layer norm, with weights ``w`` and ``b`` or with none."""

    def __init__(self, shapes: Shapes, name: str, eps: float):
        super().__init__()
        self.eps = eps
        for part in ("w", "b"):
            self.register_parameter(part, _parameter(shapes, f"{name}.{part}", optional=True))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(dim=-1, keepdim=True)
        x = x / (x.pow(2).mean(dim=-1, keepdim=True) + self.eps).sqrt()
        x = x if self.w is None else x * self.w
        return x if self.b is None else x + self.b


class Attention(nn.Module):
    """Heads with matrices of their own: ``W_Q [head d_model d_head]``, ``W_O [head d_head d_model]``."""

    def __init__(self, shapes: Shapes, name: str):
        super().__init__()
        for part in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
            self.register_parameter(part, _parameter(shapes, f"{name}.{part}"))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            torch.einsum("bpm,hmd->bhpd", x, weight) + bias[:, None]
            for weight, bias in ((self.W_Q, self.b_Q), (self.W_K, self.b_K), (self.W_V, self.b_V))
        )
        pattern = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return torch.einsum("bhpd,hdm->bpm", pattern @ v, self.W_O) + self.b_O


class Mlp(nn.Module):
    """``act(x W_in + b_in) W_out + b_out``."""

    def __init__(self, shapes: Shapes, name: str, act: str):
        super().__init__()
        self.act = act
        for part in ("W_in", "b_in", "W_out", "b_out"):
            self.register_parameter(part, _parameter(shapes, f"{name}.{part}"))

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.act](x @ self.W_in + self.b_in) @ self.W_out + self.b_out


class Block(nn.Module):
    """Attention, and an MLP where the file has one, each behind a norm where it has that."""

    def __init__(self, shapes: Shapes, name: str, options: Options):
        super().__init__()
        self.ln1 = _norm(shapes, f"{name}.ln1", options)
        self.attn = Attention(shapes, f"{name}.attn")
        has_mlp = f"{name}.mlp.W_in" in shapes
        self.ln2 = _norm(shapes, f"{name}.ln2", options) if has_mlp else None
        self.mlp = Mlp(shapes, f"{name}.mlp", options.act) if has_mlp else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x if self.ln1 is None else self.ln1(x))
        if self.mlp is None:
            return x
        return x + self.mlp(x if self.ln2 is None else self.ln2(x))


class Patches(nn.Module):
    """The patch embedding; ``proj`` keeps the name it has in the file."""

    def __init__(self, shapes: Shapes):
        super().__init__()
        width, channels, *patch = shapes["embed.proj.weight"]
        self.proj = nn.Conv2d(channels, width, tuple(patch), stride=tuple(patch))

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


class Positions(nn.Module):
    """One embedding a token, the class token's first."""

    def __init__(self, shapes: Shapes):
        super().__init__()
        self.W_pos = _parameter(shapes, "pos_embed.W_pos")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.W_pos


class Head(nn.Module):
    """From the pooled vector to classes."""

    def __init__(self, shapes: Shapes):
        super().__init__()
        self.W_H, self.b_H = _parameter(shapes, "head.W_H"), _parameter(shapes, "head.b_H")

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W_H + self.b_H


class PublishedViT(nn.Module):
    """A published toy, built to the shapes of its tensors and filled with random numbers until they are loaded.

    Raises:
        LoadError: the tensors are no vision transformer of the project.
        InputError: an option does not go with them.
    """

    def __init__(self, shapes: Shapes, options: Options):
        super().__init__()
        _recognise(shapes)
        tokens = shapes["pos_embed.W_pos"][0]
        patches = next((count for count in (tokens - 1, tokens) if math.isqrt(count) ** 2 == count and count), None)
        if patches is None:
            raise LoadError(f"{tokens} positions are no square of patches, with or without a class token.")
        self.side = math.isqrt(patches)
        self.has_token = tokens > patches
        if self.has_token and "cls_token" not in shapes:
            raise LoadError(f"There are {tokens} positions for {patches} patches, and no cls_token.")
        self.pool = options.pool or ("token" if self.has_token else "avg")
        if self.pool == "token" and not self.has_token:
            raise InputError(f"pool='token', but {tokens} positions leave no room for a class token.")
        self.cls_token = _parameter(shapes, "cls_token", optional=True)
        self.embed, self.pos_embed = Patches(shapes), Positions(shapes)
        self.ln_pre = _norm(shapes, "ln_pre", options) if "ln_pre.w" in shapes else None
        depth = depth_in(shapes, "blocks.", "the file")
        self.blocks = nn.ModuleList(Block(shapes, f"blocks.{layer}", options) for layer in range(depth))
        self.ln_final = _norm(shapes, "ln_final", options)
        self.head = Head(shapes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image)
        if self.has_token:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.pos_embed(x)
        x = x if self.ln_pre is None else self.ln_pre(x)
        for block in self.blocks:
            x = block(x)
        x = x if self.ln_final is None else self.ln_final(x)
        return self.head(x[:, 0] if self.pool == "token" else x.mean(dim=1))


def published(tensors: Mapping[str, Tensor], options: Options, where: object) -> PublishedViT:
    """Return the model of a file's tensors, each accounted for.

    Raises:
        LoadError: they are no vision transformer of the project, or not all of one.
    """
    check_axes(tensors, AXES, where, INSTEAD)
    try:
        renamed = _as_hooked(tensors, options) if "position_embedding" in tensors else dict(tensors)
    except (KeyError, RuntimeError, ValueError) as error:  # a tensor that is not there, or of another shape
        reason = f"no {error.args[0]}" if isinstance(error, KeyError) else f"{error}"
        raise LoadError(f"{where}: {reason}, of the names of 2023. {INSTEAD}") from error
    if "head.weight" in renamed:  # once it was a plain linear layer
        renamed["head.W_H"] = renamed.pop("head.weight").mT
        renamed["head.b_H"] = renamed.pop("head.bias", torch.zeros(0))
    try:
        model = PublishedViT({name: tensor.shape for name, tensor in renamed.items()}, options)
    except LoadError as error:
        raise LoadError(f"{where}: {error} {INSTEAD}") from error
    check_shapes(renamed, _expected(model), where, INSTEAD)
    _check_applied(options, model, where)
    model.load_state_dict(renamed, assign=True)
    return model.eval()


def _check_applied(given: Options, model: PublishedViT, where: object) -> None:
    """Refuse what was given and does not go with a model, or changes nothing about it.

    Raises:
        InputError: naming the option.
    """
    norms = [part for part in model.modules() if isinstance(part, Norm)]
    heads = len(model.blocks[0].attn.W_Q)
    idle = {
        "act": not any(isinstance(part, Mlp) for part in model.modules()) and "it has no MLP",
        "eps": not norms and "it has no norm",
        "centred": all(norm.w is not None for norm in norms) and norms and "its norms have weights",
        "heads": given.heads not in (None, heads) and f"its tensors have {heads} heads",
    }
    for name, why in idle.items():
        if name in given.model_fields_set and getattr(given, name) and why:
            raise InputError(f"{name}={getattr(given, name)!r} does not go with {where}: {why}. Leave {name}= out.")


def _recognise(shapes: Shapes) -> None:
    needed = ("embed.proj.weight", "pos_embed.W_pos", "blocks.0.attn.W_Q", "head.W_H", "head.b_H")
    if lacking := [name for name in needed if name not in shapes]:
        raise LoadError(
            f"no {', '.join(lacking)}, but {', '.join(list(shapes)[:4])}, ...: expected a vision transformer that the "
            "Prisma project trained."
        )
    if len(shapes["embed.proj.weight"]) != 4:
        raise LoadError("its patches are of videos; only those of images are read.")


def _expected(model: PublishedViT) -> dict[str, torch.Size]:
    """Return the shapes that go with those of the first block's queries, of the patches and of the classes."""
    heads, width, d_head = model.blocks[0].attn.W_Q.shape
    per_head = {f"W_{part}": (heads, width, d_head) for part in "QKV"} | {
        f"b_{part}": (heads, d_head) for part in "QKV"
    }
    classes = model.head.W_H.shape[-1]
    fixed = {"W_O": (heads, d_head, width), "cls_token": (1, 1, width), "W_H": (width, classes), "b_H": (classes,)}
    shapes: dict[str, torch.Size] = {}
    for path, module in model.named_modules():
        d_mlp = module.W_in.shape[-1] if isinstance(module, Mlp) else 0
        inner = {"W_in": (width, d_mlp), "b_in": (d_mlp,), "W_out": (d_mlp, width)}
        for name, tensor in module.named_parameters(recurse=False):
            due = {**per_head, **fixed, **inner}.get(name)
            if due is None:  # one row a token or patch, or one number a channel
                due = (*tensor.shape[:-1], width) if name != "weight" else (width, *tensor.shape[1:])
            shapes[f"{path}.{name}".lstrip(".")] = torch.Size(due)
    return shapes


def _as_hooked(tensors: Mapping[str, Tensor], options: Options) -> dict[str, Tensor]:
    """Return tensors of the older names under the later ones; what has none keeps its name, and will be refused."""
    if options.heads is None:
        raise InputError("In files of this age no shape tells how many heads there are: give heads=, such as heads=8.")
    heads, state = options.heads, dict(tensors)
    state["pos_embed.W_pos"] = state.pop("position_embedding")[0]
    state["embed.proj.weight"] = state.pop("patch_embedding.proj.weight")
    width = len(state["embed.proj.weight"])
    state["embed.proj.bias"] = state["embed.proj.weight"].new_zeros(width)
    if width % heads:
        raise InputError(f"heads={heads} does not divide the width, {width}.")
    for layer in range(sum(name.endswith(".attention.qkv.weight") for name in tensors)):
        old, new = f"blocks.{layer}", f"blocks.{layer}.attn"
        for part, weight in zip("QKV", state.pop(f"{old}.attention.qkv.weight").chunk(3), strict=True):
            state[f"{new}.W_{part}"] = weight.unflatten(0, (heads, -1)).transpose(1, 2)
            state[f"{new}.b_{part}"] = weight.new_zeros(heads, width // heads)
        state[f"{new}.W_O"] = state.pop(f"{old}.attention.proj.weight").T.unflatten(0, (heads, -1))
        state[f"{new}.b_O"] = state.pop(f"{old}.attention.proj.bias")
        for ours, theirs in (("in", "fc1"), ("out", "fc2")):
            if f"{old}.mlp.{theirs}.weight" in state:
                state[f"{old}.mlp.W_{ours}"] = state.pop(f"{old}.mlp.{theirs}.weight").T
                state[f"{old}.mlp.b_{ours}"] = state.pop(f"{old}.mlp.{theirs}.bias")
    return state


def _parameter(shapes: Shapes, name: str, *, optional: bool = False) -> nn.Parameter | None:
    if name not in shapes:
        if optional:
            return None
        raise LoadError(f"no {name}: expected every tensor of each block.")
    return nn.Parameter(torch.randn(shapes[name]) / math.sqrt(max(shapes[name])))


def _norm(shapes: Shapes, name: str, options: Options) -> Norm | None:
    return Norm(shapes, name, options.eps) if options.centred or f"{name}.w" in shapes else None
