"""A part that a model uses several times, and weights that the hooked model shares with upstream's."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from third_party import Mapped, Net, Plain, drawn, image
from torch import nn

import prisma_core as prisma
from prisma_core import HookError, WeightMapError
from prisma_core.plugin import HookMap, Reader


def shared(net: Net) -> Net:
    """Return a network whose second block is its first, as in ALBERT."""
    net.layers[1] = net.layers[0]
    return net


def test_a_block_used_twice_is_two_blocks() -> None:
    net, x = shared(drawn()), image()
    model = prisma.adapt(net, adapter=Plain())
    logits, cache = model.run_with_cache(x)
    torch.testing.assert_close(logits, net(x))
    assert model.spec.n_layers == 2
    assert not torch.equal(cache["resid_post", 0], cache["resid_post", 1])
    state = prisma.export(model)
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())


def test_blocks_that_are_one_upstream_are_edited_alike_or_not_exported() -> None:
    net, x = shared(drawn()), image()
    model = prisma.adapt(net, adapter=Plain())
    with torch.no_grad():
        model.blocks[1].mlp.fc_out.bias[0] += 1
    assert (model(x) - net(x)).abs().max() > 1e-3
    with pytest.raises(WeightMapError, match=r"layers\.0\.fc2\.bias and layers\.1\.fc2\.bias"):
        prisma.export(model)
    with torch.no_grad():
        model.blocks[0].mlp.fc_out.bias[0] += 1
    net.load_state_dict(prisma.export(model))
    torch.testing.assert_close(model(x), net(x))


class Everywhere(Mapped):
    def hooks(self, upstream: Reader, spec: Any) -> HookMap:
        table = """
            layers.{l} : in  ->  blocks.{l}.hook_resid_pre   : batch pos d_model
            layers.{l}.fc2   ->  blocks.{l}.hook_mlp_out     : batch pos d_model
            layers.{l}       ->  blocks.{l}.hook_resid_post  : batch pos d_model
        """
        return HookMap.parse("".join(table.replace("{l}", str(index)) for index in range(len(upstream.layers))))


@pytest.mark.parametrize("copy", [True, False])
def test_a_block_used_twice_has_hook_points_of_each_use(copy: bool) -> None:
    net, x = shared(drawn()), image()
    model = prisma.adapt(net, adapter=Everywhere(), copy=copy)
    logits, cache = model.run_with_cache(x)
    torch.testing.assert_close(logits, net(x))
    for name, tensor in prisma.adapt(net, adapter=Plain()).run_with_cache(x)[1].items():
        if name in cache:
            torch.testing.assert_close(cache[name], tensor)
    assert "blocks.1.hook_resid_post" in cache
    assert not torch.equal(cache["blocks.0.hook_mlp_out"], cache["blocks.1.hook_mlp_out"])
    hooks = {"blocks.1.hook_mlp_out": lambda out, point: out * 0}
    kept = model.run_with_cache(x, hooks=hooks)[1]
    torch.testing.assert_close(kept["blocks.0.hook_resid_post"], cache["blocks.0.hook_resid_post"])
    assert (kept["blocks.1.hook_resid_post"] - cache["blocks.1.hook_resid_post"]).abs().max() > 1e-3
    assert len(list(model.parameters())) == len(list(net.parameters()))
    assert net.layers[1] is net.layers[0]
    with torch.no_grad():
        net.layers[0].fc2.bias[0] += 1
    changed = (model(x) - logits).abs().max() > 1e-3
    assert bool(changed) is not copy
    state = model.export()
    assert torch.equal(state["layers.0.fc2.bias"], state["layers.1.fc2.bias"])


class Loop(Net):
    """Runs its first block twice, by its own code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = self.layers[0](self.layers[0](x))
        return self.head(self.norm(x).mean(1))


class OfLoop(Mapped):
    types = (f"{Loop.__module__}.Loop",)

    def hooks(self, upstream: Reader, spec: Any) -> HookMap:
        return HookMap.parse("layers.0 -> blocks.0.hook_resid_post : batch pos d_model")


def test_a_part_that_the_code_runs_twice() -> None:
    model, x = prisma.adapt(Loop().double(), adapter=OfLoop()), image()
    with pytest.raises(HookError, match=r"blocks\.0\.hook_resid_post.*several times in one pass"):
        model.run_with_cache(x)
    assert model.run_with_hooks(x, hooks={"blocks.0.hook_resid_post": lambda out, point: out * 2}).shape == (2, 5)


# -------------------------------------------------------------------- copy=False


def trained(net: nn.Module) -> None:
    step = torch.optim.SGD(net.parameters(), 0.5)
    net(image()).square().sum().backward()
    step.step()


def test_weights_that_are_all_shared_follow_upstream_in_silence() -> None:
    net, x = drawn(), image()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = prisma.adapt(net, adapter=Plain(), copy=False)
    assert model.origin is not None
    assert model.origin.copied == {}
    before = model(x)
    trained(net)
    torch.testing.assert_close(model(x), net(x))
    assert (model(x) - before).abs().max() > 1e-3


def test_copies_are_named_where_weights_are_to_be_shared() -> None:
    tr = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    upstream = tr.ViTForImageClassification(tr.ViTConfig(**sizes, image_size=32)).eval()
    with pytest.warns(UserWarning, match=r"copy=False: 4 of \d+ tensors are copies.*q_proj.*model\.origin\.copied"):
        model = prisma.adapt(upstream, copy=False)
    copied = model.origin.copied
    assert set(copied) == {f"blocks.{index}.attn.qkv.{kind}" for index in range(2) for kind in ("weight", "bias")}
    assert "vit.layers.0.attention.k_proj.weight" in copied["blocks.0.attn.qkv.weight"]
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    with torch.no_grad():
        for parameter in upstream.parameters():
            parameter += 1
    follow = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert set(before) - follow == set(copied)


def test_a_block_used_twice_is_shared_once() -> None:
    net = shared(drawn())
    with pytest.warns(UserWarning, match="are copies"):
        model = prisma.adapt(net, adapter=Plain(), copy=False)
    assert model.origin is not None
    assert set(model.origin.copied) == {name for name, _ in model.named_parameters() if name.startswith("blocks.1.")}
