"""The hook map of timm's ConvNeXt: no attention, a depthwise convolution and an MLP in each block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

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
        rows, x = f"stem  ->  hook_embed  : {MAPS}  = stem(input)\n", "embed"
        for s, stage in enumerate(upstream.stages):
            at = f"stages.{s}"
            if not stage.downsample.is_a("Identity"):
                rows += f"{at}.downsample  ->  {at}.hook_downsample  : {MAPS}  = {at}.downsample({x})\n"
            for layer, block in enumerate(stage.blocks):
                rows += _block(f"{at}.blocks.{layer}", block)
                x = f"{at}.blocks.{layer}.resid_post"
        if not upstream.norm_pre.is_a("Identity"):
            rows += f"norm_pre  ->  ln_final.hook_normalized  : {MAPS}  = norm_pre({x})\n"
            x = "ln_final.normalized"
        return HookMap.parse(rows + mapping.head_rows(upstream.head, x))


def _block(at: str, block: Reader) -> str:
    conv = block.use_conv_mlp  # then channels stay first all the way, else they are last from the norm to the MLP's end
    normed = MAPS if conv else "batch row column d_model"
    inside = "batch d_mlp row column -> batch row column d_mlp" if conv else "batch row column d_mlp"
    mlp = f"{at}.drop_path({at}.mlp.fc2(mlp.post))" if conv else f"{at}.mlp.fc2(mlp.post)"
    shortcut = f"{at}.shortcut  ->  {at}.hook_shortcut  : {MAPS}  = {at}.shortcut(resid_pre)"
    return f"""
        {at} : in       ->  {at}.hook_resid_pre      : {MAPS}
        {at}.conv_dw    ->  {at}.hook_conv           : {MAPS}  = {at}.conv_dw(resid_pre)
        {at}.norm       ->  {at}.ln.hook_normalized  : {normed}  = {at}.norm(conv)
        {mapping.mlp_rows(block, at, at, "ln.normalized", how=inside)}
        {at}.drop_path  ->  {at}.hook_mlp_out        : {MAPS}  = {mlp}{f" * {at}.gamma" if block.has("gamma") else ""}
        {"" if block.shortcut.is_a("Identity") else shortcut}
        {at}            ->  {at}.hook_resid_post     : {MAPS}  = resid_pre (or shortcut) + mlp_out
    """
