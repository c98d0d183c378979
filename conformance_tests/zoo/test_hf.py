"""Every plain image encoder of transformers comes through its adapter with the same numbers; the others are refused."""

from __future__ import annotations

import pytest

from prisma_core.conformance.pytest import suite

transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'prisma-interp[hf]'")

test_conformance = suite("hf")
