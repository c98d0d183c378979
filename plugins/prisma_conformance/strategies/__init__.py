"""Strategies for hypothesis: specs, images, tokens, hook names and queries, to fuzz adapters and techniques with.

    from hypothesis import given, strategies as st
    from prisma_conformance.strategies import hook_names, images

    @given(st.data())
    def test_identity_hooks_leave_the_logits(data):
        image = data.draw(images(model.spec))
        hooks = dict.fromkeys(data.draw(hook_names(model)), lambda x, at: x)
        torch.testing.assert_close(model.run_with_hooks(image, hooks=hooks), model(image))

They need ``pip install hypothesis``. Sizes are tiny; kinds of norms, blocks, heads, positions, pooling are all random.
"""

from prisma_conformance.strategies.kinds import Kind, dual_specs, specs, text_specs, vision_specs
from prisma_conformance.strategies.names import Index, hook_names, positions, queries
from prisma_conformance.strategies.parts import SEEDS
from prisma_conformance.strategies.tensors import images, inputs, random_model, tokens

__all__ = [
    "Index",
    "Kind",
    "SEEDS",
    "dual_specs",
    "hook_names",
    "images",
    "inputs",
    "positions",
    "queries",
    "random_model",
    "specs",
    "text_specs",
    "tokens",
    "vision_specs",
]
