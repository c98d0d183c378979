"""A transformer run as a graph: what sources write to the stream, and what each target is given to read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from prisma_lens.inputs import as_input
from prisma_lens.metrics import Metric
from prisma_lens.readouts import refuse_open
from torch import Tensor

from prisma_core import HookContext, HookedModel, HookedText, HookedViT, InputError, NotApplicable
from prisma_core.plugin import shown, taking_gradients
from prisma_patch.graph import QKV, Circuit, Shape

NodeHook = Callable[[Tensor, HookContext], Tensor]


@dataclass
class Graph:
    """A transformer as nodes that write to its stream and read it.

    Attributes:
        shape: its sizes.
    """

    model: Any
    shape: Shape

    @classmethod
    def of(cls, model: HookedModel, clean: Any, corrupt: Any) -> Graph:
        """Return the graph of a model, once it and the inputs are known to fit.

        Raises:
            NotApplicable: the model's stream is no sum of what heads and MLPs add to it, or a scope is open in it.
            InputError: the pairs do not fit together.
        """
        if not isinstance(model, HookedViT | HookedText):
            raise NotApplicable(
                f"{type(model).__name__} is no single transformer in canonical form. Of a dual encoder take a tower, "
                "model.vision or model.text, and a metric of its output."
            )
        if not isinstance(clean, Tensor) or not isinstance(corrupt, Tensor):
            raise InputError(f"Expected inputs as tensors, got {shown(clean)} and {shown(corrupt)}.")
        if clean.shape != corrupt.shape or not len(as_input(model, clean)):
            raise InputError(
                f"Expected pairs, one corrupt input for each clean: {clean.shape} against {corrupt.shape}."
            )
        if isinstance(model, HookedText) and not _alike(model, clean, corrupt):
            raise InputError(
                "Expected pairs of texts of the same length: here they end at other tokens, so what is masked or read "
                "at the end differs, which no edge carries."
            )
        blocks, layered = model.spec.blocks, re.compile(r"blocks\.\d+\.(attn\.|hook_[qkv]_input|ln1\.)")
        names = [name for name in model.hook_points() if name.startswith("blocks.") and not layered.match(name)]
        names += [name for name in model.hook_points() if ".ln1." in name and blocks[0].kind == "parallel"]
        refuse_open(model, names, "what edges carry is computed there")
        attn = blocks[0].attn
        for layer, block in enumerate(blocks):
            normed = block.kind == "res_post" and (block.ln1 is not None)
            problem = {
                "norms the stream itself": block.kind == "post",
                "norms the sum of its heads": normed,
                "has several attentions side by side": block.n_parallel > 1,
                "shares keys and values among heads": block.attn.n_kv_heads != block.attn.n_heads,
                "has another number of heads than the first": block.attn.n_heads != attn.n_heads,
                "reads otherwise than the first": (block.kind == "parallel") != (blocks[0].kind == "parallel"),
            }
            for what, true in problem.items():
                if true:
                    raise NotApplicable(f"Layer {layer} {what}, so its heads are no nodes that write to the stream.")
        mlps = tuple(layer for layer, block in enumerate(blocks) if block.mlp is not None)
        parallel = blocks[0].kind == "parallel"
        return cls(model, Shape(len(blocks), attn.n_heads, model.spec.d_model, parallel, mlps))

    @torch.no_grad()
    def outputs(self, inputs: Tensor) -> Tensor:
        """Return what each source writes to the stream: ``[source batch pos d_model]``."""
        names = [
            "blocks.0.hook_resid_pre",
            "*hook_result",
            *(f"blocks.{layer}.hook_mlp_out" for layer in self.shape.mlps),
        ]
        _, cache = self.model.run_with_cache(inputs, names=names, output=False)
        written = [cache["blocks.0.hook_resid_pre"][None]]
        for layer in range(self.shape.n_layers):
            written.append(self._scaled(layer, cache["result", layer]).movedim(2, 0))
            written += [cache["mlp_out", layer][None]] if layer in self.shape.mlps else []
        return torch.cat(written)

    def gradients(self, clean: Tensor, shift: Tensor, loss: Metric) -> dict[tuple[str, ...], Tensor]:
        """Return the gradient of the metric by what targets read, for targets of one layer and kind together.

        Args:
            clean: the inputs.
            shift: added to the stream before the first block.
            loss: the metric's sum over images.

        Returns:
            by the names of the targets: ``[batch pos target d_model]``.
        """
        zeros: dict[tuple[str, ...], Tensor] = {}

        def moved(targets: tuple[str, ...], x: Tensor) -> Tensor:
            zeros[targets] = torch.zeros(*x.shape[:2], len(targets), x.shape[-1]).to(x).requires_grad_()
            return x + zeros[targets].view(x.shape)

        def start(x: Tensor, at: HookContext) -> Tensor:
            return x + shift

        with taking_gradients():
            output = self.model.run_with_hooks(clean, hooks=self._hooks(moved, start, lambda written, at: written))
            gradients = torch.autograd.grad(loss(output), list(zeros.values()))
        return dict(zip(zeros, gradients, strict=True))

    @torch.no_grad()
    def run(self, circuit: Circuit, clean: Tensor, theirs: Tensor) -> Tensor:
        """Return the output where edges outside the circuit carry what sources write in the corrupt run.

        Args:
            circuit: the edges that carry this run.
            clean: the inputs.
            theirs: what sources write in the corrupt run: ``[source batch pos d_model]``.
        """
        outside = self.shape.real() & ~circuit.kept
        change = list[Tensor]()

        def read(targets: tuple[str, ...], x: Tensor) -> Tensor:
            n, columns = self.shape.before(targets[0]), [self.shape.targets.index(target) for target in targets]
            mask = outside[:n, columns].to(x)
            if not mask.any():
                return x
            moved = einsum(torch.cat(change)[:n], mask, "source batch pos d, source target -> batch pos target d")
            return x + moved.view(x.shape)

        def write(written: Tensor, at: HookContext) -> Tensor:
            n = sum(map(len, change))
            rows = written.movedim(2, 0) if written.ndim == 4 else written[None]
            change.append(theirs[n : n + len(rows)] - rows)
            return written

        def start(x: Tensor, at: HookContext) -> Tensor:
            return write(x, at)

        return self.model.run_with_hooks(clean, hooks=self._hooks(read, start, write))

    def _hooks(
        self, read: Callable[[tuple[str, ...], Tensor], Tensor], start: NodeHook, write: NodeHook
    ) -> dict[str, NodeHook]:
        """Return hooks that pass what each target reads through ``read``, and show ``write`` what sources write."""
        shape, hooks = self.shape, dict[str, NodeHook]()
        for layer in range(shape.n_layers):
            for kind in QKV:
                targets = tuple(f"a{layer}.h{head}<{kind}>" for head in range(shape.n_heads))
                hooks[f"blocks.{layer}.hook_{kind}_input"] = lambda x, at, targets=targets: read(targets, x)
            hooks[f"blocks.{layer}.attn.hook_result"] = self._result_hook(layer, write)
            if layer in shape.mlps:
                hooks |= self._mlp_hooks(layer, read, write)
        hooks["blocks.0.hook_resid_pre"] = self._both(hooks.get("blocks.0.hook_resid_pre"), start)
        end = f"blocks.{shape.n_layers - 1}.hook_resid_post"
        hooks[end] = lambda x, at: read(("logits",), x)
        return hooks

    def _result_hook(self, layer: int, write: NodeHook) -> NodeHook:
        def result(x: Tensor, at: HookContext) -> Tensor:
            write(self._scaled(layer, x), at)
            return x

        return result

    def _mlp_hooks(
        self, layer: int, read: Callable[[tuple[str, ...], Tensor], Tensor], write: NodeHook
    ) -> dict[str, NodeHook]:
        """Return hooks that run an MLP again on what it is to read, since the stream itself must stay as it is."""
        block, held = self.model.blocks[layer], list[Tensor]()
        parallel = self.shape.parallel

        def hold(x: Tensor, at: HookContext) -> Tensor:
            held[:] = [x]
            return x

        def out(x: Tensor, at: HookContext) -> Tensor:
            stream = held.pop()
            moved = read((f"m{layer}",), stream)
            if moved is not stream:
                norm = block.ln1 if parallel else block.ln2
                after = block.spec.kind == "res_post"
                made = block.mlp(moved if after else norm(moved))
                x = block.ls2(norm(made) if after else made)
            return write(x, at)

        place = "hook_resid_pre" if parallel else "hook_resid_mid"
        return {f"blocks.{layer}.{place}": hold, f"blocks.{layer}.hook_mlp_out": out}

    @staticmethod
    def _both(first: NodeHook | None, second: NodeHook) -> NodeHook:
        if first is None:
            return second
        return lambda x, at: first(second(x, at), at)

    def _scaled(self, layer: int, result: Tensor) -> Tensor:
        scale = self.model.blocks[layer].ls1
        return result * scale.gamma.to(result) if hasattr(scale, "gamma") else result


def _alike(model: HookedText, clean: Tensor, corrupt: Tensor) -> bool:
    """Return whether two batches of texts have their padding, and what is pooled, at the same tokens."""
    pad = model.spec.pad_id
    padded = pad is None or torch.equal(clean == pad, corrupt == pad)
    return padded and torch.equal(model.shares(clean), model.shares(corrupt))
