"""open_clip's TimmModel: a model of timm's and a projection. The installed adapter of timm's model does the work."""

from __future__ import annotations

from prisma_core.plugin import (
    Adapter,
    HookMap,
    MapAdapter,
    ModelSpec,
    PluginError,
    Reader,
    UnsupportedArchitecture,
    WeightMap,
    installed,
    linear_rows,
)

IGNORED = {
    "TimmModel.image_size": "read from the trunk",
    "TimmModel.preprocess_cfg": "how images are prepared",
}


def trunk_adapter(upstream: Reader) -> Adapter:
    """Return the installed adapter of the timm model inside.

    Raises:
        PluginError: no installed plugin adapts any of timm's models.
        UnsupportedArchitecture: one does, but not this one.
    """
    try:
        adapter = installed().adapter(upstream.trunk.module)
        if isinstance(adapter, MapAdapter):  # it shows activations of a model of its own, and makes no tower
            raise upstream.trunk.unsupported("a vision tower that is no plain transformer")
        return adapter
    except UnsupportedArchitecture as error:
        if any(kind.startswith("timm.") for kind in installed().types()):
            raise
        raise PluginError(
            "This model's vision tower is timm's, and no installed plugin adapts timm's models: "
            'pip install "prisma-interp[timm]".'
        ) from error


def spec(upstream: Reader) -> ModelSpec:
    """Return the facts of the trunk with those of the projection behind it."""
    facts = trunk_adapter(upstream).spec(upstream.trunk)
    if not isinstance(facts, ModelSpec):
        raise upstream.unsupported("a trunk that is no vision tower")
    proj = _projection(upstream)
    if proj is None:
        return facts
    if facts.n_classes is not None or facts.n_heads_out != 1:
        raise upstream.unsupported("a projection behind a head")
    return facts.model_copy(update={"n_classes": proj.out_features})


def weights(upstream: Reader, facts: ModelSpec) -> WeightMap:
    """Return the weight map of the trunk with that of the projection."""
    parts = _own(upstream, facts)
    table = trunk_adapter(upstream).weights(upstream.trunk, parts).prefixed("trunk.", "")
    if _projection(upstream) is None:
        return table
    return table.without("head.{*}") | WeightMap.parse(linear_rows("head.proj", "head"))


def hooks(upstream: Reader, facts: ModelSpec) -> HookMap:
    """Return the hook map of the trunk with that of the projection."""
    parts = _own(upstream, facts)
    table = trunk_adapter(upstream).hooks(upstream.trunk, parts).prefixed("trunk.", "")
    if _projection(upstream) is None:
        return table
    return table.without("hook_logits") | HookMap.parse("head.proj  ->  hook_logits")


def _own(upstream: Reader, facts: ModelSpec) -> ModelSpec:
    """Return the trunk's own facts."""
    return facts if _projection(upstream) is None else facts.model_copy(update={"n_classes": None})


def _projection(upstream: Reader) -> Reader | None:
    layers = [layer for layer in upstream.head if not layer.is_a("Dropout", "Identity")]
    if not layers:
        return None
    if len(layers) > 1 or not layers[0].is_a("Linear"):
        raise upstream.head.unsupported("a projection of more than one layer, or pooling, behind timm's model")
    return layers[0]
