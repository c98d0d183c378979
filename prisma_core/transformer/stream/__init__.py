"""The algebra of the residual stream: decomposition, attribution, readout."""

from prisma_core.transformer.stream.decompose import StreamCache

__all__ = ["StreamCache"]
