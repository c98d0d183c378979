"""Base of the adapters of canonical video models."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from prisma_core.plugin import Adapter, ModelSpec, Reader, VideoPreprocess, eager_attention
from prisma_vivit.processing import preprocess_of


class VideoAdapter(Adapter):
    """transformers' own processor and attention, looked into."""

    @abstractmethod
    def spec(self, upstream: Reader) -> ModelSpec: ...

    def preprocess(self, upstream: Reader, processor: Any) -> VideoPreprocess:
        frames = self.spec(upstream).n_frames
        assert frames is not None
        return preprocess_of(processor, frames)

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return eager_attention(upstream)
