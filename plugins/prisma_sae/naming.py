"""Names of features: by what is known of the tokens that they fire for.

Equation:
    The precision of feature i for class c: sum_p f_i[p] s_c[p] / sum_p f_i[p], where s_c[p] is the share of the token p
    that shows c.
Cost:
    One product of activations with shares.
Misleads:
    A name says what a feature fires for, not all of what it stands for; a class that several features share has no one
    feature; what no class describes stays without a name.
Source:
    Bills et al. 2023 name features by language models; here the truth is known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prisma_core import InputError
from prisma_core.plugin import Count, Share, checked, shown


def precision(activations: Tensor, shares: Tensor) -> Tensor:
    """Return how much of each feature's activation is on each class, ``[feature class]``; NaN where it never fires.

    Args:
        activations: ``[token feature]``, none below zero.
        shares: how much of each token shows each class: ``[token class]``.
    """
    if activations.ndim != 2 or shares.ndim != 2 or len(activations) != len(shares):
        raise InputError(
            f"Expected activations [token feature] and shares [token class] of the same tokens, got "
            f"{shown(activations)} and {shown(shares)}."
        )
    return (activations.T.double() @ shares.double()) / activations.sum(0, dtype=torch.float64)[:, None]


@checked
def name_features(
    activations: Tensor, shares: Tensor, labels: Sequence[str], *, threshold: Share = 0.7, least: Count = 10
) -> dict[int, str]:
    """Return the names of features whose activation is on one class.

    >>> import torch
    >>> names = name_features(torch.ones(20, 1), torch.tensor([[1.0, 0.0]] * 20), ["star", "circle"])
    >>> names
    {0: 'star'}

    Args:
        activations: ``[token feature]``.
        shares: how much of each token shows each class: ``[token class]``.
        labels: the names of the classes.
        threshold: the least precision for a name.
        least: the fewest tokens that a feature must fire for.

    Raises:
        InputError: activations, shares and labels do not fit.
    """
    precise = precision(activations, shares)
    if not 0 < shares.shape[-1] == len(labels):
        raise InputError(f"Expected labels, at least one, for each of {shares.shape[-1]} classes, got {shown(labels)}.")
    best, which = precise.max(-1)
    often = (activations > 0).sum(0) >= least
    named = (often & (best >= threshold)).nonzero().flatten().tolist()
    return {index: labels[int(which[index])] for index in named}
