"""Hooked upstream: a library's own module with hook points at the places of a hook map."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from textwrap import indent
from typing import Any, Self

import torch
from torch import Tensor, nn

from prisma_core.errors import HookError, InputError, PrismaError
from prisma_core.errors.arguments import in_transform
from prisma_core.errors.migration import keyword_names, migration_hint, module_getattr
from prisma_core.hooks.model import sites_below
from prisma_core.hooks.point import HookPoint
from prisma_core.inputs.checks import check_input, check_numbers, check_place, input_kind, input_words
from prisma_core.maps.places import HookMap, Row
from prisma_core.model import Size, ZooModel, read_sample
from prisma_core.spec import MapSpec
from prisma_core.spec.brief import NameTable, html_table
from prisma_core.spec.layout import TokenLayout
from prisma_core.toolbox.derivatives import explain_second, kernels
from prisma_core.toolbox.precision import AS_IT_IS
from prisma_core.toolbox.query_rows import AXIS, Rows
from prisma_core.toolbox.tables import numbered
from prisma_core.upstream.copies import copy_module
from prisma_core.upstream.observer import Observer, attach, watching


class BoundRow(Observer):
    """Applies the hooks of a hook point at the place of its row.

    Attributes:
        point: the hook point, with the row's axes and equation.
    """

    def __init__(self, row: Row, sizes: Mapping[str, int]):
        self.row = row
        self.place = row.place
        self.sizes = sizes
        self.point = HookPoint(row.axes, row.equation)

    def passed(self, x: Tensor, batch: int) -> Tensor:
        """Apply the hooks of the active scope to upstream's tensor, axes ordered as the row says."""
        sizes = {**self.sizes, "batch": batch}
        activation = self.row.read(x, sizes)
        if activation.ndim != len(self.row.axes.split()):
            raise PrismaError(
                f"The hook map says {self.row.hook} has the axes {self.row.axes!r}; {self.place} "
                f"holds {list(activation.shape)}."
            )
        activation = activation.clone()
        result = self.point(activation)
        if result is activation and not (torch.is_grad_enabled() and activation.requires_grad):
            return x
        return _laid_out_as(self.row.write(result, sizes), x)

    def rows(self) -> Rows | None:
        upstream = self.row.how.partition("->")[0].split()  # the queries stand last but one, or among others
        alone = upstream[-2:-1] == [AXIS] and AXIS not in self.sizes
        return Rows.asked(self.point) if alone else None

    def store(self, rows: Rows, x: Tensor, batch: int) -> None:
        rows.store(self.point, self.row.read(x, {**self.sizes, "batch": batch}))

    def missed(self) -> None:
        raise PrismaError(f"No tensor passes {self.place}; the hook map names it for {self.row.hook}.")


def _laid_out_as(y: Tensor, x: Tensor) -> Tensor:
    """Return a copy of y, which may be cached, in the memory layout of x, so that kernels add in the same order."""
    if in_transform() or any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True)):
        return y.clone()  # of what a transform holds, sizes and steps are not those in memory
    return torch.empty_strided(x.shape, x.stride(), dtype=y.dtype, device=y.device).copy_(y)


class HookedUpstream(ZooModel):
    """An upstream module with hook points at the places a hook map names.

    It runs upstream's own code on upstream's own kernels. A hook point costs time only in a pass that asks for it: then
    its tensor is copied, because upstream may edit its own in place.

    Args:
        upstream: the module to hook; it is changed, so pass a copy (``copy_module``).
        table: one row for each hook point, in the order in which they fire, each with its axes.
        spec: shape of the input, and the tokens where they stay in place.
        output: reads the main output, a tensor, from upstream's result.

    Attributes:
        upstream: the module; its parameters are the model's.
    """

    def __init__(self, upstream: nn.Module, table: HookMap, spec: MapSpec, output: Callable[[Any], Tensor]):
        super().__init__()
        self.spec: MapSpec = spec
        self.upstream = upstream
        self._output = output
        self._rows = _bound_rows(table, upstream)
        for row in self._rows:
            _add_point(self, row)
        _separate(upstream, [row.place.module for row in self._rows])
        attach(upstream, self._rows)
        self.eval()

    def forward(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """Return upstream's main output.

        Raises:
            InputError: an input of another kind or shape, or one that upstream cannot take.
        """
        if torch.compiler.is_compiling():
            return self._run(*inputs, **kwargs)
        if "start_at_layer" in kwargs or "stop_at_layer" in kwargs:
            self._refuse_keywords(kwargs)  # upstream's code may take anything, and ignore it
        x = self._checked(inputs, kwargs)
        if x is None or tuple(x.shape[1:]) in self._shapes():
            return self._run(*inputs, **kwargs)
        try:
            return self._run(*inputs, **kwargs)
        except (RuntimeError, AssertionError, ValueError) as error:  # how upstream's code refuses a size
            raise InputError(
                f"Expected {self._expected()}, got shape {list(x.shape)}, on which upstream's code failed "
                f"({str(error).strip().partition(chr(10))[0]}). model.preprocess makes the right tensor."
            ) from error

    def _run(self, *inputs: Any, **kwargs: Any) -> Tensor:
        active = [bound for bound in self._rows if bound.point.wanted]
        if active and torch.compiler.is_compiling():
            raise HookError(
                f"Hooks at {active[0].row.hook} cannot run in a compiled model of this kind; run it eagerly."
            )
        with kernels(), watching(active, _batch(inputs, kwargs)) if active else AS_IT_IS:
            output = self._output(self.upstream(*inputs, **kwargs))
        explain_second(output)
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the model with the functions that were set on upstream's modules."""
        memo[id(self.upstream)] = copy_module(self.upstream, copy=True, memo=memo)
        return super().__deepcopy__(memo)

    def __repr__(self) -> str:
        """The size, upstream's class, and which parts have hook points; ``model.upstream`` prints all modules."""
        lines = [
            self.extra_repr(),
            f"upstream: {type(self.upstream).__name__} of {self._expected()}",
            f"{len(self._rows)} hook points, listed by hook_points(): {', '.join(_parts(self))}",
        ]
        return f"{type(self).__name__}(\n{indent(chr(10).join(lines), '  ')}\n)"

    def attribute_hint(self, name: str) -> str | None:
        return migration_hint(name) or (None if name.startswith("_") else _instead(self))

    @property
    def counted(self) -> set[str]:
        """The modules in which hook points stand at functions, by the number of their call."""
        return {row.place.module for row in self._rows if row.place.function}

    @property
    def layout(self) -> TokenLayout | None:
        """The token layout at the native size; None where the spec states none."""
        return self.spec.layout

    @property
    def fixed_layout(self) -> TokenLayout | None:
        return None if self.spec.sizes else self.spec.layout

    def layout_for(self, *inputs: Any) -> TokenLayout | None:
        layout, shape = self.spec.layout, self.spec.shape
        tensors: list[object] = [each for each in inputs if isinstance(each, Tensor | list | tuple)]
        if layout is None or not tensors:
            return layout
        x = tensors[0]
        if len(tensors) > 1 or not isinstance(x, Tensor) or x.ndim != len(shape) + 1:
            return None  # further inputs, such as masks, may choose tokens
        if tuple(x.shape[1:]) == shape:
            return layout
        if len(shape) < 3 or not self.spec.sizes:
            return None
        grid = {"rows": (-2, layout.rows), "columns": (-1, layout.columns)}
        if len(shape) == 4:
            grid["frames"] = (-4, layout.frames)
        sizes = {name: x.shape[axis] // (shape[axis] // n) for name, (axis, n) in grid.items()}
        return layout.model_copy(update=sizes)

    def _code(self) -> Callable[..., Any]:
        return self.upstream.forward

    def _refuse_keywords(self, kwargs: Mapping[str, Any], method: Callable[..., Any] | None = None) -> None:
        for name in ("start_at_layer", "stop_at_layer"):
            if name in kwargs and name not in keyword_names(self._code()):
                raise InputError(
                    f"A model without canonical form runs upstream's code from end to end, so it takes no {name!r}. "
                    "Hooks and caches reach every place inside: run_with_hooks, run_with_cache."
                )
        super()._refuse_keywords(kwargs, method)

    def _expected(self) -> str:
        return input_words(self.spec.shape)

    def _shapes(self) -> list[Size]:
        return [self._sized(size) for size in ((), *self.spec.sizes)]

    def _sized(self, size: Size) -> Size:
        return (*self.spec.shape[: len(self.spec.shape) - len(size)], *size)

    def _checked(self, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return the first input, checked against the spec; None where it was given by a name only upstream knows."""
        if not inputs and kwargs:
            return None
        what = input_kind(self.spec.shape)
        x = check_input(inputs[0] if inputs else None, self.spec.shape)
        check_place(what, x, next((each for each in self.parameters() if each.is_floating_point()), None))
        check_numbers(what, x)
        return x

    def sizes(self) -> list[Size]:
        shape = self.spec.shape
        return [shape[1:] if len(shape) > 1 else shape, *self.spec.sizes]

    def sample_inputs(
        self, batch: int = 1, *, size: Size | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        batch, shape = read_sample(batch, size, generator), self.spec.shape
        if size is not None:
            if len(size) > len(shape):
                raise InputError(
                    f"Expected a size of at most {len(shape)} axes, as in {list(shape)}; got {list(size)}."
                )
            shape = self._sized(size)
        return (torch.randn(batch, *shape, generator=generator, device="cpu"),)

    def export(self) -> dict[str, Tensor]:
        """Return upstream's own state dict with the model's present weights."""
        state: dict[str, Any] = self.upstream.state_dict()
        for name, value in state.items():
            if isinstance(value, Tensor):  # packed weights are more
                state[name] = value.detach().contiguous() if value.layout == torch.strided else value.detach()
        return state


def _separate(upstream: nn.Module, paths: Iterable[str]) -> None:
    """Give each of these paths a module of its own where one is used at several; the copies share its tensors."""
    parts = dict.fromkeys(path[: end.start()] for path in sorted(paths) for end in re.finditer(r"\.|$", path))
    seen = set[nn.Module]()
    for path in filter(None, parts):  # from the outside in: what stands below a copy is a copy, too
        try:
            module = upstream.get_submodule(path)
        except AttributeError:  # attach says so
            continue
        if module in seen:
            above, _, name = path.rpartition(".")
            module = copy_module(module, copy=False)
            setattr(upstream.get_submodule(above), name, module)
        seen.add(module)


class Part(nn.Module):
    """Container of hook points under the name of a part of the model."""

    def __getitem__(self, index: int) -> nn.Module:
        """Return the part with a number, as ``model.stages[0].blocks[-1]``."""
        numbered = {int(name): part for name, part in self.named_children() if name.isdecimal()}
        at = index if index >= 0 else max(numbered, default=-1) + 1 + index
        if at not in numbered:
            raise IndexError(f"No part {index} here: there are {', '.join(self._modules) or 'none'}.")
        return numbered[at]

    __getattr__ = module_getattr()  # pyright: ignore[reportAssignmentType]

    def attribute_hint(self, name: str) -> str | None:
        return None if name.startswith("_") else _instead(self)

    def __repr__(self) -> str:
        return repr(self._points())

    def _repr_html_(self) -> str:
        points = self._points()
        return html_table(f"{len(points)} hook points", points.rows())

    def _points(self) -> NameTable[HookPoint]:
        """Return the hook points below this part, by their names within it, in firing order."""
        return NameTable({name: site.point for name, site in sites_below(self).items()})


def _instead(module: nn.Module) -> str:
    """Say why a model without canonical form lacks an attribute, and where to look."""
    return (
        "a model without canonical form has hook points under such names, and no weights such as W_Q. "
        f"Here there are {', '.join(_parts(module))}; upstream's own module, with its weights, is model.upstream."
    )


def _parts(module: nn.Module) -> list[str]:
    """Return the names of hook points and of parts with hook points that a module has as attributes."""
    parts = [part for part, _ in module.named_children() if part != "upstream"]
    return [*(part for part, value in vars(module).items() if isinstance(value, HookPoint)), *parts]


def _bound_rows(table: HookMap, upstream: nn.Module) -> list[BoundRow]:
    rows = numbered(table, upstream)
    for row in rows:
        if not row.axes or "(" in row.axes:
            raise PrismaError(
                f"The row of {row.hook} must name its axes, one word each: 'PLACE -> {row.hook} : batch pos d_model', "
                f"or as the right side of its einops; functions have no inverse to write by. Got {row.how!r}."
            )
    return [BoundRow(row, table.sizes) for row in rows]


def _add_point(model: nn.Module, bound: BoundRow) -> None:
    """Set a hook point as an attribute of the part that its name begins with, which is made where there is none."""
    *path, last = bound.row.hook.split(".")
    part = model
    for name in path:
        if name not in dict(part.named_children()):
            part.add_module(name, Part())
        part = part.get_submodule(name)
    if not isinstance(part, Part) and part is not model:
        raise PrismaError(f"{bound.row.hook} is no name for a hook point: {path[0]} is the model's own.")
    setattr(part, last, bound.point)


def _batch(inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    return next((x.shape[0] for x in (*inputs, *kwargs.values()) if isinstance(x, Tensor) and x.ndim), 1)
