"""Every field of every configuration of transformers', moved by itself: followed, refused in words, or of no effect.

Facts are read off built modules, and the audit leaves their ``config`` out. This is what stands in for it: whatever a
configuration says, the numbers are upstream's or there are none. ``--every-field`` tries every value on every case.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
import torch
from prisma_conformance.pytest import COUNTS

from .hf_fields import configurations
from .hf_sweep import EVERY, FIRST, VARIANT, Model, counted, effects, known_of, swept


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
        verdicts = list(swept(Model(case), every=every, known=known))
        defects = [
            f"{kind.__name__}.{field} = {value!r}, {'changed since' if late else 'before'} it was built: {verdict.why}"
            for late, (kind, field, value), verdict in verdicts
            if verdict.kind == "defect"
        ]
        assert not defects, "\n".join(defects)
        # Where nothing changes nothing is proven. Whole models have a scale and projections beside towers.
        towers = len(configurations(case.build())) > 1 and not every
        assert len(effects(verdicts)) >= (0 if known else 1 if towers else 7), effects(verdicts)
        record_property(COUNTS, json.dumps(["fields of transformers' configurations", counted(verdicts)]))
