"""The tuned lens: an affine translator for each layer, trained so that its logits equal those of the last layer.

Equation:
    lens_l(x) = head(norm(x + A_l x + b_l)); A_l, b_l minimise the mean over tokens of
    KL(softmax(lens_final) || softmax(lens_l)). They start at zero, so the logit lens is where training starts.
Cost:
    One pass over the data for each epoch and one product with the head for each layer and token, with its gradient;
    d_model^2 + d_model numbers for each layer.
Misleads:
    A translator learns what the last layer will say, which the layer itself may not know yet. A lens belongs to one
    head: ``unembed_hash`` says which. Measure it on images it was not fitted on.
Source:
    Belrose et al., "Eliciting Latent Predictions from Transformers with the Tuned Lens" (2023); the files are those of
    its library, tuned-lens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prisma_core import HookedModel, HookedText, HookedViT, InputError, LoadError, NotApplicable, Result
from prisma_core.plugin import (
    Above,
    Count,
    blaming,
    check_shapes,
    checked,
    digest,
    place,
    read_checkpoint,
    read_json,
    replacing_both,
    save_objects,
    settled,
    shown,
    taking_gradients,
    widened,
)
from prisma_lens.bar import bar
from prisma_lens.inputs import as_batches
from prisma_lens.readouts import Readout, Target, TowerName, cache_of, readout, token_outputs, tower_of

TokenSubset = Literal["all", "cls", "patches", "prefix", "registers"]
_NAMES = ("*.hook_resid_pre", "*.hook_resid_post")
_CONFIG, _PARAMS, _DIGEST = "config.json", ("params.pt", "params.safetensors"), "sha256"


class TunedLens(nn.Module):
    """Affine translators of the stream before each block, added to it: ``x + A_l x + b_l``.

    Attributes:
        layer_translators: one for each block.
        config: in tuned-lens' form: ``base_model_name_or_path``, ``d_model``, ``num_hidden_layers``, ``unembed_hash``.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        width, bias = config["d_model"], config.get("bias", True)
        self.layer_translators = nn.ModuleList(
            nn.Linear(width, width, bias=bias) for _ in range(config["num_hidden_layers"])
        )
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    @classmethod
    @checked
    def of(cls, model: HookedViT | HookedText) -> TunedLens:
        """Return translators of a model that leave its stream as it is."""
        config = {
            "base_model_name_or_path": model.reference or type(model).__name__,
            "d_model": model.spec.d_model,
            "num_hidden_layers": len(model.spec.blocks),
            "bias": True,
            "base_model_revision": None,
            "unembed_hash": unembed_hash(model),
            "lens_type": "linear_tuned_lens",
        }
        return cls(config).to(widened(next(model.parameters())))  # steps of Adam vanish in half precision

    def __len__(self) -> int:
        return len(self.layer_translators)

    @checked
    def translate(self, stream: Tensor, layer: int) -> Tensor:
        """Return the stream before a block as the last layer would write it: ``[... d_model]``.

        Raises:
            InputError: there is no such block, or the stream is of another width.
        """
        if not -len(self) <= layer < len(self) or stream.shape[-1:] != (self.config["d_model"],):
            raise InputError(
                f"Expected a stream [... {self.config['d_model']}] before one of {len(self)} blocks; got "
                f"{list(stream.shape)} and layer {layer}."
            )
        linear = cast(nn.Linear, self.layer_translators[layer])
        bias = None if linear.bias is None else linear.bias.to(stream)
        return stream + nn.functional.linear(stream, linear.weight.to(stream), bias)

    @checked
    def check(self, model: HookedViT | HookedText) -> None:
        """Refuse a model whose head is another one.

        Raises:
            InputError: with what differs.
        """
        here = {
            "d_model": model.spec.d_model,
            "num_hidden_layers": len(model.spec.blocks),
            "unembed_hash": unembed_hash(model),
        }
        wrong = {key: value for key, value in here.items() if self.config.get(key) not in (None, value)}
        if wrong:
            differs = ", ".join(f"{key} {self.config[key]!s:.12} here {value!s:.12}" for key, value in wrong.items())
            raise InputError(
                f"This lens was fitted for {self.config.get('base_model_name_or_path')}, whose head is another one "
                f"({differs}): fit one for this model with fit_tuned_lens."
            )

    @checked
    def save(self, folder: str | Path, *, safetensors: bool = False) -> Path:
        """Write ``config.json`` and ``params.pt``, as tuned-lens reads them; after a kill the old ones or the new ones.

        Args:
            folder: made if it is not there.
            safetensors: write ``params.safetensors`` instead, which ``load`` reads and tuned-lens does not.

        Raises:
            LoadError: the disk refuses.
        """
        folder = Path(folder)
        state = {name: x.detach().cpu().contiguous() for name, x in self.layer_translators.state_dict().items()}
        name, other = reversed(_PARAMS) if safetensors else _PARAMS
        sha256 = digest(state)
        with replacing_both(folder / name, folder / _CONFIG, sha256, folder / other) as (params, config):
            (save_file if safetensors else save_objects)(state, params)
            config.write_text(json.dumps({**self.config, _DIGEST: {name: sha256}}, indent=1), encoding="utf-8")
        return folder

    @classmethod
    @checked
    def load(cls, folder: str | Path) -> TunedLens:
        """Read a folder that ``save`` or tuned-lens wrote; nothing in it is run.

        Raises:
            LoadError: a file is missing, corrupt, or of another kind of lens.
        """
        return settled(Path(folder) / _CONFIG, lambda: cls._read(Path(folder)))

    @classmethod
    def _read(cls, folder: Path) -> TunedLens:
        config = read_json(folder / _CONFIG)
        digests = config.pop(_DIGEST, None)
        width, depth, bias = (config.get(key, True) for key in ("d_model", "num_hidden_layers", "bias"))
        if type(width) is not int or type(depth) is not int or type(bias) is not bool:
            raise LoadError(f"{folder} holds no tuned lens: expected {_CONFIG} with d_model and num_hidden_layers.")
        name = next((name for name in _PARAMS if isinstance(digests, dict) and name in digests), None)
        file = place(folder, name, digests[name]) if name else folder / _PARAMS[1]
        state = read_checkpoint(file if name or file.is_file() else folder / _PARAMS[0])
        if name and digest(state) != digests[name]:
            raise LoadError(f"{file} holds other weights than {_CONFIG} was written with: save the lens again.")
        if len(state) != depth * (1 + bias):  # before anything is made of a count
            raise LoadError(f"{file} holds {len(state)} tensors, and {_CONFIG} describes {depth} translators.")
        shapes = {f"{layer}.weight": torch.Size((width, width)) for layer in range(depth)}
        shapes |= {f"{layer}.bias": torch.Size((width,)) for layer in range(depth) if bias}
        check_shapes(state, shapes, file)
        lens = cls(config)
        lens.layer_translators.load_state_dict(state)
        return lens


@checked
def unembed_hash(model: HookedViT | HookedText) -> str | None:
    """Return tuned-lens' hash of a head's weights, or None for a model without one.

    It is of the weights as numpy prints them with one decimal: of large heads the corners alone.

    >>> import prisma_core as prisma
    >>> len(unembed_hash(prisma.load("toy:scenes-3l")))
    64
    """
    if model.spec.n_classes is None or not hasattr(model, "head"):
        return None
    weight = model.head.weight.detach().cpu().float().numpy()
    return hashlib.sha256(np.array_str(weight, precision=1).encode()).hexdigest()


@checked
def fit_tuned_lens(
    model: HookedModel,
    train: Iterable[Tensor],
    *,
    target: Target | None = None,
    tokens: TokenSubset = "all",
    epochs: Count = 1,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    lr: Above = 1e-3,
    start: TunedLens | None = None,
    tower: TowerName = "vision",
    progress: bool | None = None,
    **options: Any,
) -> TunedLens:
    """Fit a tuned lens on batches of images (or tokens of texts, for a text tower).

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> lens = fit_tuned_lens(model, [torch.rand(4, 3, 96, 96)], progress=False)
    >>> len(lens)
    3

    Args:
        model: as in ``logit_lens``; it stays as it is.
        train: batches; a list or a loader that can be gone through ``epochs`` times.
        target: texts or directions that make the logits, where the model has no head of classes (see ``readout``).
        tokens: which tokens are fitted; each to its own reading after the last layer.
        epochs: passes over the batches.
        optimizer: a class of ``torch.optim``.
        lr: its learning rate.
        start: a lens to go on from, such as one that was saved after some epochs; None starts from the logit lens.
        tower: of a dual encoder, whose stream.
        progress: show a bar; None shows one on a terminal.
        options: of the optimizer.

    Raises:
        InputError: there are no batches, or none are left in a later epoch.
        NotApplicable: as in ``logit_lens``; or the model is a dual encoder, and there is no target.
    """
    own, read = tower_of(model, tower), _logits(model, target, tower)
    lens = TunedLens.of(own)
    if start is not None:
        start.check(own)
        lens = TunedLens(start.config).to(next(lens.parameters()))
        lens.load_state_dict(start.state_dict())
    with blaming(optimizer, f"optimizer={shown(optimizer)}", InputError):
        solver = optimizer(lens.parameters(), lr=lr, **options)
    frozen = {parameter: parameter.requires_grad for parameter in own.parameters()}
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        for epoch in range(epochs):
            seen = 0
            for batch, _ in bar(as_batches(train), f"Epoch {epoch + 1} of {epochs}", progress):
                streams, final = _streams(model, own, batch, tokens, tower, read)
                with taking_gradients():
                    loss = torch.stack(
                        [_kl(final, read(lens.translate(x, at))).mean() for at, x in enumerate(streams)]
                    ).sum()
                    solver.zero_grad()
                    loss.backward()
                solver.step()
                seen += 1
            if not seen:
                raise InputError(
                    "There are no batches: expected images [batch channel height width], one batch after another."
                    if epoch == 0
                    else f"No batches are left for epoch {epoch + 1} of {epochs}, for a generator can be gone through "
                    "once: give a list of batches, or a DataLoader."
                )
    finally:
        for parameter, required in frozen.items():
            parameter.requires_grad_(required)
    return lens.requires_grad_(False).eval()


@checked
@torch.no_grad()
def lens_kl(
    model: HookedModel,
    held_out: Iterable[Tensor],
    tuned: TunedLens | None = None,
    *,
    target: Target | None = None,
    tokens: TokenSubset = "all",
    tower: TowerName = "vision",
) -> Result:
    """Return how far each layer's reading is from the last one's, plain and tuned: ``[layer lens]``, in nats.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> lens_kl(model, [torch.rand(4, 3, 96, 96)]).shape
    {'layer': 3, 'lens': 1}

    Args:
        model, target, tokens, tower: as in ``fit_tuned_lens``.
        held_out: batches that the lens was not fitted on.
        tuned: the lens; None measures the logit lens alone.

    Raises:
        InputError: there are no batches, or the lens is another model's.
    """
    own, read = tower_of(model, tower), _logits(model, target, tower)
    if tuned is not None:
        tuned.check(own)
    total, n = torch.zeros(len(own.spec.blocks), 1 if tuned is None else 2, dtype=torch.float64), 0
    for batch, _ in as_batches(held_out):
        streams, final = _streams(model, own, batch, tokens, tower, read)
        for at, x in enumerate(streams):
            for column, each in enumerate([x] if tuned is None else [x, tuned.translate(x, at)]):
                total[at, column] += _kl(final, read(each)).double().sum().cpu()
        n += final.shape[:-1].numel()
    if not n:
        raise InputError("There are no held-out batches.")
    return Result(
        total / n,
        ("layer", "lens"),
        {"layer": tuple(f"{at}_pre" for at in range(len(total))), "lens": ("logit", "tuned")[: total.shape[1]]},
        technique="lens_kl",
        unit="nats",
        baseline="the reading after the last layer",
        facts={"tokens": tokens, "n_tokens": n},
    )


def _logits(model: HookedModel, target: Target | None, tower: TowerName) -> Callable[[Tensor], Tensor]:
    own: Any = tower_of(model, tower)
    reading: Readout | None = None if target is None else readout(model, target, tower=tower)
    if reading is None and (model is not own or own.spec.n_classes is None):
        raise NotApplicable(
            "This model has no head of classes: give target=, texts or directions that make the logits."
        )
    return lambda x: token_outputs(own, x) if reading is None else reading(token_outputs(own, x))


def _streams(
    model: HookedModel, own: Any, batch: Tensor, tokens: TokenSubset, tower: TowerName, read: Callable[[Tensor], Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Return the streams before each block and the logits of the last one, of the tokens that are fitted."""
    with torch.no_grad():
        cache = cache_of(model, batch, lambda each: each.resolve(_NAMES), tower)
        *streams, last = cache.accumulated_resid()
        if tokens != "all":
            if cache.layout is None:
                raise NotApplicable(f"This model has no token layout, so tokens={tokens!r} means nothing.")
            where = cache.layout.slice(tokens)
            streams, last = [x[:, where] for x in streams], last[:, where]
        return streams, read(last)


def _kl(final: Tensor, logits: Tensor) -> Tensor:
    truth, logits = widened(final).log_softmax(-1), widened(logits)
    return (truth.exp() * (truth - logits.log_softmax(-1))).sum(-1)
