"""Learned biases of the scores, made by upstream's own modules from tables of offsets between patches."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.func import functional_call

from prisma_core.plugin import Reader, TokenLayout, copy_module
from prisma_hf.canonical import parts
from prisma_hf.canonical.names import TowerNames

TABLE = "relative_position_bias_table"


def shared(tower: Reader, names: TowerNames) -> bool:
    """Return whether there is a table that all blocks share."""
    return bool(names.bias) and _found(tower, names.bias) is not None


def tables(tower: Reader, at: str, names: TowerNames) -> dict[str, Reader]:
    """Return the modules that make the bias, by the paths of their tables: a block's own, and the shared one."""
    by_path: dict[str, Reader] = {}
    parts_with_bias = [_found(block, names.block.bias) for block in parts.at(tower, names.blocks) if names.block.bias]
    for module in parts_with_bias:
        if module is not None:
            _look(module)
            by_path[f"{at}{names.blocks}.{{l}}.{names.block.bias}.{TABLE}"] = module
    if shared(tower, names):
        module = parts.at(tower, names.bias)
        _look(module)
        by_path[f"{at}{names.bias}.{TABLE}"] = module
    return by_path


def _found(reader: Reader, path: str) -> Reader | None:
    """Return the module that makes a bias, which a flag beside it switches on."""
    owner, module = parts.at(reader, path.rpartition(".")[0]), parts.find(reader, path)
    if bool(owner.get("has_relative_position_bias", module is not None)) != (module is not None):
        raise owner.unsupported(f"has_relative_position_bias={owner.has_relative_position_bias!r}, unlike its modules")
    return module


def _look(module: Reader) -> None:
    if module.num_relative_distance != len(getattr(module, TABLE)) or module.window_size is None:
        raise module.unsupported("a table of another length than its window's")


def rows(tables: dict[str, Reader]) -> str:
    """Return the weight rows of a bias."""
    return f"[{', '.join(tables)}]  ->  blocks.{{l}}.attn.attn_bias  : {{bias}}\n"


def function(readers: dict[str, Reader], layout: TokenLayout) -> Callable[..., Tensor]:
    """Return what makes the bias ``[head query_pos key_pos]`` of its tables, in their order."""
    modules = [copy_module(module.module, hooks=False) for module in readers.values()]

    def made(*given: Tensor) -> Tensor:
        window = (layout.rows, layout.columns)
        each = [
            functional_call(module, {TABLE: table}, (window,)) for module, table in zip(modules, given, strict=True)
        ]
        return sum(each[1:], each[0])[0]

    return made
