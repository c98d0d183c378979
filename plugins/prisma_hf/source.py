"""The source ``hf:``: any model of transformers, by its name on the hub or from a folder that save_pretrained wrote."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prisma_core.plugin import (
    Case,
    ImagePreprocess,
    Loaded,
    LoadError,
    ModelInfo,
    Source,
    UnknownName,
    VideoPreprocess,
    check_merged,
    code_in,
    installed,
    keyword_names,
    suggest,
    without_code,
)
from prisma_hf import texts
from prisma_hf.making import BROKEN, brief, fresh, of_class, unfit
from prisma_hf.places import Place, place
from prisma_hf.processors import CONFIG, Processed
from prisma_hf.weights import check_configuration, check_outline, held_in


class HfSource(Source):
    """``hf:ORGANISATION/NAME``, ``hf:ORGANISATION/NAME@REVISION``, ``hf:./FOLDER``, or ``hf:CLASS`` at random.

    Options:
        pretrained: False draws the weights at random; only the configuration is read.
        architecture: the class to load, where it is not the one that the configuration names. Weights of the file that
            this class has no place for are left out.
        part: the path of a module of the model, such as ``vision_model``: that alone is handed over.
        trust_remote_code: run code that comes with the model. Off unless you say so.

    Others go into the configuration, such as ``num_hidden_layers=2`` without weights, and to ``from_pretrained``.
    """

    name = "hf"
    library = "transformers"
    install = 'pip install "prisma-interp[hf]"'
    unlisted = r"[\w.-]+/[\w.-]+(@[\w.-]+)?"  # a name on the hub

    def describe(self, upstream: nn.Module) -> Loaded:
        return _loaded(upstream, getattr(upstream, "config", None), None)

    def load(
        self,
        rest: str,
        *,
        pretrained: bool = True,
        architecture: str | None = None,
        part: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Loaded:
        from prisma_hf.options import quiet

        if rest in _classes():
            if pretrained:
                raise LoadError(
                    f"hf:{rest} is a class without weights. Load it with pretrained=False, or name a model."
                )
            kind = _imported(_classes()[rest])
            if not hasattr(kind, "config_class"):
                raise LoadError(f"hf:{rest} is a part of a model: load the model, with part= the part's path in it.")
            with quiet():
                model, config = of_class(kind, rest, options)
            return _loaded(_part(model, part, rest), config, None)
        where = place(rest)
        if not where.local and "/" not in where.name:
            raise UnknownName(
                f"{rest!r} is neither a model on the hub (ORGANISATION/NAME), nor a folder, nor a class."
                f"{suggest(rest, _classes())} `prisma models --source hf` lists the classes."
            )
        folder = where.folder(weights=pretrained)
        if pretrained:
            check_merged(folder)
        common = {"local_files_only": True, "trust_remote_code": trust_remote_code}
        try:
            with quiet():
                return _read(where, folder, pretrained, architecture, part, common, options)
        except LoadError as error:
            if trust_remote_code or not (code := code_in(folder)):
                raise
            trust = "Where you trust it, trust_remote_code=True runs it."
            raise LoadError(f"{str(error).rstrip('.')}.{code} {trust}") from error

    def models(self) -> Iterator[ModelInfo]:
        for name, path in _classes().items():
            yield ModelInfo(
                f"hf:{name}", path.split(".")[2], False, "a class; weights: hf:ORGANISATION/NAME or hf:./FOLDER"
            )

    def load_processor(self, folder: Path) -> Any:
        from prisma_hf.options import quiet

        with quiet():
            return Processed.from_pretrained(folder) if (folder / CONFIG).is_file() else texts.load(folder)

    def case(self, rest: str) -> Case | None:
        from prisma_hf.cases import cases

        name = rest
        if rest not in _classes():
            where = place(rest)
            folder = where.cached_config()
            if folder is None:
                return None
            with without_code(folder) as files:
                config, _ = _config(where, files, {"local_files_only": True, "trust_remote_code": False}, {})
            name = next(iter(config.architectures or ()), "")
        return next((case for case in cases() if case.name == name), None)


def _classes() -> dict[str, str]:
    """Return the paths of transformers' classes that any installed adapter takes, by their names."""
    return {path.rpartition(".")[2]: path for path in installed().types() if path.startswith("transformers.")}


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _read(
    where: Place,
    folder: Path,
    pretrained: bool,
    architecture: str | None,
    part: str | None,
    common: dict[str, Any],
    options: dict[str, Any],
) -> Loaded:
    """Return what ``load`` returns, of a folder."""
    from prisma_hf.images import found

    trusted = common["trust_remote_code"]
    with nullcontext(folder) if trusted else without_code(folder) as files:
        held = _held(where, files) if pretrained else None
        check_configuration(files, held, where)
        config, others = _config(where, files, common, options)
        kind = _kind(config, architecture, trusted=trusted)
        config = _own(config, kind)
        if not trusted:
            check_outline(kind, config, held, where)
        if pretrained:
            model = _pretrained(where, files, kind, config, common | others, whole=architecture is None)
        else:
            model = fresh(str(where), kind, config, others)
        model = _part(model, part, str(where))
        loaded = _loaded(model, config, found(files, model, common))
    return replace(loaded, tokenizer=texts.tokenizer(folder, config, common))


def _config(where: Place, folder: Path, common: dict[str, Any], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a model's configuration, and the options that are none of its settings.

    Raises:
        LoadError: it cannot be read.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **common, **options)
    except (*BROKEN, StrictDataclassError, TypeError, AttributeError) as error:
        raise LoadError(f"The configuration of {where} could not be read: {brief(error)}") from error


def _held(where: Place, folder: Path) -> dict[str, Tensor] | None:
    try:
        return held_in(folder)
    except LoadError as error:
        raise LoadError(f"The weights of {where} could not be read: {error}{_again(where, folder)}") from error


def _again(where: Place, folder: Path) -> str:
    """Remove broken files from the hub's cache, and return what to say of it."""
    return " What was broken in the cache was removed: try again." if where.forget_broken(folder) else ""


def _kind(config: Any, architecture: str | None, *, trusted: bool) -> Any:
    """Return the class to load: the one asked for, the one the configuration names, or what transformers falls back to.

    Raises:
        UnknownName: transformers has none of the name asked for.
    """
    import transformers

    listed: Any = config.architectures or ()
    names = [architecture] if architecture else [listed] if isinstance(listed, str) else list(listed)
    for name in map(str, names):
        # Not every class of a module is exported; some stand in the module of the configuration's neighbour alone.
        home = type(config).__module__.replace(".configuration_", ".modeling_")
        kind = getattr(transformers, name, None) or _in_module(home, name)
        if kind is not None and not hasattr(kind, "from_config") and not hasattr(kind, "_from_config"):
            raise LoadError(f"{name} of transformers is no class of models: name one with architecture=NAME.")
        if kind is not None:
            return kind
    if architecture:
        raise UnknownName(f"transformers has no class {architecture!r}.{suggest(architecture, dir(transformers))}")
    if trusted and "AutoModelForImageClassification" in (getattr(config, "auto_map", None) or {}):
        return transformers.AutoModelForImageClassification
    if type(config) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return transformers.AutoModelForImageClassification
    return transformers.AutoModel


def _in_module(home: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(home), name, None)
    except ModuleNotFoundError:
        return None


def _pretrained(
    where: Place, folder: Path, kind: Any, config: Any, arguments: dict[str, Any], *, whole: bool
) -> nn.Module:
    """Return a model with its trained weights, every tensor accounted for.

    Args:
        whole: tensors that the class has no place for are an error.

    Raises:
        LoadError: a file cannot be read safely, or does not fit.
    """
    from prisma_hf.options import UNKNOWN, refuse_unknown

    options = {"attn_implementation": "sdpa"} if getattr(kind, "_supports_sdpa", True) else {}
    try:
        model, info = kind.from_pretrained(
            folder,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to be told of all of them, and refuse
            weights_only=True,
            **{**options, **arguments},
        )
    except AttributeError as error:
        raise LoadError(unfit(str(where), kind, config, error)) from error
    except (*BROKEN, TypeError) as error:
        if isinstance(error, TypeError) and UNKNOWN.search(str(error)):
            refuse_unknown(str(where), error, kind, config)
        raise LoadError(f"The weights of {where} could not be read: {brief(error)}{_again(where, folder)}") from error
    problems = [f"missing {name}" for name in sorted(info["missing_keys"])]
    problems += [
        f"{name} has shape {list(came)}, expected {list(expected)}" for name, came, expected in info["mismatched_keys"]
    ]
    problems += [f"extra {name}" for name in sorted(info["unexpected_keys"]) if whole]
    problems += [str(message) for message in info["error_msgs"]]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        without = "add_pooling_layer"
        if without in keyword_names(type(model)) and any("pooler." in name for name in info["missing_keys"]):
            hint = f"Where the file has no pooler, give {without}=False."
        else:
            hint = "Another class that fits is asked for with architecture=NAME."
        raise LoadError(f"{where} does not fit {type(model).__name__}: {'; '.join(problems[:5])}{more}. {hint}")
    return model.eval()


def _own(config: Any, kind: Any) -> Any:
    """Return the part of a configuration that a class takes: a tower's, of a model of several."""
    config_class = getattr(kind, "config_class", None)
    parts = (
        [] if type(config) is config_class else [part for part in vars(config).values() if type(part) is config_class]
    )
    return parts[0] if parts else config


def _part(model: nn.Module, part: str | None, what: str) -> nn.Module:
    """Return a module of a model.

    Raises:
        UnknownName: there is none; the nearest are suggested.
    """
    if not part:
        return model.eval()
    modules = dict(model.named_modules())
    if part not in modules:
        raise UnknownName(f"{what} has no part {part!r}.{suggest(part, modules)}")
    return modules[part].eval()


def _loaded(model: nn.Module, config: Any, preprocess: ImagePreprocess | VideoPreprocess | None) -> Loaded:
    labels = getattr(config, "id2label", None) or {}
    names = tuple(str(labels[index]) for index in range(len(labels)) if index in labels)
    known = len(names) == len(labels) and any(not name.startswith("LABEL_") for name in names)
    return Loaded(model, preprocess, names if known else None)
