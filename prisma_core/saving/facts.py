"""The facts in ``spec.json``, checked as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from prisma_core.errors import InputError, format_fields
from prisma_core.files.facts import check_facts, facts_digest, read_fields
from prisma_core.files.texts import parse_json
from prisma_core.inputs import Preprocess
from prisma_core.inputs.video import VideoPreprocess
from prisma_core.model import ZooModel
from prisma_core.spec import AnySpec, DualSpec, Facts

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
AnyPreprocess = Annotated[
    Annotated[Preprocess, Tag("image")] | Annotated[VideoPreprocess, Tag("video")],
    Discriminator(lambda given: "video" if isinstance(given, VideoPreprocess) or _has(given, "each") else "image"),
]


def _has(given: Any, key: str) -> bool:
    return isinstance(given, dict) and key in given


class SavedProcessor(Facts):
    """The record of a tokenizer or image processor: which source reads its folder, or why it is lost.

    Attributes:
        sha256: of the folder; folders written before there was one have none.
    """

    source: str | None = None
    sha256: Sha256 | None = None
    lost: str | None = None

    @model_validator(mode="after")
    def _either(self) -> Self:
        if (self.source is None) == (self.lost is None):
            raise ValueError("expected the source that reads it, or why it is lost")
        return self


class SavedWeights(Facts):
    """What belongs together.

    Attributes:
        sha256: of the weights (see ``files.checkpoint.digest``).
        facts: of all else in the file; files written before there was one have none.
    """

    sha256: Sha256
    facts: Sha256 | None = None


class SavedFacts(BaseModel):
    """All that ``spec.json`` says.

    Attributes:
        frozen: names of the parameters that are not trained.
        weights: none in folders written before there was a digest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: Annotated[AnySpec, Field(discriminator="kind")]
    preprocess: AnyPreprocess | None = None
    labels: tuple[str, ...] | None = None
    reference: str | None = None
    frozen: tuple[str, ...] = ()
    weights: SavedWeights | None = None
    companions: dict[Literal["tokenizer", "preprocess"], SavedProcessor] = {}

    @model_validator(mode="after")
    def _together(self) -> Self:
        n = None if isinstance(self.spec, DualSpec) else self.spec.n_classes
        if self.labels is not None and n is not None and len(self.labels) != n:
            raise ValueError(f"there are {n} classes and {len(self.labels)} labels")
        return self

    @classmethod
    def of(cls, model: ZooModel, sha256: str, frozen: list[str]) -> Self:
        """Return the facts of a model; an ``InputError`` for labels that are no texts, or not one a class."""
        preprocess = vars(model.towers().get("vision.", model)).get("preprocess")
        try:
            return cls(
                spec=model.spec,
                preprocess=preprocess if isinstance(preprocess, Preprocess | VideoPreprocess) else None,
                labels=model.labels,
                reference=model.reference,
                frozen=tuple(frozen),
                weights=SavedWeights(sha256=sha256),
            )
        except ValidationError as error:
            raise InputError(f"This model's facts do not go together: {format_fields(error)}.") from error

    def to_json(self) -> str:
        """Return the text of ``spec.json``."""
        records = {what: record.model_dump(exclude_none=True) for what, record in self.companions.items()}
        facts: dict[str, Any] = self.model_dump(mode="json") | {"companions": records}
        if self.weights is not None:
            facts["weights"]["facts"] = facts_digest(_rest(facts))
        return json.dumps(facts, indent=1) + "\n"


def read_facts(text: str, path: Path) -> SavedFacts:
    """Return the facts in the text of a ``spec.json``; a ``LoadError`` where they describe no model."""
    said = parse_json(text, path)
    named = dict(said)
    if isinstance(spec := said.get("spec"), dict):  # once there was one kind, and no name for it
        named["spec"] = {"kind": "vision", **cast("dict[str, Any]", spec)}
    facts = read_fields(SavedFacts, named, f"{path} does not describe a model")
    if facts.weights is not None:
        check_facts(_rest(said), facts.weights.facts, path, "weights.facts")
    return facts


def _rest(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: fact for name, fact in facts.items() if name != "weights"}
