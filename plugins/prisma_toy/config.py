"""The options of a training run."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """Everything that decides what a run computes.

    Attributes:
        data: name of the task.
        layers, d_model, heads: of each transformer of the model.
        mlp_ratio: the MLP's width over ``d_model``; 0 for attention alone.
        pool: what the head reads, the mean of all tokens or the class token.
        registers: learned tokens behind the class token.
        patch_loss: weight of the loss that asks each patch for what it shows, where the task knows.
        threads: of torch; another number adds up in another order, and rounds otherwise.
        bf16: matrix products in bfloat16, twice as fast on processors that have it; weights stay in float32.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: str = "scenes"
    layers: int = Field(default=3, ge=1, le=12)
    d_model: int = Field(default=128, ge=4, le=4096)
    heads: int = Field(default=4, ge=1)
    mlp_ratio: float = Field(default=2.0, ge=0, le=64)
    norm: bool = True
    pool: Literal["avg", "token"] = "avg"
    registers: int = Field(default=0, ge=0, le=64)
    steps: int = Field(default=2000, ge=1, le=10**9)
    batch: int = Field(default=32, ge=1, le=1 << 16)
    lr: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.03, ge=0)
    patch_loss: float = Field(default=1.0, ge=0)
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    threads: int = Field(default=1, ge=1, le=1024)
    bf16: bool = False
