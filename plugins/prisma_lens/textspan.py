"""TextSpan: a head's outputs explained by a few texts of a pool, which name the head.

Equation:
    C the outputs of a head over images, less their mean; T the texts' vectors, projected onto the span of C. Again and
    again: j = argmax_j |C t_j|^2, the text along which the outputs vary most; its direction is then taken out of C and
    of T. The score is the share of the variance of C at the start that lay along it.
Cost:
    The heads' outputs (``head_outputs``), and for each head and text chosen a product ``[image d] x [d text]``.
Misleads:
    A text is only the best of the pool, and any pool explains something: compare the shares with those of
    ``tensors["random"]``, the same with random directions. Few images span little.
Source:
    Gandelsman, Efros and Steinhardt 2024, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from prisma_core import HookedDual, InputError, NotApplicable, Result
from prisma_core.plugin import Count, Indices, Seed, checked, shown, widened
from prisma_lens.decomposition import head_outputs


@checked
def textspan(outputs: Tensor, texts: Tensor, k: Count = 5) -> tuple[list[int], Tensor]:
    """Return which texts span outputs best, in order, and the share of variance that each explains ``[k]``.

    >>> along = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> textspan(along, torch.eye(2).flip(0), k=2)
    ([1, 0], tensor([0.9000, 0.1000]))

    Args:
        outputs: ``[image d]``.
        texts: vectors of the pool ``[text d]``.
        k: how many to choose; fewer come back where the outputs have fewer dimensions, none where no text lies along
            them.

    Raises:
        InputError: the outputs do not vary or are not finite, or the widths differ.
    """
    if outputs.ndim != 2 or texts.ndim != 2 or outputs.shape[1] != texts.shape[1]:
        raise InputError(f"Expected outputs [image d] and texts [text d], got {[*outputs.shape]} and {[*texts.shape]}.")
    for what, x in (("outputs", outputs), ("texts", texts)):
        if not x.is_floating_point() or not bool(x.isfinite().all()):
            raise InputError(f"Expected {what} as finite floating point numbers, got {shown(x)}.")
    outputs = widened(outputs)
    c = outputs - outputs.mean(0)
    _, sizes, basis = torch.linalg.svd(c, full_matrices=False)
    basis = basis[sizes > sizes[:1] * 1e-6]
    total = c.square().sum()
    if not len(basis) or total == 0:
        raise InputError(f"The {len(outputs)} outputs do not vary: expected those of several different images.")
    t = texts.to(c) @ basis.T @ basis
    enough = 1e-6 * texts.to(c).norm(dim=-1)
    chosen, shares = list[int](), list[Tensor]()
    for _ in range(min(k, len(basis), len(t))):
        length = t.norm(dim=-1)
        along = (c @ t.T).square().sum(0).where(length > enough, -1)
        best = int(along.argmax())
        if along[best] < 0:  # nothing is left of any text
            break
        unit = t[best] / length[best]
        chosen.append(best)
        shares.append((c @ unit).square().sum() / total)
        c, t = c - (c @ unit)[:, None] * unit, t - (t @ unit)[:, None] * unit
    return chosen, torch.stack(shares) if shares else c.new_zeros(0)


@checked
@torch.no_grad()
def name_heads(
    model: HookedDual,
    images: Iterable[Tensor] | Tensor | Result,
    texts: Sequence[str],
    *,
    k: Count = 5,
    layers: Indices | None = None,
    seed: Seed = 0,
) -> Result:
    """Return the share of variance of each head's output that each of its texts explains: ``[head rank]``.

    >>> import prisma_core as prisma, torch
    >>> clip = prisma.load("toy:clip-scenes")
    >>> name_heads(clip, torch.rand(8, 3, 64, 64), ["a red circle", "a blue star"], k=2).shape
    {'head': 12, 'rank': 2}

    Args:
        model: a dual encoder.
        images: batches of images, more of them than dimensions if they can be had; or the Result of ``head_outputs``.
        texts: the pool of descriptions.
        k: texts for each head; fewer where the pool or the outputs have fewer.
        layers: whose heads; None for all; negative ones count from the end.
        seed: of the random directions.

    Returns:
        The shares; ``facts["texts"]`` has for each head, ``"L3H2"``, its texts in order, and ``tensors["random"]`` the
        shares of as many random directions ``[head rank]``.

    Raises:
        NotApplicable: the model has no text tower.
        InputError: there are no texts or no such layer, or the outputs do not vary.
    """
    if not isinstance(model, HookedDual):
        raise NotApplicable("Naming heads takes a text tower: expected a dual encoder.")
    if isinstance(texts, str) or not texts:
        raise InputError(f"Expected a list of texts, got {texts!r}.")
    found = images if isinstance(images, Result) else head_outputs(model, images)
    pool = model.encode_text(list(texts), normalize=True).cpu().to(found.values)
    noise = torch.randn(pool.shape, generator=torch.Generator().manual_seed(seed), dtype=pool.dtype)
    if found.axes != ("layer", "head", "image", "d_embed"):
        raise InputError(f"Expected images, or the Result of head_outputs; got a Result ({' '.join(found.axes)}).")
    n, heads = found.values.shape[:2]
    k = min(k, *pool.shape)
    if layers is not None and not all(-n <= each < n for each in layers):
        raise InputError(f"Expected layers from 0 to {n - 1}, got {list(layers)}.")
    names, rows, random, named = list[str](), list[Tensor](), list[Tensor](), dict[str, list[str]]()
    for layer in range(n) if layers is None else [each % n for each in layers]:
        for head in range(heads):
            name, outputs = f"L{layer}H{head}", found.values[layer, head]
            chosen, shares = textspan(outputs, pool, k)
            names.append(name)
            named[name] = [texts[each] for each in chosen]
            rows.append(_padded(shares, k))
            random.append(_padded(textspan(outputs, noise, k)[1], k))
    return Result(
        torch.stack(rows),
        ("head", "rank"),
        {"head": tuple(names)},
        technique="name_heads",
        unit="share of the head's variance",
        baseline="random directions (tensors['random'])",
        tensors={"random": torch.stack(random)},
        facts={"texts": named, "images": found.values.shape[2], "pool": len(texts)},
    )


def _padded(shares: Tensor, k: int) -> Tensor:
    return torch.nn.functional.pad(shares, (0, k - len(shares)))
