"""A move of one field, or of several at once, judged: the numbers are upstream's, or the model is refused."""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from prisma_conformance import tolerances
from prisma_conformance.measure import worst
from prisma_conformance.randomise import randomise
from torch import Tensor, nn

from prisma_core.contract.adapter import Adapter
from prisma_core.contract.case import Case
from prisma_core.errors import UnsupportedArchitecture
from prisma_core.host import installed
from prisma_core.toolbox.attention import float64_softmax
from prisma_core.zoo import adapt_with

from .hf_fields import ACT2FN, UNDECLARED, Config, Move, configurations, moved, names, recording, values

# -------------------------------------------------------------------- one move


def drawn(upstream: nn.Module) -> nn.Module:
    """Return a model in float64 with every parameter drawn, and every eps as it was built."""
    built = [(vars(part), vars(part)["eps"]) for part in upstream.modules() if isinstance(vars(part).get("eps"), float)]
    randomise(upstream.double(), torch.Generator().manual_seed(0))
    for attributes, eps in built:
        attributes["eps"] = eps
    return upstream.eval()


class Verdict(NamedTuple):
    """The outcome of a move, the reason, and whether upstream\'s output changed."""

    kind: str
    why: str = ""
    mattered: bool = True


@dataclass
class Model:
    """A case as it is, to compare with."""

    case: Case
    upstream: nn.Module = field(init=False)
    adapter: Adapter = field(init=False)
    inputs: tuple[Tensor, ...] = field(init=False)
    output: Tensor = field(init=False)
    reads: dict[Config, dict[str, None]] = field(default_factory=dict)  # by anything
    late_reads: dict[Config, dict[str, None]] = field(default_factory=dict)  # once it is built

    def __post_init__(self) -> None:
        with recording(self.reads):
            self.upstream = drawn(self.case.build())
        self.adapter = installed().adapter(self.upstream)
        with recording(self.late_reads):
            self.inputs = sample(adapt_with(self.adapter, self.upstream))
            self.output = self.forward(self.adapter, self.upstream, self.inputs)
        for kind, late in self.late_reads.items():
            self.reads.setdefault(kind, {}).update(late)

    def forward(self, adapter: Adapter, upstream: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        call: Callable[..., Tensor] = self.case.forward or adapter.call
        with float64_softmax():  # upstream's explicit attention alone rounds scores to float32
            return call(upstream, *inputs)

    def built(self, moves: Sequence[Move]) -> nn.Module:
        """Return the model with fields of its configurations moved before it is built."""
        with moved(moves):
            return drawn(self.case.build())

    def changed(self, moves: Sequence[Move]) -> nn.Module:
        """Return the model as it is, with fields of its configurations changed since it was built."""
        upstream = copy.deepcopy(self.upstream)
        for kind, name, value in moves:
            for config in configurations(upstream)[kind]:
                setattr(config, {"attn_implementation": "_attn_implementation"}.get(name, name), value)
        return upstream

    def judge(self, moves: Sequence[Move], *, late: bool) -> Verdict:
        """Compare with upstream as the moves make it."""
        try:
            upstream = self.changed(moves) if late else self.built(moves)
            adapter = installed().adapter(upstream)
        except UnsupportedArchitecture as refused:
            return Verdict("refused", refused.feature)
        except Exception as error:  # noqa: BLE001  # upstream's own, of any type
            return Verdict("upstream fails", str(error))
        broken = ""
        try:
            output = self.forward(adapter, upstream, self.inputs)
        except Exception as error:  # noqa: BLE001
            output, broken = None, f"{type(error).__name__}: {error}"
        mattered = output is None or output.shape != self.output.shape or not torch.equal(output, self.output)
        try:
            model = adapt_with(adapter, upstream)
            inputs = sample(model)
            theirs = self.forward(adapter, upstream, inputs)
            with float64_softmax():  # a mapped model is upstream's own code
                error = worst(model(*inputs), theirs)
        except UnsupportedArchitecture as refused:
            return Verdict("refused", refused.feature, mattered)
        except Exception as error:  # noqa: BLE001  # it may be ours, and then it is of the wrong type
            if broken:
                return Verdict("upstream fails", broken)
            return Verdict("defect", f"{type(error).__name__}: {error}", mattered)
        if theirs.numel() > 1 and not float(theirs.std()) > 0:
            return Verdict("upstream fails", "its output is constant or NaN")
        if not error <= tolerances.FLOAT64:
            return Verdict("defect", f"logits differ by {error:.1e} of their standard deviation", mattered)
        return Verdict("agrees", mattered=mattered)


def sample(model: Any) -> tuple[Tensor, ...]:
    """Return inputs of a model's native size, in float64."""
    inputs = model.sample_inputs(2, size=model.sizes()[0], generator=torch.Generator().manual_seed(1))
    return tuple(one.double() if one.is_floating_point() else one for one in inputs)


# -------------------------------------------------------------------- the sweep


PLUGINS = {"hf", "clip", "dino", "vivit"}
TRIES = 3  # values given to a field before it is said that upstream takes no other


# Fields that likely change nothing: moved at once, and one by one only where that shows something.
QUIET = re.compile("drop|init|output|pooler|encoder_decoder|chunk|tie_|problem|gradient|logit_scale")


def of_transformers(plugin: str, case: Case) -> bool:
    """Return whether a case is of a model that a configuration of transformers' makes."""
    if plugin == "clip":
        return case.name.startswith("hf/") or case.name.endswith("/whole")
    return not case.name.startswith("meta_")


EVERY = {f"{plugin}-{case.name}": case for case, plugin in installed().cases(PLUGINS) if of_transformers(plugin, case)}
# Of each class the first: those of further variants are named after it.
VARIANT = r"[. (]|-(ViT-|argmax|tokens)|_(swiglu|no_|tokens|gated|every)"
FIRST = {re.split(VARIANT, name)[0]: name for name in reversed(EVERY)}
for _again in ("clip-xlm-roberta-large", "clip-coca_roberta"):  # of the same classes
    FIRST.pop(_again, None)


@cache
def made_of(name: str) -> tuple[Config, type[Adapter]]:
    """Return the classes of a model\'s configuration and of its adapter: heads on one encoder share both."""
    upstream = EVERY[FIRST[name]].build()
    return type(getattr(upstream, "config", None)), type(installed().adapter(upstream))


def known_of(name: str) -> dict[Config, dict[str, None]]:
    """Return the fields that are swept on the first model with this configuration and adapter; none for that model."""
    first = next(other for other in FIRST if made_of(other) == made_of(name))
    shared = first != name and made_of(name)[0] is not type(None)
    return Model(EVERY[FIRST[first]]).reads if shared else {}


def moves(
    model: Model, *, every: bool, known: Mapping[Config, Mapping[str, None]]
) -> Iterator[tuple[bool, list[Move]]]:
    """Yield moves of each field: whether they come late, and the moves, the likeliest to be valid first."""
    modules = {type(part).__module__ for part in model.upstream.modules()}
    code = "\n".join(inspect.getsource(sys.modules[name]) for name in modules if name.startswith("transformers."))
    whole = type(getattr(model.upstream, "config", None))
    for kind, instances in configurations(model.upstream).items():
        if not every and kind is not whole and whole is not type(None):  # a tower's is swept on the tower
            continue
        for reads, late in ((model.reads, False), (model.late_reads, True)):
            for name in names(kind, instances[0], reads.get(kind, {}), code):
                if name in known.get(kind, {}):
                    continue
                others = list(values(kind, name, getattr(instances[0], name, None), code))
                if every or not late or name not in UNDECLARED:
                    yield late, [(kind, name, value) for value in (others if every else others[:TRIES])]


def swept(
    model: Model, *, every: bool, known: Mapping[Config, Mapping[str, None]]
) -> Iterator[tuple[bool, Move, Verdict]]:
    """Yield each move with its verdict: whether it came late, the move, the verdict.

    Args:
        known: fields to leave out.
    """
    quiet: dict[bool, list[Move]] = {False: [], True: []}
    loud: list[tuple[bool, list[Move]]] = []
    for late, several in moves(model, every=every, known=known):
        name = several[0][1] if several else ""
        if not every and name != "is_causal" and (late or QUIET.search(name)):
            quiet[late].append(several[0])
        else:
            loud.append((late, several))
    for late, several in quiet.items():
        together = model.judge(several, late=late) if several else None
        if together == Verdict("agrees", mattered=False):
            yield from ((late, move, together) for move in several)
        else:
            loud += [(late, [move]) for move in several]
    for late, several in loud:
        for move in several:
            verdict = model.judge([move], late=late)
            yield late, move, verdict
            words = isinstance(move[2], str) and move[2] not in ACT2FN
            if not every and not words and verdict.kind != "upstream fails":
                break


def counted(verdicts: Sequence[tuple[bool, Move, Verdict]]) -> dict[str, int]:
    """Return the number of moves by verdict, and by field those refused and those that upstream cannot follow."""
    kinds = Counter(verdict.kind for _, _, verdict in verdicts)
    listed = Counter(
        f"  {verdict.kind}: {kind.__name__}.{name}"
        + (f": {re.sub(r'[0-9]+', 'N', verdict.why.partition(' (')[0])}" if verdict.kind == "refused" else "")
        for _, (kind, name, _), verdict in verdicts
        if verdict.kind in ("refused", "upstream fails")
    )
    return {
        "classes": 1,
        "fields of their configurations": len({(kind, name) for _, (kind, name, _), _ in verdicts}),
        "of them that change upstream's logits": len(effects(verdicts)),
        "moves": len(verdicts),
        "agree with upstream": kinds["agrees"],
        "are refused in words": kinds["refused"],
        "are none that upstream can be made or run with": kinds["upstream fails"],
        **listed,
    }


def effects(verdicts: Sequence[tuple[bool, Move, Verdict]]) -> set[tuple[Config, str]]:
    """Return the fields that upstream's output depends on."""
    ran = [(move, verdict) for _, move, verdict in verdicts if verdict.kind != "upstream fails"]
    return {(kind, name) for (kind, name, _), verdict in ran if verdict.mattered}
