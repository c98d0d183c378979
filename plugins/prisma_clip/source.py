"""The source ``open_clip:``: models by name, trained from the hub, or with weights and configuration from files."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from prisma_clip import texts, tinyclip
from prisma_clip.building import (
    CONFIG,
    create,
    create_from,
    create_tinyclip,
    fill,
    preprocess,
    read_config,
    set_preprocessing,
)
from prisma_clip.texts import Tokenizer
from prisma_core.plugin import (
    Case,
    InputError,
    Loaded,
    LoadError,
    ModelInfo,
    Source,
    UnknownName,
    read_outline,
    suggest,
)

WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


class OpenClipSource(Source):
    """``open_clip:MODEL@TAG``, ``open_clip:MODEL@FILE``, ``open_clip:CONFIG.json@FILE``, ``open_clip:FOLDER``.

    A folder holds a configuration and weights, as open_clip leaves them on the hub. ``key`` says which state dict of a
    file with several, such as ``state_dict_ema``. Other options go to ``open_clip.create_model``, such as
    ``pretrained=False``, ``force_image_size=336``.
    """

    name = "open_clip"
    library = "open_clip"
    install = 'pip install "prisma-interp[clip]"'

    def load(self, rest: str, *, pretrained: bool = True, key: str | None = None, **options: Any) -> Loaded:
        name, _, which = rest.partition("@")
        if key is not None and not Path(which).is_file():
            raise InputError(f"key={key!r} names a state dict of a file: give it with open_clip:{name}@FILE.")
        if Path(name).is_dir():
            return _from_folder(Path(name), pretrained, options)
        if name.endswith(".json"):
            return _from_config(Path(name), which, pretrained, options, key)
        if which and Path(which).is_file() and not _known(name) and tinyclip.is_one(which):
            model: Any = create_tinyclip(which, options, key)
            return _loaded(model, Tokenizer({"context_length": model.context_length}))
        _check_name(name, which)
        tag = _tag(name, which) if _is_tag(name, which) else {}
        if which or not pretrained:
            weights = _fetched(name, which) if tag and pretrained else which
            model = create(name, as_trained(name, which, options) | options)
            if pretrained:
                fill(model, weights, sizes=bool(options), key=key)
            set_preprocessing(model, tag, options)
        else:
            raise LoadError(
                f"open_clip:{name} names no trained weights. {_tags_of(name)} Load open_clip:{name}@TAG, "
                f"open_clip:{name}@FILE, or give pretrained=False for random weights."
            )
        return _loaded(model, Tokenizer(_text(_config(name), options), f"open_clip:{name}"))

    def describe(self, upstream: nn.Module) -> Loaded:
        visual: Any = getattr(upstream, "visual", upstream)
        config: Any = getattr(visual, "preprocess_cfg", None)
        with suppress(LoadError):  # what cannot be repeated is not said
            return Loaded(upstream, preprocess(config) if config else None)
        return Loaded(upstream)

    def models(self) -> Iterator[ModelInfo]:
        import open_clip

        for name in open_clip.list_models():
            config = _config(name)
            tags = open_clip.list_pretrained_tags_by_model(name)
            family = config["vision_cfg"].get("timm_model_name") or "open_clip"
            yield ModelInfo(f"open_clip:{name}", family, bool(tags), f"tags: {', '.join(tags)}" if tags else "")

    def save_processor(self, processor: Any, folder: Path) -> None:
        texts.save(processor.made() if isinstance(processor, Tokenizer) else processor, folder)

    def load_processor(self, folder: Path) -> Any:
        return texts.load(folder)

    def loadable(self, rests: Collection[str]) -> Collection[str] | None:
        from prisma_clip.cases import case

        return {rest for rest in rests if case(rest) is not None or _bert(rest)}

    def case(self, rest: str) -> Case | None:
        from prisma_clip.cases import case

        return case(rest.partition("@")[0])


# -------------------------------------------------------------------- building


def _loaded(model: nn.Module, tokenizer: Tokenizer) -> Loaded:
    visual: Any = model.visual
    return Loaded(model.eval(), preprocess(visual.preprocess_cfg), tokenizer=tokenizer)


def _text(config: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return a model's configuration of its text tower, as these options change it."""
    forced = options.get("force_context_length")
    changed = {} if forced is None else {"context_length": forced}
    return {**config["text_cfg"], **changed, **options.get("text_cfg", {})}


def as_trained(name: str, tag: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the activation that a tag's weights were trained with, where the configuration has another one.

    open_clip builds what the configuration says, and warns. Weights and activation belong together.
    """
    if not _is_tag(name, tag) or options.get("force_quick_gelu"):
        return {}
    config = _config(name)
    trained = bool(_tag(name, tag).get("quick_gelu", False))
    return {} if trained == bool(config.get("quick_gelu", False)) else {"quick_gelu": trained}


def _from_folder(folder: Path, pretrained: bool, options: dict[str, Any]) -> Loaded:
    config = read_config(folder / CONFIG)
    files = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if pretrained and not files:
        raise LoadError(f"{folder} holds none of {', '.join(WEIGHTS)}. Give pretrained=False for random weights.")
    model = create_from(config, options, folder / CONFIG, read_outline(files[0]) if pretrained else None)
    if pretrained:
        fill(model, files[0], sizes=bool(options))
    set_preprocessing(model, config.get("preprocess_cfg", {}), options)
    return _loaded(model, Tokenizer(_text(config["model_cfg"], options), f"open_clip:{folder}", folder.resolve()))


def _from_config(path: Path, checkpoint: str, pretrained: bool, options: dict[str, Any], key: str | None) -> Loaded:
    config = read_config(path)
    if pretrained and not checkpoint:
        raise LoadError(
            f"open_clip:{path} names no weights: expected open_clip:{path}@CHECKPOINT, or pretrained=False."
        )
    model = create_from(config, options, path, read_outline(checkpoint, key) if pretrained else None)
    if pretrained:
        fill(model, checkpoint, sizes=bool(options), key=key)
    set_preprocessing(model, config.get("preprocess_cfg", {}), options)
    return _loaded(model, Tokenizer(_text(config["model_cfg"], options), f"open_clip:{path}"))


def _fetched(name: str, tag: str) -> Path:
    from prisma_core.plugin import hub

    reference = f"open_clip:{name}@{tag}"
    repository, _, filename = _tag(name, tag).get("hf_hub", "").rpartition("/")
    if not repository:
        raise LoadError(
            f"The weights of {reference} are not on the hub. Download them, and load open_clip:{name}@FILE."
        )
    names = [filename] if filename else list(WEIGHTS)
    if filename.endswith((".bin", ".pth", ".pt")):
        names.insert(0, filename.rpartition(".")[0] + ".safetensors")
    instead = f"A local file needs no network: open_clip:{name}@FILE. Nor do random weights: pretrained=False."
    return hub.fetch(repository, names, reference=reference, instead=instead)


# -------------------------------------------------------------------- names


def _known(name: str) -> bool:
    import open_clip

    return name in open_clip.list_models()


def _config(name: str) -> dict[str, Any]:
    import open_clip

    return open_clip.get_model_config(name) or {}


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
    config = _config(name)
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
            near = suggest(name.replace("/", "-"), open_clip.list_models())
            raise LoadError(
                f"No folder at {name}: expected one with {CONFIG} and weights, or a name of open_clip's.{near}"
            )
        near = suggest(name, open_clip.list_models())
        raise UnknownName(f"open_clip has no model {name!r}.{near} `prisma models {name}` searches them.")
    if not which or _is_tag(name, which) or Path(which).is_file():
        return
    if Path(which).suffix in (".pt", ".pth", ".bin", ".safetensors") or "/" in which:
        raise LoadError(f"No file at {which}.")
    near = suggest(which, open_clip.list_pretrained_tags_by_model(name))
    raise UnknownName(f"open_clip's {name} has no tag {which!r}.{near} {_tags_of(name)}")
