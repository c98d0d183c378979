"""The front door of plugin authors: every name that a plugin may import, in the order in which it is met.

Files behind this module may move; these names stay. Models and what one does with them come from ``prisma_core``.
"""

from prisma_core.contract.adapter import Adapter, MapAdapter, Refusal
from prisma_core.contract.case import Case, Images
from prisma_core.contract.hookspecs import hookimpl
from prisma_core.contract.source import Loaded, ModelInfo, Reference, Source
from prisma_core.errors import (
    HookError,
    InputError,
    LoadError,
    MissingPart,
    NotApplicable,
    PluginError,
    PrismaError,
    UnknownName,
    UnsupportedArchitecture,
    WeightMapError,
    blaming,
    format_fields,
    printable,
    qualified_name,
    returned,
    suggest,
)
from prisma_core.errors.arguments import (
    check_call,
    check_flags,
    device_of,
    expect,
    number,
    path_of,
    several,
    shown,
    whole,
)
from prisma_core.errors.migration import check_keywords, keyword_names, keywords
from prisma_core.files import hub
from prisma_core.files.atomic import file_digest, holding, locked, place, replacing, replacing_both, settled, write_text
from prisma_core.files.checkpoint import (
    check_axes,
    check_finite,
    check_merged,
    check_shapes,
    depth_in,
    digest,
    read_checkpoint,
    read_outline,
    read_states,
)
from prisma_core.files.code import code_in, without_code
from prisma_core.files.facts import check_facts, facts_digest, read_fields
from prisma_core.files.pickles import SavedObject
from prisma_core.files.texts import check_regular, parse_json, read_json, read_text
from prisma_core.files.unpickled import read_objects, save_objects
from prisma_core.hooks.point import Hook, Splice
from prisma_core.hooks.query import LayerQuery, Query, layer_of, resolve_one, short_name
from prisma_core.hooks.sites import HookMapping
from prisma_core.host import Host, PluginInfo, installed
from prisma_core.inputs import SIZES, ImageLike, ImagePreprocess, Preprocess, open_image, probe, restored
from prisma_core.inputs.video import VideoPreprocess, read_video
from prisma_core.maps.places import FUSED, HookMap, Place, Row
from prisma_core.maps.reader import Reader
from prisma_core.maps.weights import WeightMap
from prisma_core.spec import (
    Activation,
    AnySpec,
    AttentionSpec,
    BlockSpec,
    DualSpec,
    EmbedSpec,
    Facts,
    Interpolation,
    MapSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
    PoolSpec,
    RopeCount,
    RopeGrid,
    RopeSpec,
    TextPoolSpec,
    TextSpec,
)
from prisma_core.spec.brief import BriefRepr
from prisma_core.spec.layout import TokenLayout, indices, positions_of
from prisma_core.toolbox import screen
from prisma_core.toolbox.additions import behaviour_of, set_on_parts
from prisma_core.toolbox.arguments import Count, Indices, Natural, Part, Seed, Share, checked
from prisma_core.toolbox.attention import eager_attention, float64_softmax, multihead_attention, switched
from prisma_core.toolbox.claims import check_claims, check_layers
from prisma_core.toolbox.options import Above, Eps, Heads, Options, Pixels, Whole, read_options
from prisma_core.toolbox.precision import taking_gradients, widened
from prisma_core.toolbox.readers import TRANSFORMERS, MlpNames, NormClass, PartReader, at, plain_patches
from prisma_core.toolbox.rows import (
    argument,
    ends_with_last_stage,
    linear_rows,
    masks_as_built,
    norm_rows,
    per_block_table,
    products,
    same_bias,
    same_for_all,
    score_rows,
)
from prisma_core.upstream.copies import copy_module

# fmt: off
__all__ = [
    # a plugin: its hooks, its adapters and their tables, its sources, its cases
    "hookimpl", "Adapter", "Reader", "qualified_name", "WeightMap", "HookMap", "Place", "Row", "MapAdapter", "Refusal",
    "Source", "Loaded", "ModelInfo", "Reference", "Case", "Images",
    # specs
    "ModelSpec", "TokenLayout", "EmbedSpec", "Interpolation", "BlockSpec", "AttentionSpec", "RopeSpec", "RopeGrid",
    "RopeCount", "MlpSpec", "Activation", "NormSpec", "PoolSpec", "TextSpec", "TextPoolSpec", "DualSpec", "MapSpec",
    "AnySpec", "Facts", "BriefRepr",
    # rows and equations of hook maps
    "FUSED", "score_rows", "argument", "products", "same_bias",
    # readers, rows and checks that adapters share; scopes that unfuse upstream's attention
    "PartReader", "NormClass", "MlpNames", "TRANSFORMERS", "at", "plain_patches", "norm_rows", "linear_rows",
    "same_for_all", "per_block_table", "masks_as_built", "ends_with_last_stage", "eager_attention",
    "multihead_attention", "switched", "float64_softmax", "copy_module",
    # inputs
    "Preprocess", "ImagePreprocess", "VideoPreprocess", "ImageLike", "open_image", "read_video", "restored", "probe",
    "SIZES",
    # files, the hub, and options of sources
    "read_checkpoint", "read_states", "read_objects", "save_objects", "SavedObject", "replacing", "replacing_both",
    "write_text", "settled", "place", "file_digest", "locked", "holding", "check_axes", "check_shapes", "check_finite",
    "check_merged", "depth_in", "digest", "check_layers", "check_claims", "read_outline", "hub", "without_code",
    "code_in", "check_regular", "read_text", "read_json", "parse_json", "read_fields", "facts_digest", "check_facts",
    "Options", "read_options", "Whole", "Above", "Heads", "Eps", "Pixels",
    "check_keywords", "keywords", "keyword_names",
    # techniques and commands
    "Hook", "HookMapping", "Splice", "Query", "LayerQuery", "layer_of", "short_name", "resolve_one", "positions_of",
    "indices", "behaviour_of", "set_on_parts", "screen", "printable", "Host", "PluginInfo", "installed",
    # arguments of public functions
    "checked", "Count", "Natural", "Part", "Share", "Indices", "Seed", "shown", "whole", "number", "several", "path_of",
    "check_call", "check_flags", "expect", "device_of", "taking_gradients", "widened",
    # errors
    "PrismaError", "UnknownName", "HookError", "UnsupportedArchitecture", "WeightMapError", "NotApplicable",
    "MissingPart", "LoadError", "InputError", "PluginError", "suggest", "blaming", "returned", "format_fields",
]
