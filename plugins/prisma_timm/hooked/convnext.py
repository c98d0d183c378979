"""The hook map of timm's ConvNeXt: no attention, a depthwise convolution and an MLP in each block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor

from prisma_core.plugin import HookMap, MapSpec, Reader
from prisma_timm.hooked import mapping

MAPS = "batch d_model row column -> batch row column d_model"


class ConvNeXtAdapter(mapping.FamilyMap):
    """ConvNeXt, the first and the second version. It takes images of any size."""

    types = ("timm.models.convnext.ConvNeXt",)
    small: ClassVar[Mapping[str, Any]] = {
        "depths": (1, 1, 2, 1),
        "dims": (8, 12, 16, 20),
        "pretrained_cfg_overlay": {"input_size": (3, 32, 64)},
    }

    def spec(self, upstream: Reader) -> MapSpec:
        _, rows, columns = upstream.pretrained_cfg["input_size"]
        return mapping.facts(upstream, (rows, columns), (rows + 32, columns))

    def hooks(self, upstream: Reader, spec: MapSpec) -> HookMap:
        rows = f"stem  ->  hook_embed  : {MAPS}\n"
        for s, stage in enumerate(upstream.stages):
            if not stage.downsample.is_a("Identity"):
                rows += f"stages.{s}.downsample  ->  stages.{s}.hook_downsample  : {MAPS}\n"
            for layer, block in enumerate(stage.blocks):
                rows += _block(f"stages.{s}.blocks.{layer}", block)
        if not upstream.norm_pre.is_a("Identity"):
            rows += f"norm_pre  ->  ln_final.hook_normalized  : {MAPS}\n"
        return HookMap.parse(rows + mapping.head_rows(upstream.head))

    def equations(self, upstream: Reader, acts: Mapping[str, Tensor]) -> Iterator[mapping.Claim]:
        for s, stage in enumerate(upstream.stages):
            for layer, block in enumerate(stage.blocks):
                yield from _equations(f"stages.{s}.blocks.{layer}", block, acts)


def _block(at: str, block: Reader) -> str:
    inside = "batch d_mlp row column -> batch row column d_mlp" if block.use_conv_mlp else "batch row column d_mlp"
    shortcut = f"{at}.shortcut  ->  {at}.hook_shortcut  : {MAPS}"
    return f"""
        {at} : in       ->  {at}.hook_resid_pre      : {MAPS}
        {at}.conv_dw    ->  {at}.hook_conv           : {MAPS}  = a depthwise convolution of resid_pre
        {at}.norm       ->  {at}.ln.hook_normalized  : {MAPS if block.use_conv_mlp else "batch row column d_model"}
        {mapping.mlp_rows(block, at, at, how=inside)}
        {at}.drop_path  ->  {at}.hook_mlp_out        : {MAPS}  = gamma * (post W_out + b_out)
        {"" if block.shortcut.is_a("Identity") else shortcut}
        {at}            ->  {at}.hook_resid_post     : {MAPS}  = resid_pre (or shortcut) + mlp_out
    """


def _equations(at: str, block: Reader, acts: Mapping[str, Tensor]) -> Iterator[mapping.Claim]:
    pre, conv, normed = (acts[f"{at}.{name}"] for name in ("hook_resid_pre", "hook_conv", "ln.hook_normalized"))
    yield f"{at}: conv = convolution of resid_pre", conv, block.conv_dw.module(pre.movedim(-1, 1)).movedim(1, -1)
    first = block.use_conv_mlp
    made = block.norm.module(conv.movedim(-1, 1)).movedim(1, -1) if first else block.norm.module(conv)
    yield f"{at}: ln = ln(conv)", normed, made
    hidden = {
        name: acts[f"{at}.mlp.{name}"] for name in ("hook_pre", "hook_post", "hook_mid") if f"{at}.mlp.{name}" in acts
    }
    if "hook_mid" in hidden and first:
        return  # the norm over channels wants them first; parity compares what it makes
    yield from mapping.mlp_equations(at, block.module, normed, acts)
    out = mapping.mlp_out(block.module, acts, at)
    yield (
        f"{at}: mlp_out = gamma * (post W_out + b_out)",
        acts[f"{at}.hook_mlp_out"],
        out * block.get("gamma", 1) if block.has("gamma") else out,
    )
