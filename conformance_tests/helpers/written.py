"""Files that Prisma wrote, with one fact of their JSON changed: the same thing comes back, or one sentence."""

from __future__ import annotations

import copy
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import prisma_harvest
import prisma_sae
import torch
from coders import D_IN, D_SAE, standard
from models import VARIANTS, build
from prisma_lens import TunedLens
from prisma_patch import Circuit
from prisma_patch.graph import Shape
from prisma_sae import CoderFacts, SparseCoder
from prisma_toy import Words
from safetensors.torch import load_file, save_file

import prisma_core as prisma
from prisma_core import ActivationCache, PluginError, PrismaError, Result
from prisma_core.inputs import Preprocess

GONE = object()
SECONDS = 10  # no case takes one where the machine is idle
Path_ = tuple[Any, ...]


class Edit(NamedTuple):
    """One change of a JSON text: what stands at a path, or nothing, becomes something else."""

    at: Path_
    what: str
    value: Any

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.at))}: {self.what}"

    def of(self, whole: Any) -> Any:
        """Return the edited value; the whole one stays as it is."""
        if not self.at:
            return self.value
        whole = copy.deepcopy(whole)
        place = whole
        for key in self.at[:-1]:
            place = place[key]
        if self.value is GONE:
            del place[self.at[-1]]
        else:
            place[self.at[-1]] = self.value
        return whole


NESTED: Any = []
for _ in range(400):
    NESTED = [NESTED]
VALUES: dict[str, Any] = {
    "gone": GONE,
    "null": None,
    "true": True,
    "false": False,
    "nan": float("nan"),
    "inf": float("inf"),
    "minus inf": -float("inf"),
    "zero": 0,
    "minus one": -1,
    "minus zero": -0.0,
    "half": 0.5,
    "billion": 10**9,
    "beyond 64 bits": 10**30,
    "beyond floats": 10**400,
    "tiny": 1e-320,
    "empty text": "",
    "text": "x",
    "digit": "1",
    "path": "../../../etc/passwd",
    "surrogate": "\ud800",
    "10 MB": "a" * 10**7,
    "empty list": [],
    "list of it": [[]],
    "empty object": {},
    "object": {"x": 1},
    "nested": NESTED,
}


def nodes(value: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Yield the path to everything in a JSON value, itself first; of long lists and tables, the first three alone."""
    yield at
    steps = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    alike = len(steps) > (12 if isinstance(value, list) else 30)
    for key, inner in steps[:3] if alike else steps:
        yield from nodes(inner, (*at, key))


def edits(whole: Any) -> Iterator[Edit]:
    """Yield every change of every value by each of ``VALUES``, and those that keep its type."""
    for at in nodes(whole):
        value = whole
        for key in at:
            value = value[key]
        own: dict[str, Any] = {}
        if isinstance(value, list):
            own = {"one less": value[:-1], "twice": value + value, "turned": value[::-1], "many": value * 1000}
        elif isinstance(value, dict):
            own = {"one more": {**value, "unheard of": 1}, "a name less": dict(list(value.items())[1:])}
        elif isinstance(value, bool):
            own = {"not": not value}
        elif isinstance(value, int | float):
            own = {"minus": -value, "one more": value + 1, "a bit more": value * 1.01, "as text": str(value)}
        elif isinstance(value, str):
            own = {
                "longer": value + "x",
                "shorter": value[:-1],
                "other case": value.swapcase(),
                "NUL": value + "\0",
            }
        for what, other in {**VALUES, **own}.items():
            if (at or other is not GONE) and not same_json(value, other):
                yield Edit(at, what, other)


def same_json(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


class Subject(NamedTuple):
    """Something that Prisma writes.

    Attributes:
        write: writes it into a folder, and returns the file with the facts.
        read: reads it, uses it, and returns what it computes, to be compared.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]


IMAGE = torch.linspace(0, 1, 30 * 20 * 3).view(20, 30, 3)


def used(folder: Path) -> Any:
    model: Any = prisma.load(f"file:{folder}")
    with torch.no_grad():
        outputs = model(*model.sample_inputs(generator=torch.Generator().manual_seed(0)))
    prepared = None if model.preprocess is None else model.preprocess([IMAGE] * 16)
    frozen = [name for name, each in model.named_parameters() if not each.requires_grad]
    read = getattr(model, "tokens", None)
    return [outputs, prepared, frozen, list(model.labels or ()), model.reference, read and read(["a cat"])]


def older(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """As it was written before there were digests of facts: what a stranger writes who knows them, too."""

    def without(folder: Path) -> Path:
        path = write(folder)
        facts = json.loads(path.read_text(encoding="utf-8"))
        facts.pop("facts_sha256", None)
        facts = {**facts, "weights": None} if "weights" in facts else facts
        path.write_text(json.dumps(facts), encoding="utf-8")
        return path

    return without


def vit(folder: Path, variant: str = "plain") -> Path:
    model = build(**VARIANTS[variant]).float()
    model.preprocess, model.reference = Preprocess(size=(8, 12)), "somewhere:else"
    model.embed.requires_grad_(False)
    prisma.save(model, folder)
    return folder / "spec.json"


def saved(reference: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        prisma.save(prisma.load(reference), folder)
        return folder / "spec.json"

    return write


def processed(folder: Path) -> Path:
    """A model whose preprocessing is an image processor of transformers, in a file beside its weights."""
    from prisma_hf.processors import Processed
    from transformers import ViTImageProcessor

    model = build().float()
    size = {"height": 8, "width": 12}
    model.preprocess = Processed(ViTImageProcessor(size=size, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]))
    prisma.save(model, folder)
    return folder / "companions" / "preprocess" / "preprocessor_config.json"


def words(folder: Path) -> Path:
    Words(("a", "red", "circle"), 6).save_pretrained(folder)
    return folder / "words.json"


def harvested(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        model = build().float()
        images = [torch.full((3, *model.spec.image_size), float(n)) for n in range(5)]
        acts = prisma_harvest.harvest(
            model, images, ["resid_post", "pattern"], out=folder, shard=2, batch=1, preprocess=None
        )
        return acts.path / name

    return write


def harvest_used(folder: Path) -> Any:
    acts = prisma_harvest.open_harvest(folder)
    names = acts.names
    rows = list(acts.rows(next(name for name in names if "resid" in name), 7, shuffle=True))
    lines = [{key: value for key, value in line.items() if key != "path"} for line in acts.examples()]
    labels = [acts.tokens_of(name) for name in names]
    return [names, len(acts), rows, [acts.example(0, name) for name in names], lines, labels, list(acts.skipped())]


def coder(folder: Path) -> Path:
    facts = CoderFacts(
        kind="standard", d_in=D_IN, d_sae=D_SAE, d_out=D_IN, model="toy:scenes-3l", hook="blocks.1.hook_resid_post",
        tokens="patches", figures={"l0": 3.0}, labels={3: "eyes"}, more={"seed": 1}, weights="0" * 64,
    )  # fmt: skip
    prisma_sae.save(SparseCoder(facts, standard()), folder)
    return folder / "prisma.json"


def coder_used(folder: Path) -> Any:
    made = prisma_sae.read(folder)
    return [made(torch.ones(2, D_IN)), made.facts.model_dump(exclude={"layout"})]


def lens(folder: Path) -> Path:
    made = TunedLens({"d_model": 6, "num_hidden_layers": 2, "bias": True, "unembed_hash": "x"})
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    made.save(folder, safetensors=True)
    return folder / "config.json"


def lens_used(folder: Path) -> Any:
    made = TunedLens.load(folder)
    return [made.translate(torch.ones(3, 6), layer) for layer in range(len(made))]


def circuit(folder: Path) -> Path:
    shape = Shape(2, 2, 8, parallel=False, mlps=(0, 1))
    real = shape.real()
    scores = torch.arange(float(real.numel())).view(real.shape) * real
    return Circuit(shape, scores, real & (scores > 9)).save(folder / "circuit.json")


def circuit_used(folder: Path) -> Any:
    made = Circuit.load(folder / "circuit.json")
    return [made.scores.nan_to_num(7), made.kept, made.nodes, made.shape, made.pruned().nodes, made.to_result().values]


def result(folder: Path) -> Path:
    values = torch.arange(6.0).view(2, 3)
    made = Result(values, ("layer", "head"), {"head": ("a", "b", "c")}, technique="t", unit="u", total="v")
    return made.save(folder / "x.safetensors")


def result_used(folder: Path) -> Any:
    made = Result.load(folder / "x.safetensors")
    return [made.values, made.axes, made.labels, made.technique, made.total, made.top(2), repr(made), made.shape]


def cache(folder: Path) -> Path:
    model = build().float()
    _, made = model.run_with_cache(torch.ones(2, 3, *model.spec.image_size), pos="patches")
    return made.save(folder / "x.safetensors")


def cache_used(folder: Path) -> Any:
    alone = ActivationCache.load(folder / "x.safetensors")
    made = ActivationCache.load(folder / "x.safetensors", build().float())
    return [dict(made), made.axes, made.layout, made.pos, alone.axes, made.patches("resid_post", 0), made.has_batch_dim,
            made.accumulated_resid(pos_slice="patches")]  # fmt: skip


SUBJECTS: dict[str, Subject] = {
    "a model": Subject(vit, used),
    "an older model": Subject(older(lambda folder: vit(folder, "rope, qk_norm, bias")), used),
    "an older pair of towers": Subject(older(saved("toy:clip-scenes")), used),
    "a pair of towers": Subject(saved("toy:clip-scenes"), used),
    "a model of videos": Subject(saved("toy:motion"), used),
    "an image processor": Subject(processed, used),
    "a vocabulary": Subject(words, lambda folder: Words.from_pretrained(folder)(["a red cat"])),
    "a manifest": Subject(harvested("manifest.json"), harvest_used),
    "a harvest's record": Subject(harvested("whole.json"), harvest_used),
    "a sparse coder": Subject(coder, coder_used),
    "an older sparse coder": Subject(older(coder), coder_used),
    "a tuned lens": Subject(lens, lens_used),
    "a circuit": Subject(circuit, circuit_used),
    "a result": Subject(result, result_used),
    "a cache": Subject(cache, cache_used),
}


class Outcome(NamedTuple):
    """``same``, ``refused``, ``other`` or ``raw``, with the sentence or what differs, and the seconds it took."""

    kind: str
    why: str
    seconds: float


class Written:
    """A subject in a folder, its facts, and what it computes."""

    def __init__(self, subject: Subject, folder: Path):
        self.subject, self.folder = subject, folder
        self.path = subject.write(folder)
        self.binary = self.path.suffix == ".safetensors"
        if self.binary:
            from safetensors import safe_open

            self.tensors = {name: each.clone() for name, each in load_file(self.path).items()}
            with safe_open(self.path, "pt") as file:
                ((self.key, text),) = file.metadata().items()
        else:
            text = self.path.read_text(encoding="utf-8")
        self.facts = json.loads(text)
        self.right = subject.read(folder)
        assert same(self.right, subject.read(folder))

    def put(self, facts: Any) -> None:
        if self.binary:
            save_file(self.tensors, self.path, {self.key: json.dumps(facts)})
        else:
            self.path.write_text(json.dumps(facts), encoding="utf-8")

    def judge(self, edit: Edit) -> Outcome:
        self.put(edit.of(self.facts))
        start = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got = self.subject.read(self.folder)
            kind = "same" if same(got, self.right) else "other" if finite(got) else "not finite"
            why = ""
        except PluginError as error:
            kind, why = "raw", f"PluginError: {error}"
        except PrismaError as error:
            kind, why = "refused", f"{type(error).__name__}: {error}"
            if "\n" in why or len(why) > 1000:
                kind = "long"
        except Exception as error:  # noqa: BLE001
            kind, why = "raw", f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - start
        if seconds > SECONDS:
            kind = "slow"
        return Outcome(kind, why, seconds)


def finite(one: Any) -> bool:
    """Whether the tensors of a result hold numbers."""
    if isinstance(one, torch.Tensor):
        return not one.is_floating_point() or bool(one.isfinite().all())
    parts = one.values() if isinstance(one, dict) else one if isinstance(one, list | tuple) else ()
    return all(map(finite, parts))


def same(one: Any, other: Any) -> bool:
    """Whether two results are equal, tensors bit by bit."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other
