"""transformers' video models come through their adapters with the same numbers; what cannot is refused by feature."""

from __future__ import annotations

import pytest
from prisma_conformance.pytest import suite

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'prisma-interp[video]'")

test_conformance = suite("vivit")
