"""Weight maps: a readable table from upstream's tensors to canonical ones, run both ways.

A table has one rule a line::

    cls_token                            ->  embed.prefix            : 1 n d -> n d
    blocks.{l}.attn.qkv.weight           ->  blocks.{l}.attn.qkv.weight
    blocks.{l}.attn.proj.bias | zeros    ->  blocks.{l}.attn.out.bias
    [attn.q_bias, zeros, attn.v_bias]    ->  attn.qkv.bias
    mlp.w12.weight                       ->  [mlp.fc_gate.weight, mlp.fc_in.weight]
    rel_pos.table                        ->  attn_bias               : {gather}
    {positions}                          ->  embed.pos_embed
    ignore  rel_pos.index                :   derived from the window size

``{l}`` stands for a number, ``{*}`` for any rest. Several sources are joined along the first axis, several targets
split it. ``zeros`` and ``ones`` stand for tensors that upstream lacks, after ``|`` for those it may lack. Behind the
colon stands an einops pattern for each source, or a function of them; a function of nothing makes a computed table.
A source in a list may have a pattern of its own: ``[cls : 1 n d -> n d, registers] -> embed.prefix``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from prisma_core.errors import WeightMapError
from prisma_core.maps.rule import CONSTANTS, Rule
from prisma_core.maps.table import Function, Table, pattern_of

State: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Choice:
    """A rule with its numbers bound, and the alternative chosen for each source."""

    rule: Rule
    sources: tuple[str, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(name for name in self.sources if name not in CONSTANTS)

    @property
    def rules(self) -> dict[str, Rule]:
        """By tensor, the rule with that source's pattern."""
        named = enumerate(self.sources)
        return {name: self.rule.part(index) for index, name in named if name not in CONSTANTS}


@dataclass(frozen=True)
class WeightMap(Table[Rule]):
    """A table of rules (see the module's docstring).

    Attributes:
        ignored: upstream's tensors that are left out, as names with marks, each with the reason.
    """

    ignored: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def parse(cls, table: str, functions: Mapping[str, Function] | None = None, **sizes: int) -> WeightMap:
        """Read a table.

        Args:
            functions: what ``{name}`` in a rule stands for: a differentiable function of the rule's sources.
            sizes: lengths of axes that einops patterns name.

        Raises:
            WeightMapError: a line is not a rule, or names a function that is not given.
        """
        rules: list[Rule] = []
        ignored: dict[str, str] = {}
        lines, sizes = Rule.lines(table, sizes, "WeightMap.parse takes the table, functions={...}")
        for line in lines:
            if line.startswith("ignore "):
                name, _, reason = line.removeprefix("ignore ").partition(" : ")
                if not reason.strip():
                    raise WeightMapError(f"{line!r}: expected 'ignore KEYS : REASON'.")
                ignored[name.strip()] = reason.strip()
                continue
            rules.append(Rule.parse(line).resolved(functions, "WeightMap"))
        return cls(tuple(rules), sizes, ignored)

    def prefixed(self, upstream: str, canonical: str) -> WeightMap:
        ignored = {upstream + name: why for name, why in self.ignored.items()}
        return replace(super().prefixed(upstream, canonical), ignored=ignored)

    # ---------------------------------------------------------------- forwards

    def forward(self, upstream: State, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Make the canonical tensors. They share upstream's storage wherever a rule does not have to copy.

        Args:
            upstream: every parameter and buffer of the upstream model.
            shapes: the shape of each canonical tensor.

        Raises:
            WeightMapError: a tensor on either side is not accounted for, or a shape is wrong.
        """
        choices = list(self._choose(upstream, shapes))
        used = {name for choice in choices for name in choice.tensors}
        left = [name for name, x in upstream.items() if name not in used and x.numel()]  # empty ones hold nothing
        if unused := [name for name in left if self.reason_to_ignore(name) is None]:
            raise WeightMapError(
                f"{len(unused)} upstream tensors are neither mapped nor ignored: {_listed(unused)}. "
                "Map each in the adapter's weight table, or ignore it there with a reason."
            )
        state: dict[str, Tensor] = {}
        for choice in sorted(choices, key=lambda choice: not choice.tensors):
            tensors = self._make(choice, upstream, shapes)
            if not choice.tensors:  # constants and functions of nothing are as the other tensors of the module
                module = choice.rule.targets[0].rpartition(".")[0]
                beside = [tensor for name, tensor in state.items() if name.rpartition(".")[0] == module]
                like = next((tensor for tensor in (*beside, *upstream.values()) if tensor.is_floating_point()), None)
                tensors = {name: tensor.to(like) if like is not None else tensor for name, tensor in tensors.items()}
            state.update(tensors)
        return {name: state[name] for name in shapes}

    def _choose(self, upstream: Iterable[str], targets: Collection[str]) -> Iterator[_Choice]:
        """Yield the rules that make the targets, each once."""
        present, canonical = {*upstream, *CONSTANTS}, set(targets)
        patterns = [(rule, pattern_of(target)) for rule in self.rows for target in rule.targets]
        seen: set[Rule] = set()
        unfilled: list[str] = []
        for name in targets:
            rules = [rule.bind(match.groupdict()) for rule, one in patterns if (match := one.fullmatch(name))]
            if len(rules) > 1:
                raise WeightMapError(f"{name} is made by {len(rules)} rules: {'; '.join(map(str, rules))}.")
            if not rules:
                unfilled.append(f"{name} (no rule)")
            if not rules or (rule := rules[0]) in seen:
                continue
            seen.add(rule)
            if not rule.sources and rule.function is None:  # a table written by code may join nothing
                raise WeightMapError(f"{rule}: it makes {name} of nothing. Name the sources in the brackets.")
            if beyond := [target for target in rule.targets if target not in canonical]:
                raise WeightMapError(f"{rule} makes {_listed(beyond)}, which the canonical model does not have.")
            sources = [next((one for one in options if one in present), "") for options in rule.sources]
            if absent := [options[0] for options, source in zip(rule.sources, sources, strict=True) if not source]:
                unfilled.append(f"{name} (needs {', '.join(absent)})")
            else:
                yield _Choice(rule, tuple(sources))
        if unfilled:
            advice = (
                "The upstream model lacks these tensors: is the checkpoint of this architecture? "
                "What it lacks by design is filled in the rule: 'SOURCE | zeros -> TARGET'."
            )
            if any(name.endswith("(no rule)") for name in unfilled):
                advice = "Add a rule that makes it to the weight map."
            raise WeightMapError(f"{len(unfilled)} canonical tensors cannot be filled: {_listed(unfilled)}. {advice}")

    def reason_to_ignore(self, name: str) -> str | None:
        """The reason why an upstream tensor is left out, or None if it is not."""
        return next((why for pattern, why in self.ignored.items() if pattern_of(pattern).fullmatch(name)), None)

    def copied(self, upstream: State, canonical: State) -> dict[str, str]:
        """The canonical tensors made of upstream's that share no memory with them, each with its rule."""
        shared = {tensor.untyped_storage().data_ptr() for tensor in upstream.values()}
        targets = ((name, one) for one in self._choose(upstream, canonical) if one.tensors for name in one.rule.targets)
        return {
            name: str(choice.rule)
            for name, choice in targets
            if canonical[name].untyped_storage().data_ptr() not in shared
        }

    def function_sources(self, upstream: Iterable[str]) -> set[str]:
        """The upstream tensors that go through a function, which cannot be run backwards."""
        patterns = [pattern_of(name) for rule in self.rows if rule.function is not None for name in rule.names]
        return {name for name in upstream if any(pattern.fullmatch(name) for pattern in patterns)}

    def _make(self, choice: _Choice, upstream: State, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        rule, targets = choice.rule, [shapes[target] for target in choice.rule.targets]
        sources = (upstream[name] for name in choice.tensors)
        joined = rule.compute(*sources) if rule.call is not None else self._join(choice, upstream, targets)
        lengths = [_rows(shape) for shape in targets]
        if len(targets) > 1 and _rows(joined.shape) != sum(lengths):
            raise WeightMapError(f"{rule}: {_rows(joined.shape)} rows cannot be split into {lengths}.")
        tensors = dict(zip(rule.targets, torch.split(joined, lengths) if len(targets) > 1 else [joined], strict=True))
        for name, tensor in tensors.items():
            if tensor.shape != shapes[name]:
                came = {source: list(upstream[source].shape) for source in choice.tensors}
                raise WeightMapError(
                    f"{name}: expected shape {list(shapes[name])}, got {list(tensor.shape)} from {came} by '{rule}'."
                )
        return tensors

    def _join(self, choice: _Choice, upstream: State, targets: list[torch.Size]) -> Tensor:
        rule, tail = choice.rule, targets[0][1:]
        parts = {name: one.read(upstream[name], self.sizes) for name, one in choice.rules.items()}
        rest = sum(map(_rows, targets)) - sum(_rows(part.shape) for part in parts.values())
        if rest < 0 or (len(choice.sources) > 1 and any(part.shape[1:] != tail for part in parts.values())):
            came = {source: list(part.shape) for source, part in parts.items()}
            raise WeightMapError(f"{rule}: {came} cannot be joined into {[list(shape) for shape in targets]}.")
        like = next((upstream[name] for name in choice.tensors), next(iter(upstream.values())))
        for name in set(choice.sources) - set(parts):
            parts[name] = CONSTANTS[name](rest, *tail, dtype=like.dtype, device=like.device)
        pieces = [parts[name] for name in choice.sources]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    # ---------------------------------------------------------------- backwards

    def backward(self, canonical: State, upstream: State) -> dict[str, Tensor]:
        """Make upstream tensors that hold the canonical numbers.

        Args:
            canonical: the canonical tensors.
            upstream: the tensors the map was run forwards on: they give names and shapes, and stand for themselves
                where a rule cannot be inverted or upstream's tensor is ignored.

        Raises:
            WeightMapError: the canonical tensors were changed where upstream has nothing to hold the change.
        """
        shapes = {name: tensor.shape for name, tensor in canonical.items()}
        state: dict[str, Tensor] = {}
        for choice in self._choose(upstream, canonical):
            for name, tensor in self._unmake(choice, canonical, upstream, shapes).items():
                if name in state and not torch.equal(state[name], tensor):
                    raise WeightMapError(
                        f"{name} makes several canonical tensors, and they were changed differently: "
                        "upstream has one tensor for them and cannot hold the change."
                    )
                state[name] = tensor
        return {name: state.get(name, tensor) for name, tensor in upstream.items()}

    def _unmake(
        self, choice: _Choice, canonical: State, upstream: State, shapes: Mapping[str, torch.Size]
    ) -> dict[str, Tensor]:
        rule = choice.rule
        if rule.function is not None:
            for name, tensor in self._make(choice, upstream, shapes).items():
                if not torch.equal(tensor.to(canonical[name]), canonical[name]):
                    raise WeightMapError(f"{name} was changed, and '{rule}' cannot be run backwards.")
            return {name: upstream[name] for name in choice.tensors}
        parts = [canonical[name] for name in rule.targets]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        rules = choice.rules
        rows = {
            name: _rows(one.read(torch.empty(upstream[name].shape, device="meta"), self.sizes).shape)
            for name, one in rules.items()
        }
        rest = joined.shape[0] - sum(rows.values()) if joined.ndim else 0
        lengths = [rows.get(name, rest) for name in choice.sources]
        pieces = torch.split(joined, lengths) if len(lengths) > 1 else [joined]
        state: dict[str, Tensor] = {}
        for name, piece in zip(choice.sources, pieces, strict=True):
            if name in rules:
                shape = upstream[name].shape
                state[name] = rules[name].write(piece, self.sizes, shape).reshape(shape)
            elif not torch.equal(piece, CONSTANTS[name](piece.shape, dtype=piece.dtype, device=piece.device)):
                raise WeightMapError(
                    f"{', '.join(rule.targets)} was changed where upstream has no tensor (it stands for {name})."
                )
        return state


def _rows(shape: torch.Size) -> int:
    return shape[0] if shape else 1


def _listed(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
