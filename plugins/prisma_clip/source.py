"""The source ``open_clip:``: models by name, trained from the hub, or with weights and configuration from files."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prisma_core.conformance.case import Case
from prisma_core.errors import LoadError, UnknownName, suggest
from prisma_core.files import check_shapes, read_checkpoint
from prisma_core.preprocess import Preprocess
from prisma_core.sources import Loaded, ModelInfo, Source

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


class OpenClipSource(Source):
    """``open_clip:MODEL@TAG``, ``open_clip:MODEL@FILE``, ``open_clip:CONFIG.json@FILE``, ``open_clip:FOLDER``.

    A folder holds a configuration and weights, as open_clip leaves them on the hub. Options go to
    ``open_clip.create_model``, such as ``pretrained=False``, ``force_image_size=336``.
    """

    name = "open_clip"
    library = "open_clip"
    install = 'pip install "prisma-interp[clip]"'

    def load(self, rest: str, *, pretrained: bool = True, **options: Any) -> Loaded:
        name, _, which = rest.partition("@")
        if Path(name).is_dir():
            return _from_folder(Path(name), pretrained, options)
        if name.endswith(".json"):
            return _from_config(Path(name), which, pretrained, options)
        if which and Path(which).is_file() and not _known(name):
            from prisma_clip import tinyclip

            if tinyclip.is_one(which):
                return _loaded(tinyclip.load(which, **options), Tokenizer())
        _check_name(name, which)
        if not pretrained:
            model = _create(name, _as_trained(name, which) | options)
        elif _is_tag(name, which):
            weights = _fetched(name, which)
            model = _create(name, _as_trained(name, which) | options)
            fill(model, weights, sizes=bool(options))
            _set_preprocessing(model, _tag(name, which))
        elif which:
            model = _create(name, options)
            fill(model, which, sizes=bool(options))
        else:
            raise LoadError(
                f"open_clip:{name} names no trained weights. {_tags_of(name)} Load open_clip:{name}@TAG, "
                f"open_clip:{name}@FILE, or give pretrained=False for random weights."
            )
        return _loaded(model, Tokenizer(name, options.get("force_context_length")))

    def models(self) -> Iterator[ModelInfo]:
        import open_clip

        for name in open_clip.list_models():
            config: Any = open_clip.get_model_config(name)
            tags = open_clip.list_pretrained_tags_by_model(name)
            family = config["vision_cfg"].get("timm_model_name") or "open_clip"
            yield ModelInfo(f"open_clip:{name}", family, bool(tags), f"tags: {', '.join(tags)}" if tags else "")

    def loadable(self, rests: Collection[str]) -> Collection[str] | None:
        from prisma_clip.cases import case

        return {rest for rest in rests if case(rest) is not None or _bert(rest)}

    def case(self, rest: str) -> Case | None:
        from prisma_clip.cases import case

        return case(rest.partition("@")[0])


def preprocess(config: dict[str, Any]) -> Preprocess:
    """Return what open_clip's evaluation transform does, given its preprocessing configuration.

    Raises:
        LoadError: it does something we cannot repeat.
    """
    if config.get("fill_color") and config["resize_mode"] == "longest":
        raise LoadError(f"open_clip pads pictures with the colour {config['fill_color']}; only black can be repeated.")
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    # Pictures that are cut to something other than a square are resized by another function, always bicubic.
    always = config["resize_mode"] == "shortest" and height != width
    return Preprocess(
        size=(height, width),
        resize=config["resize_mode"],
        # "random" stands for training.
        interpolation="bilinear" if config["interpolation"] == "bilinear" and not always else "bicubic",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


class Tokenizer:
    """A model's own tokenizer, made at first use: some come from the hub."""

    def __init__(self, name: str = "", context: int | None = None, folder: Path | None = None):
        self.name = name
        self.context = context
        self.folder = folder
        self._made: Any = None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        if self._made is None:
            self._made = self._make()
        return self._made(list(texts))

    def _make(self) -> Any:
        import open_clip

        if self.folder is not None:
            return open_clip.get_tokenizer(f"local-dir:{self.folder}", context_length=self.context)
        repository = (open_clip.get_model_config(self.name) or {}).get("text_cfg", {}).get("hf_tokenizer_name")
        make = partial(open_clip.get_tokenizer, self.name, context_length=self.context)
        if repository is None:
            return make()
        from prisma_core.hub import asking, cached, reach

        reference = f"the tokenizer of open_clip:{self.name}, {repository},"
        if cached(repository, ["tokenizer_config.json", "tokenizer.json"]) is None:
            reach(reference, instead="Set model.tokenizer, or give tokens [text pos].")
        return asking(reference, make)


# -------------------------------------------------------------------- building


def _create(name: str, options: dict[str, Any]) -> nn.Module:
    import open_clip

    text = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
    if (repository := text.get("hf_model_name")) and "text_cfg" not in options:
        from prisma_core.hub import fetch  # open_clip asks the hub for it; if it cannot come, that is one short error

        fetch(
            repository, ["config.json"], reference=f"the configuration of open_clip:{name}'s text tower, {repository},"
        )
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)  # it warns that weights are random; they are about to be filled, or asked to be so
    try:
        with warnings.catch_warnings(action="ignore"):
            return open_clip.create_model(
                name, load_weights=False, pretrained_text=False, device=torch.get_default_device(), **options
            )
    finally:
        logger.setLevel(before)


def _loaded(model: nn.Module, tokenizer: Tokenizer) -> Loaded:
    visual: Any = model.visual
    return Loaded(model.eval(), preprocess(visual.preprocess_cfg), tokenizer=tokenizer)


def _as_trained(name: str, tag: str) -> dict[str, Any]:
    """Return the activation that a tag's weights were trained with, where the configuration has another one.

    open_clip builds what the configuration says, and warns. Weights and activation belong together.
    """
    import open_clip

    if not _is_tag(name, tag):
        return {}
    config: Any = open_clip.get_model_config(name)
    trained = bool(_tag(name, tag).get("quick_gelu", False))
    return {} if trained == bool(config.get("quick_gelu", False)) else {"quick_gelu": trained}


def _from_folder(folder: Path, pretrained: bool, options: dict[str, Any]) -> Loaded:
    config = _read_config(folder / CONFIG)
    files = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if pretrained and not files:
        raise LoadError(f"{folder} holds none of {', '.join(WEIGHTS)}. Give pretrained=False for random weights.")
    model = create_from(config, options)
    if pretrained:
        fill(model, files[0], sizes=bool(options))
    _set_preprocessing(model, config.get("preprocess_cfg", {}))
    return _loaded(model, Tokenizer(folder=folder.resolve()))


def _from_config(path: Path, checkpoint: str, pretrained: bool, options: dict[str, Any]) -> Loaded:
    config = _read_config(path)
    if pretrained and not checkpoint:
        raise LoadError(
            f"open_clip:{path} names no weights: expected open_clip:{path}@CHECKPOINT, or pretrained=False."
        )
    model = create_from(config, options)
    if pretrained:
        fill(model, checkpoint, sizes=bool(options))
    _set_preprocessing(model, config.get("preprocess_cfg", {}))
    return _loaded(model, Tokenizer())


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoadError(f"No file at {path}.") from error
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} is not a readable configuration: {error}") from error
    whole = config if isinstance(config, dict) and "model_cfg" in config else {"model_cfg": config}
    model = whole["model_cfg"]
    if not isinstance(model, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(model):
        raise LoadError(f"{path} is no configuration of open_clip: expected embed_dim, vision_cfg and text_cfg.")
    return whole


def create_from(config: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    """Return the model of a configuration that open_clip does not know by name."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(json.dumps({"model_cfg": config["model_cfg"], "preprocess_cfg": {}}))
        try:
            return _create(f"local-dir:{folder}", options)
        except TypeError as error:
            raise LoadError(f"open_clip cannot build this configuration: {error}") from error


def _set_preprocessing(model: nn.Module, config: dict[str, Any]) -> None:
    from open_clip.transform import merge_preprocess_dict

    visual: Any = model.visual
    size = visual.preprocess_cfg["size"]
    visual.preprocess_cfg = {**merge_preprocess_dict(visual.preprocess_cfg, config), "size": size}


# -------------------------------------------------------------------- weights


def fill(model: Any, path: str | Path, *, sizes: bool) -> None:
    """Put a checkpoint into a model, every tensor accounted for.

    Args:
        model: built.
        path: of a file.
        sizes: whether positions of another size are resized, as open_clip does: only where the user asked for a size.

    Raises:
        LoadError: the file cannot be read safely, or does not fit.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed

    from prisma_clip import tinyclip

    state = tinyclip.unwrapped(read_checkpoint(path))
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        if name in state and isinstance(getattr(model, name, None), Tensor):
            state[name] = state[name].reshape(getattr(model, name).shape)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for constant in ("text.transformer.embeddings.position_ids", *tinyclip.CONSTANTS):
        if constant not in wanted:
            state.pop(constant, None)
    if sizes:
        resize_pos_embed(state, model)
        resize_text_pos_embed(state, model)
    check_shapes(state, wanted, path)
    model.load_state_dict(state)


def _fetched(name: str, tag: str) -> Path:
    from prisma_core.hub import fetch

    reference = f"open_clip:{name}@{tag}"
    hub = _tag(name, tag).get("hf_hub", "")
    repository, _, filename = hub.rpartition("/")
    if not repository:
        raise LoadError(
            f"The weights of {reference} are not on the hub. Download them, and load open_clip:{name}@FILE."
        )
    names = [filename] if filename else list(WEIGHTS)
    if filename.endswith((".bin", ".pth", ".pt")):
        names.insert(0, filename.rpartition(".")[0] + ".safetensors")
    return fetch(repository, names, reference=reference)


# -------------------------------------------------------------------- names


def _known(name: str) -> bool:
    import open_clip

    return name in open_clip.list_models()


def _is_tag(name: str, which: str) -> bool:
    return bool(which) and bool(_tag(name, which))


def _tag(name: str, tag: str) -> dict[str, Any]:
    import open_clip

    return open_clip.get_pretrained_cfg(name, tag)


def _tags_of(name: str) -> str:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    return f"Its tags: {', '.join(tags)}." if tags else "It has no tags."


def _bert(name: str) -> bool:
    """Return whether a model has a plain vision tower of open_clip's own, and reads with a RoBERTa of transformers'."""
    import open_clip

    config: Any = open_clip.get_model_config(name)
    kind = config["text_cfg"].get("hf_model_name", "")  # a name on the hub: what it is stands there alone
    return "roberta" in kind and isinstance(config["vision_cfg"].get("layers"), int)


def _check_name(name: str, which: str) -> None:
    """Refuse a model or tag that open_clip does not have.

    Raises:
        UnknownName: with the nearest ones.
        LoadError: what stands behind the @ looks like a file, and is none.
    """
    import open_clip

    if not _known(name):
        if "/" in name or name.startswith("."):
            raise LoadError(f"No folder at {name}: expected one with {CONFIG} and weights, or a name of open_clip's.")
        near = suggest(name, open_clip.list_models())
        raise UnknownName(f"open_clip has no model {name!r}.{near} `prisma models {name}` searches them.")
    if not which or _is_tag(name, which) or Path(which).is_file():
        return
    if Path(which).suffix in (".pt", ".pth", ".bin", ".safetensors") or "/" in which:
        raise LoadError(f"No file at {which}.")
    near = suggest(which, open_clip.list_pretrained_tags_by_model(name))
    raise UnknownName(f"open_clip's {name} has no tag {which!r}.{near} {_tags_of(name)}")
