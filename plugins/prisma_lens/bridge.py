"""A bridge to captum: its methods take a forward function and its input, and both can be a hook point's.

Equation:
    f(a) = metric(model(images; hook point <- a)): whatever captum attributes to the input of f it attributes to the
    activation.
Cost:
    That of captum's method: a pass for each of its steps, the whole model each time.
Misleads:
    An activation that captum makes up, a baseline or a point on a line, may be one that no image has.
Source:
    captum (Kokhlikyan et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prisma_core import HookedModel, InputError, NotApplicable
from prisma_core.plugin import LayerQuery, checked
from prisma_lens.inputs import Inputs, as_inputs, one_point
from prisma_lens.metrics import MetricLike, as_metric


@checked
def captum_inputs(
    model: HookedModel, images: Tensor | Inputs, metric: MetricLike, at: str | LayerQuery
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return a function of an activation, for captum, and the activation that the images have.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> forward, activation = captum_inputs(model, torch.zeros(1, 3, 96, 96), "ladybird", ("resid_pre", 1))
    >>> forward(activation).shape, activation.shape
    (torch.Size([1]), torch.Size([1, 145, 128]))

    ``captum.attr.IntegratedGradients(forward).attribute(activation)``, ``DeepLift``, ``GradientShap``, ``Occlusion``,
    ``FeatureAblation`` and every other method that takes a forward function then work on the hook point.

    Args:
        model: any hooked model.
        images: what it takes; for a dual encoder images and tokens, ``(images, model.tokens(texts))``.
        metric: a function of the output, a class, or two (see ``as_metric``).
        at: one hook point.

    Returns:
        The function takes activations ``[n*batch ...]``, as captum stacks them: copies of the whole batch behind each
        other.

    Raises:
        NotApplicable: the hook point is of texts, which are not copied.
        InputError: of the function, activations of another number.
        UnknownName: no such class or hook point, or several hook points.
    """
    name, measure, inputs = one_point(model, at), as_metric(model, metric), as_inputs(model, images)
    if name.startswith("text."):
        raise NotApplicable(f"captum's copies are of images, and {name} holds texts: take a hook point of vision.")
    with torch.no_grad():
        _, cache = model.run_with_cache(*inputs, names=name, output=False)

    def forward(activation: Tensor) -> Tensor:
        if len(activation) % len(inputs[0]):
            raise InputError(f"Expected copies of a batch of {len(inputs[0])}, got {len(activation)} activations.")
        copies = inputs[0].repeat(len(activation) // len(inputs[0]), *[1] * (inputs[0].ndim - 1))

        def put(x: Tensor, at: Any) -> Tensor:
            return activation.to(x)

        return measure(model.run_with_hooks(copies, *inputs[1:], hooks={name: put}))

    return forward, cache[name]
