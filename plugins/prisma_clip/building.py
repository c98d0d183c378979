"""open_clip's models: built as a configuration says, filled from a file, and what they do to images."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from prisma_clip import tinyclip
from prisma_core.plugin import (
    LoadError,
    Preprocess,
    check_claims,
    check_layers,
    check_shapes,
    code_in,
    hub,
    read_checkpoint,
    read_json,
    without_code,
)

CONFIG = "open_clip_config.json"
# What open_clip and torch raise over sizes and names that make no model.
_REFUSALS = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ArithmeticError, AssertionError)


def create(name: str, options: dict[str, Any], text: Mapping[str, Any] | None = None) -> nn.Module:
    """Return a model with random weights; no code that a text tower's configuration names is run.

    Args:
        name: known to open_clip, or ``local-dir:FOLDER``.
        options: of ``open_clip.create_model``.
        text: the configuration of the text tower, where open_clip does not know the name.

    Raises:
        LoadError: the configuration of a text tower of transformers cannot be read or reached.
    """
    import open_clip

    text = (open_clip.get_model_config(name) or {}).get("text_cfg", {}) if text is None else text
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)  # it warns that weights are random; they are about to be filled, or asked to be so
    try:
        with warnings.catch_warnings(action="ignore"), _text_tower(options.get("text_cfg", text), name) as tower:
            return open_clip.create_model(
                name, load_weights=False, pretrained_text=False, device=torch.get_default_device(), **options | tower
            )
    finally:
        logger.setLevel(before)


@contextmanager
def _text_tower(text: Any, name: str) -> Iterator[dict[str, Any]]:
    """Yield what open_clip is to be told of a text tower of transformers, whose files name no code."""
    repository = text.get("hf_model_name") if isinstance(text, Mapping) else None
    if not repository:
        yield {}
        return
    if not isinstance(repository, str):
        raise LoadError(f"The text tower of {name} is named {repository!r}: expected the name of a repository.")
    reference = f"the configuration of open_clip:{name}'s text tower, {repository},"
    local = Path(repository).is_dir()
    folder = Path(repository) if local else hub.fetch(repository, ["config.json"], reference=reference).parent
    with without_code(folder) as files:
        try:
            yield {"text_cfg": {**text, "hf_model_name": str(files), "hf_model_pretrained": False}}
        except (OSError, ValueError) as error:
            problem = str(error).partition(". ")[0].rstrip(".")
            raise LoadError(f"{reference} cannot be used: {problem}.{code_in(folder)}") from error


def create_from(
    config: dict[str, Any], options: dict[str, Any], where: object, held: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Return the model of a configuration that open_clip does not know by name, with random weights.

    Args:
        config: as ``read_config`` returns it.
        options: of ``open_clip.create_model``.
        where: the configuration's file, for messages.
        held: the tensors of its file of weights, which may lie on the meta device; None if it has none.

    Raises:
        LoadError: it makes no model, or a larger one than its file or this machine holds.
    """
    check_layers(config["model_cfg"], held, where)
    with torch.device("meta"):
        check_claims(_created_from(config, options, where), held, where)
    return _created_from(config, options, where)


def _created_from(config: dict[str, Any], options: dict[str, Any], where: object) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(json.dumps({"model_cfg": config["model_cfg"], "preprocess_cfg": {}}))
        try:
            return create(f"local-dir:{folder}", options, config["model_cfg"]["text_cfg"])
        except _REFUSALS as error:
            problem = str(error).partition("\n")[0]  # torch adds where it stood
            raise LoadError(f"open_clip cannot build the configuration {where}: {problem}") from error


def create_tinyclip(path: str | Path, options: dict[str, Any], key: str | None = None) -> nn.Module:
    """Return open_clip's model of TinyCLIP's original checkpoint, filled; its spec is read from the weights' shapes.

    Raises:
        LoadError: the file cannot be read safely, or its weights are not those of a transformer with heads of 64.
    """
    state = tinyclip.unwrapped(read_checkpoint(path, key))
    model = create_from({"model_cfg": tinyclip.config(state, path)}, options, path, state)
    tinyclip.narrow(model, state, path)
    fill(model, path, sizes=bool(options), key=key)
    return model


def read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    whole = config if "model_cfg" in config else {"model_cfg": config}
    model = whole["model_cfg"]
    if not isinstance(model, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(model):
        raise LoadError(f"{path} is no configuration of open_clip: expected embed_dim, vision_cfg and text_cfg.")
    return whole


def fill(model: Any, path: str | Path, *, sizes: bool, key: str | None = None) -> None:
    """Put a checkpoint into a model, every tensor accounted for.

    Args:
        model: built.
        path: of a file.
        sizes: whether positions of another size are resized, as open_clip does: only where the user asked for a size.
        key: which state dict of a file with several.

    Raises:
        LoadError: the file cannot be read safely, or does not fit.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed

    state = tinyclip.unwrapped(read_checkpoint(path, key))
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        if name in state and isinstance(getattr(model, name, None), Tensor):
            state[name] = state[name].reshape(getattr(model, name).shape)
    wanted = model.state_dict()
    for constant in ("text.transformer.embeddings.position_ids", *tinyclip.CONSTANTS):
        if constant not in wanted:
            state.pop(constant, None)
    if sizes:
        resize_pos_embed(state, model)
        resize_text_pos_embed(state, model)
    check_shapes(state, wanted, path)
    model.load_state_dict(state)


# -------------------------------------------------------------------- images


def set_preprocessing(model: nn.Module, config: dict[str, Any], options: dict[str, Any]) -> None:
    """Note how images were prepared in training, or as these options say."""
    from open_clip.transform import merge_preprocess_dict

    visual: Any = model.visual
    size = visual.preprocess_cfg["size"]
    visual.preprocess_cfg = merge_preprocess_dict(
        merge_preprocess_dict(visual.preprocess_cfg, config),
        {"size": size, **(options.get("force_preprocess_cfg") or {})},
    )


def preprocess(config: dict[str, Any]) -> Preprocess:
    """Return what open_clip's evaluation transform does, given its preprocessing configuration.

    Raises:
        LoadError: it does something we cannot repeat.
    """
    if config.get("fill_color") and config.get("resize_mode") == "longest":
        raise LoadError(f"open_clip pads images with the colour {config['fill_color']}; only black can be repeated.")
    try:
        return _preprocess(config)
    except (ValidationError, TypeError, ValueError, KeyError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise LoadError(
            f"Images cannot be prepared as this configuration says ({str(config)[:200]}): {reason}."
        ) from error


def _preprocess(config: dict[str, Any]) -> Preprocess:
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    # Images that are cut to something other than a square are resized by another function, always bicubic.
    always = config["resize_mode"] == "shortest" and height != width
    return Preprocess(
        size=(height, width),
        resize=config["resize_mode"],
        # "random" stands for training.
        interpolation="bilinear" if config["interpolation"] == "bilinear" and not always else "bicubic",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
