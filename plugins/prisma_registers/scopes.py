"""Models with more or fewer registers, and registers at test time: scopes that leave the model as it was.

Each scope yields a model of its own that shares the weights of the one it was made from, tables by position apart. What
it computes does not depend on the scope, the thread or the scopes around it; hooks of the one do not run in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from operator import index
from types import TracebackType
from typing import Annotated, Any, NoReturn, ParamSpec, cast

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from prisma_core import HookedViT, InputError, NotApplicable, assign, tensors_of
from prisma_core.plugin import checked
from prisma_registers.moving import Move, MovingViT
from prisma_registers.norms import check_vit
from prisma_registers.sinks import Neuron

# Which axis of a table runs over tokens.
_ROWS = {"embed.prefix": 0, "embed.pos_embed": 0, "rope_cos": -3, "rope_sin": -3}


P = ParamSpec("P")
Registers = Annotated[int, Field(ge=1, le=1 << 14)]


class ModelScope(AbstractContextManager[HookedViT]):
    """A scope that yields a model: ``with without_registers(model) as bare:``. By itself it is none."""

    def __init__(self, name: str, scope: AbstractContextManager[HookedViT]):
        self._name = name
        self._scope = scope

    def __enter__(self) -> HookedViT:
        return self._scope.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> bool | None:
        return self._scope.__exit__(kind, error, where)

    def __repr__(self) -> str:
        return f"<scope of {self._name}: with {self._name}(model, ...) as changed: ...>"

    def __call__(self, *inputs: Any, **kwargs: Any) -> NoReturn:
        raise InputError(
            f"{self._name} is a scope, not a model. Enter it: with {self._name}(model, ...) as changed: ..."
        )

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"A scope has no attribute {name!r}; its model may. Enter it: with {self._name}(model, ...) as changed: ..."
        )


def _scope(function: Callable[P, Generator[HookedViT]]) -> Callable[P, ModelScope]:
    """Make a scope of a generator of one model, and nothing else: a context manager is a decorator too."""
    make = contextmanager(function)

    @wraps(function)
    def scope(*args: P.args, **kwargs: P.kwargs) -> ModelScope:
        return ModelScope(function.__name__, make(*args, **kwargs))

    return scope


@checked
@_scope
def without_registers(model: HookedViT) -> Generator[HookedViT]:
    """Yield the model without its register tokens.

    >>> import prisma_core as prisma
    >>> model = prisma.load("toy:scenes-reg")
    >>> with without_registers(model) as bare:
    ...     model.layout.n_tokens - bare.layout.n_tokens
    4

    Raises:
        NotApplicable: it has none, its pooling reads them, or neurons' activations are moved into them.
    """
    check_vit(model)
    if isinstance(model, MovingViT):
        raise NotApplicable("This model moves neurons' activations into its registers; remove those of the original.")
    registers = model.layout.slice("registers")
    if registers.start == registers.stop:
        raise NotApplicable("This model has no registers to remove.")
    yield _resized(model, range(registers.start, registers.stop), None)


@checked
@_scope
def extra_registers(
    model: HookedViT, n: Registers = 1, *, values: Float[Tensor, "register d_model"] | None = None
) -> Generator[HookedViT]:
    """Yield the model with untrained registers added behind its own prefix tokens.

    Added tokens have no position: their embedding is what enters the stream.

    >>> import prisma_core as prisma
    >>> model = prisma.load("toy:scenes-cls")
    >>> with extra_registers(model, 2) as more:
    ...     more.layout.n_tokens - model.layout.n_tokens
    2

    Args:
        model: any hooked vision transformer.
        n: how many.
        values: their embeddings ``[register d_model]``; default zeros.

    Raises:
        InputError: ``n`` is below 1, or values have another shape.
        NotApplicable: the model's pooling reads its prefix tokens, or the first token where no class token stands
            there, so more of them change what it pools.
    """
    check_vit(model)
    yield _wider(model, n, values)


@checked
@_scope
def registers_at_test_time(model: HookedViT, neurons: Iterable[Neuron], n: Registers = 1) -> Generator[HookedViT]:
    """Yield the model with untrained registers that take over what the given neurons do at patches.

    At each of these neurons an added register gets the activation of largest size of any patch, with its sign, and the
    patches get zero. Of scopes inside one another all moves hold, the outer ones first.

    >>> import prisma_core as prisma
    >>> model = prisma.load("toy:scenes-cls")
    >>> with registers_at_test_time(model, [Neuron(layer=0, index=5)]) as more:
    ...     more.layout.n_tokens - model.layout.n_tokens
    1

    Args:
        model: any hooked vision transformer.
        neurons: see ``register_neurons``.
        n: how many registers to add; each gets the same activations.

    Raises:
        InputError: there is no such neuron, none was given, or ``n`` is below 1.
        NotApplicable: as in ``extra_registers``.

    Source: "Vision transformers don't need trained registers" (Jiang et al. 2025), section 4.
    """
    check_vit(model)
    by_layer: dict[int, list[int]] = {}
    for neuron in _neurons(neurons):
        layer, index = _checked(model, neuron)
        by_layer.setdefault(layer, []).append(index)
    if not by_layer:
        raise InputError("Expected at least one neuron to move, got none: register_neurons(model, images) finds some.")
    first = model.layout.n_prefix
    yield _wider(
        model,
        n,
        moves=[Move(layer, tuple(dict.fromkeys(index)), first, first + n) for layer, index in by_layer.items()],
    )


def _neurons(given: object) -> list[Neuron]:
    listed = list(cast("Iterable[object]", given)) if isinstance(given, Iterable) else [given]
    neurons = [each for each in listed if isinstance(each, Neuron)]
    if isinstance(given, Neuron) or len(neurons) < len(listed):
        what = next((each for each in listed if not isinstance(each, Neuron)), None)
        came = "one by itself" if isinstance(given, Neuron) else repr(what)
        raise InputError(
            f"Expected neurons as a list such as [Neuron(layer=5, index=12)], got {came}. "
            "register_neurons(model, images) finds some."
        )
    return neurons


def _checked(model: HookedViT, neuron: Neuron) -> tuple[int, int]:
    try:
        layer, neuron_index = index(neuron.layer), index(neuron.index)
    except TypeError as error:
        raise InputError(f"Expected a neuron's layer and index as whole numbers, got {neuron}.") from error
    if not 0 <= layer < len(model.blocks):
        raise InputError(f"No layer {layer}: this model has {len(model.blocks)}, counted from 0.")
    block = model.spec.blocks[layer]
    if block.mlp is None or block.n_parallel > 1:
        raise InputError(f"Layer {layer} has no single MLP whose neurons could be moved.")
    if not 0 <= neuron_index < block.mlp.d_mlp:
        raise InputError(f"No neuron {neuron_index} in layer {layer}: there are {block.mlp.d_mlp}.")
    return layer, neuron_index


def _wider(model: HookedViT, n: int, values: Tensor | None = None, *, moves: Iterable[Move] = ()) -> HookedViT:
    """Return a model with registers added, and with what is to be moved besides what is moved already."""
    d_model = model.spec.d_model
    values = torch.zeros(n, d_model) if values is None else values
    if not isinstance(values, Tensor) or values.shape != (n, d_model):
        came = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"Expected values [{n} {d_model}], got {came}.")
    return _resized(model, range(0), values.to(next(model.parameters())), moves)


def _resized(model: HookedViT, drop: range, added: Tensor | None, moves: Iterable[Move] = ()) -> HookedViT:
    """Return a model over the same weights with some tokens dropped, or added at the end of the prefix."""
    pool, layout = model.spec.pool, model.layout
    moved = (*(model.moves if isinstance(model, MovingViT) else ()), *moves)
    if not isinstance(model, MovingViT) and (beyond := model.unsaved_behaviour()):
        raise NotApplicable(f"This model {beyond}, which would be lost with another number of registers.")
    averaged = pool.with_prefix and pool.kind in ("avg", "attention", "token_and_avg")
    first = pool.kind in ("token", "token_and_avg") and not layout.cls + layout.distillation
    if averaged or first:
        raise NotApplicable(
            f"This model's {pool.kind} pooling reads registers, so another number changes what it pools."
        )
    n = 0 if added is None else len(added)
    spec = model.spec.model_copy(
        update={"layout": layout.model_copy(update={"registers": layout.registers - len(drop) + n})}
    )
    with torch.device("meta"):
        resized = MovingViT(spec, moved) if moved else HookedViT(spec)
    if spec.embed.stem == "opaque":
        resized.embed.stem = model.embed.stem
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
    kept = tensors_of(resized)
    assign(resized, {name: tensor for name, tensor in tensors.items() if name in kept})
    resized.preprocess, resized.labels, resized.reference = model.preprocess, model.labels, model.reference
    return resized.train(model.training)


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
