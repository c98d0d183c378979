"""Arguments of the wrong type are refused in words, and those whose meaning is clear are taken."""

from __future__ import annotations

import pytest
import torch

from prisma_core import InputError

WRONG = {
    "a list of subsets": ({"pos": ["cls"]}, "pos='cls'"),
    "None in a list": ({"pos": [None]}, "whole numbers"),
    "a number too large": ({"pos": 2**70}, "No index 1180591620717411303424"),
    "a ragged list": ({"pos": [[0], [1, 2]]}, "whole numbers"),
    "a slice backwards": ({"pos": slice(None, None, -1)}, "forward"),
    "heads by name": ({"names": "z", "heads": "x"}, "whole numbers"),
    "no dtype": ({"dtype": "float17"}, "float17"),
    "a device as dtype": ({"dtype": torch.device("cpu")}, "torch.float16"),
    "a layer as text": ({"start_at_layer": "1"}, "whole number, got '1'"),
    "half a layer": ({"stop_at_layer": 0.5}, r"whole number, got 0\.5"),
    "a truth as layer": ({"stop_at_layer": True}, "whole number, got True"),
}


@pytest.mark.parametrize(("arguments", "words"), WRONG.values(), ids=WRONG)
def test_wrong_types(vit, image, arguments, words):
    with pytest.raises(InputError, match=words):
        vit.run_with_cache(image, **arguments)


@pytest.mark.parametrize("dtype", ["float16", "torch.float16", torch.float16])
def test_a_dtype_by_name(vit, image, dtype):
    assert vit.run_with_cache(image, names=("z", 0), dtype=dtype)[1]["z", 0].dtype == torch.float16
