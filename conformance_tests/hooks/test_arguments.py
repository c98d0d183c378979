"""Arguments of the wrong type are refused in words, and those whose meaning is clear are taken."""

from __future__ import annotations

import pytest
import torch

from prisma_core import HookError, InputError, UnknownName

WRONG = {
    "a list of subsets": ({"pos": ["cls"]}, "pos='cls'"),
    "None in a list": ({"pos": [None]}, "whole numbers"),
    "a number too large": ({"pos": 2**70}, "No index 1180591620717411303424"),
    "a ragged list": ({"pos": [[0], [1, 2]]}, "whole numbers"),
    "a slice backwards": ({"pos": slice(None, None, -1)}, "forward"),
    "heads by name": ({"names": "z", "heads": "x"}, "whole numbers"),
    "half a slice": ({"pos": slice(0.5, None)}, r"slice of whole numbers, got slice\(0\.5"),
    "a slice of truths": ({"pos": slice(True, None)}, r"slice of whole numbers, got slice\(True"),
    "a slice of no steps": ({"heads": slice(0, 2, 0), "names": "z"}, "step cannot be zero"),
    "some truths and numbers": ({"pos": [True, 2]}, "whole numbers or a mask"),
    "a table of positions": ({"pos": [[0], [1]]}, "whole numbers or a mask"),
    "a truth": ({"pos": True}, "whole numbers or a mask, got True"),
    "a module as hook": ({"hooks": {"z": torch.nn.Identity()}}, r"Identity\(input.*lambda activation, at: module"),
    "a layer of truth": ({"names": ("z", True)}, r"\('z', True\)|True is no name"),
    "no dtype": ({"dtype": "float17"}, "float17"),
    "a device as dtype": ({"dtype": torch.device("cpu")}, "torch.float16"),
    "a layer as text": ({"start_at_layer": "1"}, "whole number, got '1'"),
    "half a layer": ({"stop_at_layer": 0.5}, r"whole number, got 0\.5"),
    "a truth as layer": ({"stop_at_layer": True}, "whole number, got True"),
}


@pytest.mark.parametrize(("arguments", "words"), WRONG.values(), ids=WRONG)
def test_wrong_types(vit, image, arguments, words):
    with pytest.raises((InputError, HookError, UnknownName), match=words):
        vit.run_with_cache(image, **arguments)


@pytest.mark.parametrize("dtype", ["float16", "torch.float16", torch.float16])
def test_a_dtype_by_name(vit, image, dtype):
    assert vit.run_with_cache(image, names=("z", 0), dtype=dtype)[1]["z", 0].dtype == torch.float16
