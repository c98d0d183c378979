"""Every module of every adapter's models in other states: upstream's numbers, or a sentence that names the place.

Other classes, forwards, hooks, attributes, functions, tensors and parts are put at each module in turn. A plain run
draws some cases and some moves of each kind; ``--every-field`` makes all moves of all cases.
"""

from __future__ import annotations

import json
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from prisma_conformance.pytest import COUNTS

from prisma_core.host import installed

from .state_moves import Move, moves, slot
from .state_sweep import Moved

EVERY = {f"{plugin}-{case.name}": case for case, plugin in installed().cases() if plugin != "toy"}
CASES, MOVES = 3, 2  # of a plugin, of a kind
SEEN = set[object]()  # slots of a class of models: its other cases have the same


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = list(EVERY)
    if not metafunc.config.getoption("--every-field"):
        plugins = sorted({name.partition("-")[0] for name in names})
        draw = random.Random(0)
        by_plugin = [[name for name in names if name.startswith(f"{plugin}-")] for plugin in plugins]
        names = [name for several in by_plugin for name in draw.sample(several, CASES)]
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", names)


def drawn(name: str, every: list[Move]) -> Iterator[Move]:
    """Yield some moves of each kind."""
    draw = random.Random(zlib.crc32(name.encode()))
    for kind in dict.fromkeys(move.kind for move in every):
        several = [move for move in every if move.kind == kind]
        yield from draw.sample(several, min(MOVES, len(several)))


@torch.no_grad()
def test_every_state_is_followed_or_refused_by_its_place(
    name: str, record_property: Callable[[str, object], None], request: pytest.FixtureRequest
) -> None:
    model = Moved(EVERY[name])
    every = list(moves(model.upstream))
    whole = bool(request.config.getoption("--every-field"))
    if whole:
        places = {move: (type(model.upstream), slot(model.upstream, move)) for move in every}
        every = [move for move in every if places[move] not in SEEN]
        SEEN.update(places.values())
    outcomes = [(move, model.judge(move)) for move in (every if whole else drawn(name, every))]
    faults = [f"{move}: {one.kind}: {one.why}" for move, one in outcomes if one.kind in ("defect", "refused elsewhere")]
    assert not faults, "\n".join(faults)
    assert torch.equal(model.forward(), model.output)  # every move was taken back
    kinds = Counter(one.kind for _, one in outcomes)
    assert whole or kinds["refused"] + kinds["agrees"] >= 3, kinds  # where nothing changes nothing is proven
    record_property(COUNTS, json.dumps(["states of upstream's modules", {"cases": 1, "moves": len(outcomes), **kinds}]))
