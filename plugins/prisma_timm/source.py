"""The source ``timm:``: models by name, pretrained from the hub by timm's own loader, or from a local checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from prisma_core.plugin import (
    Case,
    InputError,
    Loaded,
    ModelInfo,
    Source,
    UnknownName,
    check_shapes,
    read_checkpoint,
    suggest,
)
from prisma_timm.adapters import adapters
from prisma_timm.preprocessing import preprocess


class TimmSource(Source):
    """``timm:NAME``, ``timm:NAME.TAG``, ``timm:NAME@CHECKPOINT``.

    ``key`` says which state dict of a checkpoint with several, such as ``state_dict_ema``. Other options go to
    ``timm.create_model``, such as ``pretrained=False``, ``num_classes=10`` or ``img_size=384``.
    """

    name = "timm"
    library = "timm"
    install = 'pip install "prisma-interp[timm]"'

    def load(self, rest: str, *, pretrained: bool = True, key: str | None = None, **options: Any) -> Loaded:
        from prisma_timm.building import create, create_without_data
        from prisma_timm.hub import create_pretrained

        name, _, checkpoint = rest.partition("@")
        _check_name(name)
        if key is not None and not checkpoint:
            raise InputError(f"key={key!r} names a state dict of a file: give it with timm:{rest}@CHECKPOINT.")
        if checkpoint:
            model = create(name, options)
            _fill(model, checkpoint, key)
        elif pretrained:
            if options:
                create_without_data(name, options)  # a wrong option is an error before anything is fetched
            model = create_pretrained(name, options)
        else:
            model = create(name, options)
        return self.describe(model.eval())

    def describe(self, upstream: nn.Module) -> Loaded:
        from timm.data.model_config import resolve_input_data_config

        if not hasattr(upstream, "pretrained_cfg"):  # made by its class, not by timm.create_model
            return Loaded(upstream)
        return Loaded(upstream, preprocess(resolve_input_data_config(upstream)), _labels(upstream))

    def models(self) -> Iterator[ModelInfo]:
        import timm

        tags: dict[str, list[str]] = defaultdict(list)
        for reference in timm.list_pretrained():
            name, _, tag = reference.partition(".")
            tags[name].append(tag)
        for module in timm.list_modules():
            for name in timm.list_models(module=module):
                note = f"tags: {', '.join(filter(None, tags[name]))}" if any(tags[name]) else ""
                yield ModelInfo(f"timm:{name}", module, bool(tags[name]), note)

    def loadable(self, rests: Collection[str]) -> Collection[str] | None:
        """Return those of a module that has a class some adapter takes; a few of them ``load`` refuses in words."""
        from prisma_timm.cases import adapted_names, types_of

        return set(adapted_names(types_of(adapters()))) & set(rests)

    def case(self, rest: str) -> Case | None:
        from prisma_timm.cases import case, types_of

        return case(rest, types_of(adapters()))


def _check_name(reference: str) -> None:
    """Refuse a model or tag that timm does not have.

    Raises:
        UnknownName: with the nearest ones.
    """
    import timm

    name, _, tag = reference.partition(".")
    if not timm.is_model(name):
        near = suggest(name, timm.list_models())
        raise UnknownName(f"timm has no model {name!r}.{near} `prisma models {name}` searches them.")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{name}.*")]
    if tag and tag not in tags:
        there = f"Its tags: {', '.join(tags)}." if tags else "It has no trained weights."
        raise UnknownName(f"timm's {name} has no tag {tag!r}.{suggest(tag, tags)} {there}")


def _fill(model: nn.Module, checkpoint: str, key: str | None) -> None:
    """Put a local checkpoint into a model, every tensor accounted for.

    Raises:
        LoadError: the file cannot be read safely, or does not fit.
    """
    tensors = read_checkpoint(checkpoint, key)
    check_shapes(
        tensors,
        model.state_dict(),
        checkpoint,
        "The model is built with timm's defaults and the options given: add those of your training, such as "
        "num_classes=, img_size= or depth=.",
    )
    model.load_state_dict(tensors)


def _labels(model: nn.Module) -> tuple[str, ...] | None:
    """Return the names of a model's classes, where they are one of ImageNet's sets."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if not getattr(model, "num_classes", 0):
        return None
    subset = infer_imagenet_subset(model)
    return tuple(ImageNetInfo(subset).label_descriptions()) if subset else None
