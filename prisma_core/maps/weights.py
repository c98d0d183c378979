"""Which upstream tensors make each canonical one: a readable table, run both ways.

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
split it. ``zeros`` and ``ones`` fill what upstream lacks, alone, in a list, or after ``|`` where the source may be
missing.
Behind the colon stands an einops pattern for each source, or the name of a function of the sources. A function in the
place of the sources takes nothing: it makes what upstream keeps in no tensor, such as a table it computes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias, cast

import torch
from torch import Tensor

from prisma_core.errors import WeightMapError, blamed
from prisma_core.hooks.query import tagged
from prisma_core.maps.rule import CONSTANTS, Rule, checked_sizes, pattern_of

State: TypeAlias = Mapping[str, Tensor]
Function: TypeAlias = Callable[..., Tensor]


@dataclass(frozen=True)
class _Chosen:
    """A rule with its numbers bound and its alternatives chosen."""

    rule: Rule
    sources: tuple[str, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(name for name in self.sources if name not in CONSTANTS)


@dataclass(frozen=True)
class WeightMap:
    """A table of rules (see the module's docstring).

    Attributes:
        functions: what ``{name}`` in a rule stands for: a differentiable function of the rule's sources.
        sizes: lengths of axes that einops patterns name.
    """

    rules: tuple[Rule, ...]
    ignored: Mapping[str, str] = field(default_factory=dict[str, str])
    functions: Mapping[str, Function] = field(default_factory=dict[str, Function])
    sizes: Mapping[str, int] = field(default_factory=dict[str, int])

    @classmethod
    def parse(cls, table: str, functions: Mapping[str, Function] | None = None, **sizes: int) -> WeightMap:
        """Read a table.

        Args:
            functions: what ``{name}`` in a rule stands for.
            sizes: lengths of axes that einops patterns name.

        Raises:
            WeightMapError: a line is not a rule, or names a function that is not given.
        """
        sizes = checked_sizes(sizes, "WeightMap.parse takes the table, functions={...}", WeightMapError)
        rules: list[Rule] = []
        ignored: dict[str, str] = {}
        for line in filter(None, (line.strip() for line in table.splitlines())):
            if line.startswith("ignore "):
                name, _, reason = line.removeprefix("ignore ").partition(" : ")
                if not reason.strip():
                    raise WeightMapError(f"{line!r}: expected 'ignore KEYS : REASON'.")
                ignored[name.strip()] = reason.strip()
                continue
            rules.append(Rule.parse(line))
        functions = dict(functions or {})
        for rule in rules:
            if rule.makes and rule.how.strip("{}") not in functions:
                known = f"there are {', '.join(functions)}" if functions else "none were given"
                name = rule.how.strip("{}")
                raise WeightMapError(
                    f"{rule}: no function {rule.how} was given; {known}. "
                    f"Pass it: WeightMap.parse(table, functions={{{name!r}: {name}}})."
                )
        return cls(tuple(rules), ignored, functions, sizes)

    # ---------------------------------------------------------------- parts of larger models

    def prefixed(self, upstream: str, canonical: str) -> WeightMap:
        """Return this table for models that hold upstream's and ours as parts: ``prefixed("trunk.", "vision.")``.

        Args:
            upstream: what upstream's names begin with in the larger model.
            canonical: what ours begin with there.
        """
        tag = re.sub(r"\W", "_", canonical).strip("_")

        def named(rule: Rule) -> Rule:
            sources = tuple(
                tuple(name if name in CONSTANTS else upstream + name for name in options) for options in rule.sources
            )
            how = f"{{{canonical}{rule.how[1:]}" if rule.makes else tagged(rule.how, self.sizes, tag)
            return Rule(sources, tuple(canonical + target for target in rule.targets), how)

        return WeightMap(
            tuple(named(rule) for rule in self.rules),
            {upstream + name: why for name, why in self.ignored.items()},
            {canonical + name: function for name, function in self.functions.items()},
            {tagged(name, [name], tag): size for name, size in self.sizes.items()},
        )

    def without(self, *targets: str) -> WeightMap:
        """Return this table without the rules that make these canonical tensors: ``without("head.{*}")``."""
        patterns = [pattern_of(target) for target in targets]
        kept = [
            rule
            for rule in self.rules
            if not any(pattern.fullmatch(name) for pattern in patterns for name in rule.targets)
        ]
        return replace(self, rules=tuple(kept))

    def __or__(self, other: WeightMap) -> WeightMap:
        """Return the table with the rules of both."""
        return WeightMap(
            self.rules + other.rules,
            {**self.ignored, **other.ignored},
            {**self.functions, **other.functions},
            {**self.sizes, **other.sizes},
        )

    # ---------------------------------------------------------------- forwards

    def forward(self, upstream: State, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Return the canonical tensors. They share upstream's storage wherever a rule does not have to copy.

        Args:
            upstream: every parameter and buffer of the upstream model.
            shapes: the shape of each canonical tensor.

        Raises:
            WeightMapError: a tensor on either side is not accounted for, or a shape is wrong.
        """
        chosen = list(self._choose(upstream, shapes))
        self._account(upstream, chosen)
        state: dict[str, Tensor] = {}
        for item in chosen:
            made = self._make(item, upstream, shapes)
            if not item.sources:  # it knows nothing of the model's dtype and device
                like = next((tensor for tensor in upstream.values() if tensor.is_floating_point()), None)
                made = {name: tensor if like is None else tensor.to(like) for name, tensor in made.items()}
            state.update(made)
        return {name: state[name] for name in shapes}

    def _choose(self, upstream: Iterable[str], targets: Collection[str]) -> Iterator[_Chosen]:
        present, wanted = set(upstream), set(targets)
        compiled = [(rule, [pattern_of(target) for target in rule.targets]) for rule in self.rules]
        seen: set[Rule] = set()
        unfilled: list[str] = []
        for name in targets:
            found = [
                rule.bind(match.groupdict())
                for rule, patterns in compiled
                for pattern in patterns
                if (match := pattern.fullmatch(name))
            ]
            if len(found) > 1:
                raise WeightMapError(f"{name} is made by {len(found)} rules: {'; '.join(map(str, found))}.")
            if not found:
                unfilled.append(f"{name} (no rule)")
                continue
            rule = found[0]
            if rule in seen:
                continue
            seen.add(rule)
            if not rule.sources and not rule.makes:  # a table written by code may join what this model has none of
                raise WeightMapError(f"{rule}: it makes {name} of nothing. Name the sources in the brackets.")
            if beyond := [target for target in rule.targets if target not in wanted]:
                raise WeightMapError(f"{rule} makes {_listed(beyond)}, which the canonical model does not have.")
            sources = [next((n for n in options if n in present or n in CONSTANTS), None) for options in rule.sources]
            if None in sources:
                lacking = [options[0] for options, got in zip(rule.sources, sources, strict=True) if got is None]
                unfilled.append(f"{name} (needs {', '.join(lacking)})")
                continue
            yield _Chosen(rule, tuple(name for name in sources if name is not None))
        if unfilled:
            advice = (
                "The upstream model lacks these tensors: is the checkpoint of this architecture? "
                "What it lacks by design is filled in the rule: 'SOURCE | zeros -> TARGET'."
            )
            if any(name.endswith("(no rule)") for name in unfilled):
                advice = "Add a rule that makes it to the weight map."
            raise WeightMapError(f"{len(unfilled)} canonical tensors cannot be filled: {_listed(unfilled)}. {advice}")

    def reason_to_ignore(self, name: str) -> str | None:
        """Return why an upstream tensor is left out, or None if it is not."""
        return next((why for pattern, why in self.ignored.items() if pattern_of(pattern).fullmatch(name)), None)

    def function_sources(self, upstream: Iterable[str]) -> set[str]:
        """Return the upstream tensors that go through a function, which cannot be run backwards."""
        patterns = [
            pattern_of(name) for rule in self.rules if rule.makes for options in rule.sources for name in options
        ]
        return {name for name in upstream if any(pattern.fullmatch(name) for pattern in patterns)}

    def _account(self, upstream: Iterable[str], chosen: Iterable[_Chosen]) -> None:
        used = {name for item in chosen for name in item.tensors}
        left = [name for name in upstream if name not in used and self.reason_to_ignore(name) is None]
        if left:
            raise WeightMapError(
                f"{len(left)} upstream tensors are neither mapped nor ignored: {_listed(left)}. "
                "Map each in the adapter's weight table, or ignore it there with a reason."
            )

    def _make(self, item: _Chosen, upstream: State, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        rule = item.rule
        wanted = [shapes[target] for target in rule.targets]
        like = next((upstream[name] for name in item.tensors), next(iter(upstream.values())))
        if rule.makes:
            joined = self._called(rule, [upstream[name] for name in item.tensors])
        else:
            parts = {name: rule.rearrange(upstream[name], self.sizes) for name in item.tensors}
            rows = sum(map(_rows, wanted)) - sum(_rows(part.shape) for part in parts.values())
            tail = wanted[0][1:]
            if rows < 0 or (len(item.sources) > 1 and any(part.shape[1:] != tail for part in parts.values())):
                came = {source: list(part.shape) for source, part in parts.items()}
                raise WeightMapError(f"{rule}: {came} cannot be joined into {[list(shape) for shape in wanted]}.")
            pieces = [
                parts[name] if name in parts else CONSTANTS[name](rows, *tail, dtype=like.dtype, device=like.device)
                for name in item.sources
            ]
            joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        lengths = [_rows(shape) for shape in wanted]
        if len(wanted) > 1 and joined.shape[0] != sum(lengths):
            raise WeightMapError(f"{rule}: {joined.shape[0]} rows cannot be split into {lengths}.")
        outcome = dict(zip(rule.targets, torch.split(joined, lengths) if len(wanted) > 1 else [joined], strict=True))
        for name, tensor in outcome.items():
            if tensor.shape != shapes[name]:
                came = {source: list(upstream[source].shape) for source in item.tensors}
                raise WeightMapError(
                    f"{name}: expected shape {list(shapes[name])}, got {list(tensor.shape)} from {came} by '{rule}'."
                )
        return outcome

    def _called(self, rule: Rule, sources: list[Tensor]) -> Tensor:
        function = self.functions[rule.how.strip("{}")]
        with blamed(f"{rule}: {rule.how}", WeightMapError, getattr(function, "__module__", "")):
            made = cast("object", function(*sources))
        if not isinstance(made, Tensor):
            raise WeightMapError(f"{rule}: {rule.how} returned {type(made).__name__}; expected a tensor.")
        return made

    # ---------------------------------------------------------------- backwards

    def backward(self, canonical: State, upstream: State) -> dict[str, Tensor]:
        """Return upstream tensors that hold the canonical numbers.

        Args:
            canonical: the canonical tensors.
            upstream: the tensors the map was run forwards on: they give names and shapes, and stand for themselves
                where a rule cannot be inverted or upstream's tensor is ignored.

        Raises:
            WeightMapError: the canonical tensors were changed where upstream has nothing to hold the change.
        """
        shapes = {name: tensor.shape for name, tensor in canonical.items()}
        state: dict[str, Tensor] = {}
        for item in self._choose(upstream, canonical):
            for name, tensor in self._unmake(item, canonical, upstream, shapes).items():
                if name in state and not torch.equal(state[name], tensor):
                    raise WeightMapError(
                        f"{name} makes several canonical tensors, and they were changed differently: "
                        "upstream has one tensor for them and cannot hold the change."
                    )
                state[name] = tensor
        for name, tensor in upstream.items():
            state.setdefault(name, tensor)
        return {name: state[name] for name in upstream}

    def _unmake(
        self, item: _Chosen, canonical: State, upstream: State, shapes: Mapping[str, torch.Size]
    ) -> dict[str, Tensor]:
        rule = item.rule
        if rule.makes:
            for name, tensor in self._make(item, upstream, shapes).items():
                if not torch.equal(tensor.to(canonical[name]), canonical[name]):
                    raise WeightMapError(f"{name} was changed, and '{rule}' cannot be run backwards.")
            return {name: upstream[name] for name in item.tensors}
        parts = [canonical[name] for name in rule.targets]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        rows = {
            name: _rows(rule.rearrange(torch.empty(upstream[name].shape, device="meta"), self.sizes).shape)
            for name in item.tensors
        }
        rest = joined.shape[0] - sum(rows.values()) if joined.ndim else 0
        lengths = [rows.get(name, rest) for name in item.sources]
        pieces = torch.split(joined, lengths) if len(lengths) > 1 else [joined]
        state: dict[str, Tensor] = {}
        for name, piece in zip(item.sources, pieces, strict=True):
            if name in CONSTANTS:
                if not torch.equal(piece, CONSTANTS[name](piece.shape, dtype=piece.dtype, device=piece.device)):
                    raise WeightMapError(
                        f"{', '.join(rule.targets)} was changed where upstream has no tensor (it stands for {name})."
                    )
            else:
                state[name] = rule.rearrange(piece, self.sizes, back=True).reshape(upstream[name].shape)
        return state

    # ---------------------------------------------------------------- gradients

    def pull_back(self, upstream: State, gradients: State) -> dict[str, Tensor]:
        """Return the gradients by upstream's tensors of a loss with these gradients by the canonical ones."""
        leaves = {
            name: tensor.detach().clone().requires_grad_(tensor.is_floating_point())
            for name, tensor in upstream.items()
        }
        made = self.forward(leaves, {name: tensor.shape for name, tensor in gradients.items()})
        names = [name for name in gradients if made[name].requires_grad]
        inputs = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        found = torch.autograd.grad(
            [made[name] for name in names],
            list(inputs.values()),
            [gradients[name].to(made[name]) for name in names],
            allow_unused=True,
        )
        grads = zip(inputs, cast("tuple[Tensor | None, ...]", found), strict=True)
        return {name: grad for name, grad in grads if grad is not None}


def _rows(shape: torch.Size) -> int:
    return shape[0] if shape else 1


def _listed(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass
class Origin:
    """The upstream model that a model was adapted from, as ``export`` needs it.

    Attributes:
        kind: its qualified class name.
        map: its weight map.
        upstream: upstream's tensors by name; without data where the weight map can make them again.
        persistent: the names in upstream's state dict.
    """

    kind: str
    map: WeightMap = field(repr=False)
    upstream: dict[str, Tensor] = field(repr=False)
    persistent: list[str] = field(repr=False)
