"""What the adapters of canonical video models share."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from prisma_core.inputs.video import VideoPreprocess
from prisma_core.maps.reader import Reader
from prisma_core.plugin.adapter import Adapter
from prisma_core.spec import ModelSpec
from prisma_core.toolbox.attention import eager_attention
from prisma_vivit.processing import preprocess_of


class VideoAdapter(Adapter):
    """transformers' own processor and attention, looked into."""

    @abstractmethod
    def spec(self, upstream: Reader) -> ModelSpec: ...

    def preprocess(self, upstream: Reader, processor: Any) -> VideoPreprocess:
        frames = self.spec(upstream).n_frames
        assert frames is not None
        return preprocess_of(processor, frames)

    def explicit(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return eager_attention(upstream)
