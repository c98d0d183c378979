"""Models with more or fewer registers, and registers at test time: scopes that leave the model as it was.

Each scope yields a model that shares the weights of the one it was made from, tables by position apart.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from prisma_core import HookContext, HookedViT, InputError, NotApplicable
from prisma_core.zoo import assign, tensors_of
from prisma_registers.norms import check_vit
from prisma_registers.sinks import Neuron

# Which axis of a table runs over tokens.
_ROWS = {"embed.prefix": 0, "embed.pos_embed": 0, "rope_cos": -3, "rope_sin": -3}


@contextmanager
def without_registers(model: HookedViT) -> Generator[HookedViT]:
    """Yield the model without its register tokens.

    Raises:
        NotApplicable: it has none, or its pooling reads them.
    """
    check_vit(model)
    registers = model.layout.slice("registers")
    if registers.start == registers.stop:
        raise NotApplicable("This model has no registers to remove.")
    yield _resized(model, range(registers.start, registers.stop), None)


@contextmanager
def extra_registers(
    model: HookedViT, n: int = 1, *, values: Float[Tensor, "register d_model"] | None = None
) -> Generator[HookedViT]:
    """Yield the model with untrained registers added behind its own prefix tokens.

    Added tokens have no position: their embedding is what enters the stream.

    Args:
        model: any hooked vision transformer.
        n: how many.
        values: their embeddings ``[register d_model]``; default zeros.

    Raises:
        InputError: ``n`` is below 1, or values have another shape.
        NotApplicable: the model's pooling reads its prefix tokens, so more of them change what it pools.
    """
    check_vit(model)
    if n < 1:
        raise InputError(f"Expected at least one register to add, got n={n}.")
    like = next(model.parameters())
    values = torch.zeros(n, model.spec.d_model) if values is None else values
    if values.shape != (n, model.spec.d_model):
        raise InputError(f"Expected values [{n} {model.spec.d_model}], got shape {list(values.shape)}.")
    yield _resized(model, range(0), values.to(like))


@contextmanager
def registers_at_test_time(model: HookedViT, neurons: Iterable[Neuron], n: int = 1) -> Generator[HookedViT]:
    """Yield the model with untrained registers that take over what the given neurons do at patches.

    At each of these neurons an added register gets the largest activation of any patch, and the patches get zero.

    Args:
        model: any hooked vision transformer.
        neurons: see ``register_neurons``.
        n: how many registers to add; each gets the same activations.

    Raises:
        InputError: there is no such neuron, or none was given.

    Source: "Vision transformers don't need trained registers" (Jiang et al. 2025), section 4.
    """
    check_vit(model)
    by_layer: dict[int, list[int]] = {}
    for neuron in neurons:
        _check(model, neuron)
        by_layer.setdefault(neuron.layer, []).append(neuron.index)
    if not by_layer:
        raise InputError("Expected at least one neuron to move, got none: register_neurons(model, images) finds some.")
    with extra_registers(model, n) as wider:
        n_prefix = wider.layout.n_prefix

        def moved(index: list[int]):
            def hook(x: Tensor, at: HookContext) -> Tensor:
                x = x.clone()
                x[:, n_prefix - n : n_prefix, index] = x[:, n_prefix:, index].amax(1, keepdim=True)
                x[:, n_prefix:, index] = 0
                return x

            return hook

        hooks = {f"blocks.{layer}.mlp.hook_post": moved(index) for layer, index in by_layer.items()}
        with wider.hooks(hooks):
            yield wider


def _check(model: HookedViT, neuron: Neuron) -> None:
    if not 0 <= neuron.layer < len(model.blocks):
        raise InputError(f"No layer {neuron.layer}: this model has {len(model.blocks)}.")
    block = model.spec.blocks[neuron.layer]
    if block.mlp is None or block.n_parallel > 1:
        raise InputError(f"Layer {neuron.layer} has no single MLP whose neurons could be moved.")
    if not 0 <= neuron.index < block.mlp.d_mlp:
        raise InputError(f"No neuron {neuron.index} in layer {neuron.layer}: there are {block.mlp.d_mlp}.")


def _resized(model: HookedViT, drop: range, added: Tensor | None) -> HookedViT:
    """Return a model over the same weights with some tokens dropped, or added at the end of the prefix."""
    pool, layout = model.spec.pool, model.layout
    if pool.with_prefix and pool.kind in ("avg", "attention"):
        raise NotApplicable(
            f"This model's {pool.kind} pooling reads registers, so another number changes what it pools."
        )
    n = 0 if added is None else len(added)
    spec = model.spec.model_copy(
        update={"layout": layout.model_copy(update={"registers": layout.registers - len(drop) + n})}
    )
    with torch.device("meta"):
        made = HookedViT(spec)
    if spec.embed.stem == "opaque":
        made.embed.stem = model.embed.stem
    tensors = tensors_of(model)
    if added is not None:
        tensors.setdefault("embed.prefix", added[:0])
    for name, tensor in tensors.items():
        if name.endswith("attn_bias"):
            tensors[name] = _rows(_rows(tensor, -1, drop, layout.n_prefix, n, 0), -2, drop, layout.n_prefix, n, 0)
        elif name in _ROWS:
            fill = 1 if name == "rope_cos" else 0  # an added token is not turned
            tensors[name] = _rows(tensor, _ROWS[name], drop, layout.n_prefix, n, fill)
    if added is not None:
        tensors["embed.prefix"] = torch.cat([tensors["embed.prefix"][: layout.n_prefix], added])
    kept = tensors_of(made)
    assign(made, {name: tensor for name, tensor in tensors.items() if name in kept})
    made.preprocess, made.labels, made.reference = model.preprocess, model.labels, model.reference
    return made.train(model.training)


def _rows(tensor: Tensor, axis: int, drop: range, n_prefix: int, n: int, fill: float) -> Tensor:
    """Return a table with the rows of some prefix tokens dropped and ``n`` rows put in behind the prefix."""
    tensor = tensor.detach()
    rest = [row for row in range(n_prefix) if row not in drop]
    index = torch.tensor(rest, dtype=torch.long, device=tensor.device)
    prefix = tensor.narrow(axis, 0, n_prefix).index_select(axis, index)
    shape = list(tensor.shape)
    shape[axis] = n
    patches = tensor.narrow(axis, n_prefix, tensor.shape[axis] - n_prefix)
    return torch.cat([prefix, tensor.new_full(shape, fill), patches], dim=axis)
