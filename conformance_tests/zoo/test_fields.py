"""Every field of every configuration of transformers', moved by itself: followed, refused in words, or of no effect.

Facts are read off built modules, and the audit leaves their ``config`` out. This is what stands in for it: whatever a
configuration says, the numbers are upstream's or there are none. ``--every-field`` tries every value on every case.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, NamedTuple, get_args

import pytest
import torch
from prisma_conformance import check, tolerances
from prisma_conformance.measure import worst
from prisma_conformance.pytest import COUNTS
from prisma_conformance.randomise import randomise
from torch import Tensor, nn

from prisma_core.errors import UnsupportedArchitecture
from prisma_core.plugin.adapter import Adapter
from prisma_core.plugin.case import Case
from prisma_core.plugin.host import installed
from prisma_core.toolbox.attention import float64_softmax
from prisma_core.zoo import adapt, adapt_with

transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'prisma-interp[hf]'")

from transformers import PreTrainedConfig  # noqa: E402
from transformers.activations import ACT2FN  # noqa: E402

Config = type[PreTrainedConfig]
Move = tuple[Config, str, Any]  # a class of configurations, a field of it, and its new value
# What configurations take without declaring it.
UNDECLARED = ("num_labels", "attn_implementation")
APART = {
    "transformers_version": "of the file",
    "architectures": "of the file",
    "label2id": "id2label, the other way round",
    "dtype": "of the weights, which every test gives itself",
    "return_dict": "how outputs are handed over, not what they are",
}


# -------------------------------------------------------------------- moving a field


@contextmanager
def moved(moves: Sequence[Move]) -> Iterator[None]:
    """Give fields these values in every configuration that is made in the scope."""
    changes: dict[Config, dict[str, Any]] = {}
    for kind, name, value in moves:
        changes.setdefault(kind, {})[name] = value
    with ExitStack() as stack:
        for kind, given in changes.items():
            stack.enter_context(_given(kind, given))
        yield


@contextmanager
def _given(kind: Config, changes: Mapping[str, Any]) -> Iterator[None]:
    own, init = vars(kind).get("__init__"), kind.__init__

    def made(self: Any, *args: Any, **given: Any) -> None:
        init(self, *args, **{**given, **changes})

    kind.__init__ = made
    try:
        yield
    finally:
        if own is None:
            del kind.__init__
        else:
            kind.__init__ = own


@contextmanager
def watched(asked: dict[Config, dict[str, None]]) -> Iterator[None]:
    """Write down what is asked of configurations, whether they have it or not."""
    before = PreTrainedConfig.__getattribute__

    def get(self: Any, name: str) -> Any:
        asked.setdefault(type(self), {})[name.removeprefix("_")] = None
        return before(self, name)

    PreTrainedConfig.__getattribute__ = get
    try:
        yield
    finally:
        PreTrainedConfig.__getattribute__ = before


def configurations(upstream: nn.Module) -> dict[Config, list[Any]]:
    """Return the configurations in a model, those inside others too."""
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for inner in vars(config).values():
                add(inner)

    for module in upstream.modules():
        add(getattr(module, "config", None))
    return {kind: [one for one in found.values() if type(one) is kind] for kind in map(type, found.values())}


def names(kind: Config, config: Any, asked: Mapping[str, None], code: str) -> Iterator[str]:
    """Yield the fields of a configuration that something reads, by the names under which they are given.

    Args:
        code: where undeclared ones have to be named too; there are many that the library asks for in general.
    """
    declared = {one.name.removeprefix("_") for one in fields(kind)}
    found = [name for name in asked if name in declared or re.search(rf"\b{name}\b", code)]
    for name in (*found, *(name for name in UNDECLARED if name not in found)):
        # What all classes share beside fields is methods, and how they are saved.
        shared = hasattr(PreTrainedConfig, name) and name not in declared and name not in UNDECLARED
        value = getattr(config, name, None)
        if not (shared or name in APART or callable(value) or isinstance(value, PreTrainedConfig)):
            yield name


def values(kind: Config, name: str, value: Any, code: str) -> Iterator[Any]:
    """Yield other values for a field, the likeliest to be valid first."""
    hint = next((one.type for one in fields(kind) if one.name.removeprefix("_") == name), None)
    seen = [value]
    for other in _values(name, value, hint, code):
        if not any(type(other) is type(one) and other == one for one in seen):
            seen.append(other)
            yield other


def _values(name: str, value: Any, hint: Any, code: str) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (2 * value, value + 1, 1, value // 2, 0)
        yield from ([value, 2 * value], (value, value)) if "list" in str(hint) else ()
    elif isinstance(value, float):
        yield from (2 * value + 0.05, 0.0)
    elif isinstance(value, str):
        yield from ACTIVATIONS if value in ACT2FN else _words(name, hint, code)
    elif isinstance(value, dict):
        yield from ({i: str(i) for i in range(len(value) + 2)},) if name == "id2label" else _inside(value, code)
    elif isinstance(value, list | tuple):
        kind = type(value)
        if value and all(isinstance(one, int | float) for one in value):
            yield from (kind(2 * one for one in value), value[0])
        yield from (kind(reversed(value)), kind(value[:1]), kind([]))
        yield from (["stage1"], ["stem"], ["stem", "stage2"]) if "features" in name else ()
    if name == "attn_implementation":
        yield from ("eager", "sdpa")
    elif value is None:
        yield from _instead_of_nothing(name, hint, code)
    elif "None" in str(hint):
        yield None


ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh", "relu", "silu", "hardswish", "gelu_10", "prelu")


def _inside(value: dict[Any, Any], code: str) -> Iterator[dict[Any, Any]]:
    for key, one in value.items():
        yield from ({**value, key: other} for other in _values(str(key), one, None, code))


def _instead_of_nothing(name: str, hint: Any, code: str) -> Iterator[Any]:
    kinds = str(hint)
    yield from _words(name, hint, code) if "str" in kinds or "Literal" in kinds else ()
    yield from (True,) if "bool" in kinds or hint is None else ()
    yield from (2, 1) if "int" in kinds else ()
    yield from (0.5,) if "float" in kinds else ()
    yield from ([0], [0, 1], [1, 2]) if "list" in kinds else ()


def _words(name: str, hint: Any, code: str) -> list[str]:
    """Return the words that upstream's code has in lines about a field, or its type lists."""
    lines = [line for line in code.splitlines() if re.search(rf"\b{name}\b", line)]
    found = [word for line in lines for word in re.findall(r"[\"']([\w/-]+)[\"']", line)]
    tables = [word for line in lines for word in re.findall(rf"(\w+)\[(?:self\.)?config\.{name}\]", line)]
    for table in tables:
        found += re.findall(r"[\"'](\w+)[\"']:", code.partition(f"\n{table} = {{")[2].partition("}")[0])
    return [*(word for word in get_args(hint) if isinstance(word, str)), *(word for word in found if word != name)]


# -------------------------------------------------------------------- one move


def drawn(upstream: nn.Module) -> nn.Module:
    """Return a model in float64 with every parameter drawn, and every eps as it was built."""
    built = [(vars(part), vars(part)["eps"]) for part in upstream.modules() if isinstance(vars(part).get("eps"), float)]
    randomise(upstream, torch.Generator().manual_seed(0))
    for own, eps in built:
        own["eps"] = eps
    return upstream.eval().double()


class Verdict(NamedTuple):
    """What came of a move, why, and whether upstream's output is another one."""

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
    asked: dict[Config, dict[str, None]] = field(default_factory=dict)  # by anything
    asked_late: dict[Config, dict[str, None]] = field(default_factory=dict)  # once it is built

    def __post_init__(self) -> None:
        with watched(self.asked):
            self.upstream = drawn(self.case.build())
        self.adapter = installed().adapter(self.upstream)
        with watched(self.asked_late):
            self.inputs = sample(adapt_with(self.adapter, self.upstream))
            self.output = self.forward(self.adapter, self.upstream, self.inputs)
        for kind, late in self.asked_late.items():
            self.asked.setdefault(kind, {}).update(late)

    def forward(self, adapter: Adapter, upstream: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        call: Callable[..., Tensor] = self.case.forward or adapter.call
        with float64_softmax():  # upstream's explicit attention alone rounds scores to float32
            return call(upstream, *inputs)

    def built(self, moves: Sequence[Move]) -> nn.Module:
        """Return the model with fields of its configurations moved before it is built."""
        with moved(moves):
            return drawn(self.case.build())

    def told(self, moves: Sequence[Move]) -> nn.Module:
        """Return the model as it is, with fields of its configurations changed since it was built."""
        upstream = copy.deepcopy(self.upstream)
        for kind, name, value in moves:
            for config in configurations(upstream)[kind]:
                setattr(config, {"attn_implementation": "_attn_implementation"}.get(name, name), value)
        return upstream

    def judge(self, moves: Sequence[Move], *, late: bool) -> Verdict:
        """Compare with upstream as the moves make it."""
        try:
            upstream = self.told(moves) if late else self.built(moves)
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
    given = model.sample_inputs(2, size=model.sizes()[0], generator=torch.Generator().manual_seed(1))
    return tuple(one.double() if one.is_floating_point() else one for one in given)


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
    """Return what a model's configuration is, and what adapts the model: heads on one encoder share both."""
    upstream = EVERY[FIRST[name]].build()
    return type(getattr(upstream, "config", None)), type(installed().adapter(upstream))


def known_of(name: str) -> dict[Config, dict[str, None]]:
    """Return the fields that are swept on the first model with this configuration and adapter; none for that model."""
    first = next(other for other in FIRST if made_of(other) == made_of(name))
    shared = first != name and made_of(name)[0] is not type(None)
    return Model(EVERY[FIRST[first]]).asked if shared else {}


def moves(
    model: Model, *, every: bool, known: Mapping[Config, Mapping[str, None]]
) -> Iterator[tuple[bool, list[Move]]]:
    """Yield moves of each field: whether they come late, and the moves, the likeliest to be valid first."""
    modules = {type(part).__module__ for part in model.upstream.modules()}
    code = "\n".join(inspect.getsource(sys.modules[name]) for name in modules if name.startswith("transformers."))
    own = type(getattr(model.upstream, "config", None))
    for kind, found in configurations(model.upstream).items():
        if not every and kind is not own and own is not type(None):  # a tower's is swept on the tower
            continue
        for asked, late in ((model.asked, False), (model.asked_late, True)):
            for name in names(kind, found[0], asked.get(kind, {}), code):
                if name in known.get(kind, {}):
                    continue
                given = list(values(kind, name, getattr(found[0], name, None), code))
                if every or not late or name not in UNDECLARED:
                    yield late, [(kind, name, value) for value in (given if every else given[:TRIES])]


def swept(
    model: Model, *, every: bool, known: Mapping[Config, Mapping[str, None]]
) -> Iterator[tuple[bool, Move, Verdict]]:
    """Yield what came of each move: whether it came late, the move, the verdict.

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


def counted(found: Sequence[tuple[bool, Move, Verdict]]) -> dict[str, int]:
    """Return how many moves came to what, those that are refused and those that upstream cannot follow by field."""
    kinds = Counter(verdict.kind for _, _, verdict in found)
    listed = Counter(
        f"  {verdict.kind}: {kind.__name__}.{name}"
        + (f": {re.sub(r'[0-9]+', 'N', verdict.why.partition(' (')[0])}" if verdict.kind == "refused" else "")
        for _, (kind, name, _), verdict in found
        if verdict.kind in ("refused", "upstream fails")
    )
    return {
        "classes": 1,
        "fields of their configurations": len({(kind, name) for _, (kind, name, _), _ in found}),
        "of them that change upstream's logits": len(effects(found)),
        "moves": len(found),
        "agree with upstream": kinds["agrees"],
        "are refused in words": kinds["refused"],
        "are none that upstream can be made or run with": kinds["upstream fails"],
        **listed,
    }


def effects(found: Sequence[tuple[bool, Move, Verdict]]) -> set[tuple[Config, str]]:
    """Return the fields that upstream's output depends on."""
    ran = [(move, verdict) for _, move, verdict in found if verdict.kind != "upstream fails"]
    return {(kind, name) for (kind, name, _), verdict in ran if verdict.mattered}


@pytest.mark.parametrize("name", FIRST)
@torch.no_grad()
def test_every_field_is_followed_refused_or_without_effect(
    name: str, record_property: Callable[[str, object], None], request: pytest.FixtureRequest
) -> None:
    every = bool(request.config.getoption("--every-field"))
    cases = (
        [case for full, case in EVERY.items() if re.split(VARIANT, full)[0] == name] if every else [EVERY[FIRST[name]]]
    )
    for case in cases:
        known = {} if every else known_of(name)
        found = list(swept(Model(case), every=every, known=known))
        defects = [
            f"{kind.__name__}.{field} = {value!r}, {'changed since' if late else 'before'} it was built: {verdict.why}"
            for late, (kind, field, value), verdict in found
            if verdict.kind == "defect"
        ]
        assert not defects, "\n".join(defects)
        # Where nothing changes nothing is proven. Whole models have a scale and projections beside towers.
        towers = len(configurations(case.build())) > 1 and not every
        assert len(effects(found)) >= (0 if known else 1 if towers else 7), effects(found)
        record_property(COUNTS, json.dumps(["fields of transformers' configurations", counted(found)]))


# -------------------------------------------------------------------- what the sweep found


def built(name: str, **given: Any) -> Any:
    """Return a case's model with fields of its configuration moved."""
    case = EVERY[name]
    kind = type(getattr(case.build(), "config", None))
    with moved([(kind, field, value) for field, value in given.items()]):
        return case.build().eval()


@pytest.mark.parametrize(
    "name",
    [
        "hf-ViTModel",
        "hf-ViTMAEForPreTraining",
        "dino-dinov2",
        "dino-dinov3",
        "vivit-VivitModel",
        "clip-hf/CLIPVisionModel",
    ],
)
def test_attention_turned_causal_by_a_configuration_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"config\.is_causal=True"):
        adapt(built(name, is_causal=True))
    upstream = built(name)
    adapt(upstream)
    for part in upstream.modules():
        if hasattr(part, "is_causal"):
            part.is_causal = True
    with pytest.raises(UnsupportedArchitecture, match="causal attention"):
        adapt(upstream)


def test_an_mlp_told_to_take_some_tokens_after_others_is_read_whole() -> None:
    upstream = built("clip-roberta-ViT-B-32/whole")
    told = [part for part in upstream.modules() if hasattr(part, "chunk_size_feed_forward")]
    for part in told:
        part.chunk_size_feed_forward = 1
    report = check(upstream, checks="parity.hooks")
    assert report.passed, str(report)
    assert {part.chunk_size_feed_forward for part in told} == {1}


def test_a_norm_over_all_heads_is_one_where_there_is_one_head() -> None:
    upstream = built("hf-QianfanOCRVisionModel.rms", num_attention_heads=1)
    report = check(upstream, checks="parity.hooks")
    assert report.passed, str(report)


def test_texts_that_a_configuration_stops_masking_are_refused() -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"config\.is_causal=False"):
        adapt(built("clip-hf/CLIPTextModel", is_causal=False))


def test_a_backbone_that_ends_early_is_refused() -> None:
    with pytest.raises(UnsupportedArchitecture, match="not the last block's"):
        adapt(built("hf-VitPoseBackbone", out_features=["stage1"]))


@pytest.mark.parametrize("given", [{"num_hidden_layers": 0}, {"layer_norm_eps": 0.0}, {"layer_norm_eps": -1e-5}])
@pytest.mark.parametrize("name", ["hf-ViTModel", "dino-dinov2", "clip-hf/CLIPTextModel"])
def test_facts_that_no_spec_can_hold_are_refused_in_words(name: str, given: dict[str, float]) -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"no spec can hold|no blocks"):
        adapt(built(name, **given))


def test_a_masked_autoencoder_s_encoder_is_that_of_all_patches_whatever_it_is_to_hide() -> None:
    upstream = built("hf-ViTMAEModel", mask_ratio=0.5).double()
    model = adapt(upstream)
    (image,) = sample(model)
    seen = installed().adapter(upstream).call(upstream, image)
    assert worst(model(image), seen) < tolerances.FLOAT64
    assert upstream.config.mask_ratio == 0.5


def test_sizes_on_offer_are_whole_patches_where_the_native_one_is_not() -> None:
    upstream = built("hf-ViTModel", image_size=25).double()
    model = adapt(upstream)
    sizes = model.sizes()
    assert sizes[0] == (25, 25)
    assert len(sizes) > 1
    for size in sizes:
        (image,) = model.sample_inputs(2, size=size)
        theirs = installed().adapter(upstream).call(upstream, image.double())
        assert worst(model(image.double()), theirs) < tolerances.FLOAT64


@pytest.mark.parametrize(
    ("name", "changed", "words"),
    [
        ("hf-Aimv2VisionModel", {"is_native": True}, "positions made for each picture"),
        ("hf-Idefics2VisionTransformer", {"patch_size": 4}, "by which patches are looked up"),
        ("dino-dinov3", {"image_size": 40}, "another grid"),
        ("clip-roberta-ViT-B-32/whole", {"pad_token_id": 3}, "pad_token_id"),
        ("clip-roberta-ViT-B-32/whole", {"is_decoder": True}, "is_decoder"),
    ],
)
def test_configurations_that_were_changed_since_are_refused(name: str, changed: dict[str, Any], words: str) -> None:
    upstream = EVERY[name].build()
    (several,) = configurations(upstream).values()
    for config in several:
        for attribute, value in changed.items():
            setattr(config, attribute, value)
    with pytest.raises(UnsupportedArchitecture, match=words):
        adapt(upstream)


@pytest.mark.parametrize("name", ["vivit-VivitModel", "vivit-VideoMAEModel"])
def test_frames_are_counted_on_the_module(name: str) -> None:
    upstream = built(name)
    frames = upstream.config.num_frames
    upstream.config.num_frames *= 2
    assert adapt(upstream).spec.n_frames == frames


def test_heads_of_an_odd_number_of_channels_cannot_turn_in_pairs() -> None:
    with pytest.raises(UnsupportedArchitecture, match="odd number of channels"):
        adapt(built("vivit-VJEPA2Model", num_attention_heads=6))


def test_a_model_without_a_class_token_is_one() -> None:
    upstream = built("hf-PixioModel", n_cls_tokens=0).double()
    model = adapt(upstream)
    (image,) = sample(model)
    assert model.layout.n_prefix == 0
    assert worst(model(image), upstream(image).last_hidden_state) < tolerances.FLOAT64
