"""Names that differ in the number of a layer alone, as one name with a mark."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

Families = Mapping[str, Mapping[str, str]]


def families(names: Iterable[str]) -> Families:
    """Group names by the first number in which they differ, or which is a whole part of a dotted name.

    >>> families(["norm.eps", "layers.0.ln_1.eps", "layers.1.ln_1.eps"])
    {'norm.eps': {'': 'norm.eps'}, 'layers.{l}.ln_1.eps': {'0': 'layers.0.ln_1.eps', '1': 'layers.1.ln_1.eps'}}
    """
    names = list(dict.fromkeys(names))
    groups: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        for match in re.finditer(r"\d+", name):
            groups[f"{name[: match.start()]}{{l}}{name[match.end() :]}"][match[0]] = name
    result: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        for match in re.finditer(r"\d+", name):
            key = f"{name[: match.start()]}{{l}}{name[match.end() :]}"
            if {"0", "1"} <= set(groups[key]) or ".{l}." in f".{key}.":
                result[key][match[0]] = name
                break
        else:
            result[name][""] = name
    return dict(result)


__all__ = ["Families", "families"]
