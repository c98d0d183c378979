"""Answers to names known from TransformerLens: looked up only once Python or torch has raised an error."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any

from torch import nn

from prisma_core.errors import InputError, suggest

FEW = 15  # so many names are listed next to a suggestion

# Keywords, and ours with the same meaning.
_KEYWORDS = {
    "names_filter": "names=",
    "fwd_hooks": "hooks={name: hook}",
    "bwd_hooks": "backward={name: hook}",
    "incl_bwd": "loss=",
    "pos_slice": "pos=",
}

# What to do instead, by keywords without a counterpart.
_INSTEAD = {
    "return_type": "what the model gives out is what is returned; in run_with_cache, output=False leaves it out.",
    "return_cache_object": "a cache is always an ActivationCache. dict(cache) is a plain dictionary.",
    "reset_hooks_end clear_contexts": "hooks end with their scope, and nothing is left on the model.",
    "is_permanent": "hooks end with their scope; keep the scope open, or put an ExitStack around it.",
    "prepend_bos": "tokens are what the model's own tokenizer makes of a text: model.tokens(text).",
    "attention_mask mask": "what is read is edited in the scores: hooks={'attn_scores': function}, which sets -inf.",
    "start_at_layer": "only a vision transformer can go on from a stream. Of a pair of towers that is model.vision.",
    "stop_at_layer": "only one transformer has layers to stop at. Of a pair give it to model.vision or model.text.",
}

# What there is here, by attributes of models, hook points, hook contexts and caches.
_ATTRIBUTES = {
    "cfg config": "here the facts are model.spec.",
    "hook_dict": "here it is model.hook_points().",
    "mod_dict": "here it is dict(model.named_modules()).",
    "add_hook add_perma_hook check_and_add_hook": "here hooks are a scope: with model.hooks({name: hook}): ...",
    "add_caching_hooks get_caching_hooks cache_all cache_some": (
        "here a cache is a scope: with model.caching(names) as cache: ..."
    ),
    "reset_hooks remove_hooks remove_all_hook_fns clear_context clear_contexts": (
        "hooks end with their scope, and nothing is left on the model."
    ),
    "list_hooks has_hooks fwd_hooks bwd_hooks": "the hooks that are on now are model.open_hooks().",
    "ctx": "keep what hooks share in a dictionary of your own: seen = {}, and in the hook seen[at.name] = activation.",
    "enable_reshape": "a hook gets the activation with the axes that at.axes names; rearrange it in the hook.",
    "to_tokens to_single_token": "here it is model.tokens(text), of a model that reads texts.",
    "to_str_tokens": "here it is model.tokens(text), of a model that reads texts; its tokenizer is model.tokenizer.",
    "to_string": "the tokenizer of a model that reads texts is model.tokenizer.",
    "from_pretrained": "here it is prisma.load('timm:NAME').",
    "set_use_attn_result": "asking is what switches on: names='attn.hook_result'.",
    "set_use_split_qkv_input set_use_attn_in": "asking is what switches on: names='hook_q_input'.",
    "set_use_hook_mlp_in": "what the MLP reads is ln2.hook_normalized, and the stream before it hook_resid_mid.",
    "fold_layer_norm": "here it is prisma.rewrite(model, prisma.fold_layer_norm).",
    "center_writing_weights": "here it is prisma.rewrite(model, prisma.center_writing_weights).",
    "fold_value_biases": "here it is prisma.rewrite(model, prisma.fold_value_biases).",
    "cache_dict": "a cache is a mapping itself: dict(cache).",
    "stack_activation": "here it is torch.stack([cache[name, layer] for layer in range(n)]).",
    "compute_head_results": "asking is what switches on: names='attn.hook_result', or cache.stack_head_results().",
    "get_neuron_results": "here it is cache.stack_neuron_results(neuron_slice=...).",
    "get_full_resid_decomposition": "take cache.decompose_resid, stack_head_results and stack_neuron_results.",
    "apply_slice_to_batch_dim": "take what you need of the batch before the pass.",
    "toggle_autodiff": "open torch.no_grad() around the pass.",
}

# Methods of the residual stream: a cache of one canonical transformer has them.
_STREAM_METHODS = """
    decompose_resid accumulated_resid stack_head_results stack_neuron_results apply_ln_to_stack project_stack
    logit_attrs logit_constant directions
"""
STREAM_METHODS = frozenset(_STREAM_METHODS.split())


def _answer(answers: Mapping[str, str], name: str) -> str | None:
    return next((answer for names, answer in answers.items() if name in names.split()), None)


def migration_hint(name: str) -> str | None:
    """Return what stands here for an attribute that other libraries have, or None.

    >>> migration_hint("cfg")
    'here the facts are model.spec.'
    """
    return _answer(_ATTRIBUTES, name)


def ask_again(owner: object, name: str) -> None:
    """Ask a property once more whose ``AttributeError`` made Python call ``__getattr__``: it raises its own again."""
    if isinstance(attribute := getattr(type(owner), name, None), property) and attribute.fget is not None:
        attribute.fget(owner)


def unknown_attribute(owner: object, name: str) -> AttributeError:
    """Return the error for an attribute that an object lacks, with the hint if there is one."""
    ask_again(owner, name)
    hint = migration_hint(name)
    return AttributeError(f"{type(owner).__name__} has no attribute {name!r}{f': {hint}' if hint else '.'}")


class UnknownAttribute(AttributeError):
    """torch's error for an attribute that a module lacks; as text, with the hint of the module if it has one.

    Python itself sets ``name`` and ``obj`` on its way out.
    """

    def __str__(self) -> str:
        hint = getattr(self.obj, "attribute_hint", migration_hint)(self.name) if self.name else None
        return f"{type(self.obj).__name__} has no attribute {self.name!r}: {hint}" if hint else super().__str__()


def module_getattr() -> Callable[[nn.Module, str], Any]:
    """Make a ``__getattr__`` that does what torch's does and raises ``UnknownAttribute``.

    Every access to a submodule goes through it, so a method of ours around torch's would be one more Python frame each
    time, and class attributes that hold the answers would make ``hasattr(model, "config")`` true. So it is torch's own
    code with another ``AttributeError`` among its globals: nothing of ours runs until it fails.

    A property that raises an ``AttributeError`` ends here too.
    """
    function = nn.Module.__getattr__
    names = {**function.__globals__, "AttributeError": _unknown_attribute}
    return FunctionType(function.__code__, names, function.__name__)


def _unknown_attribute(message: str) -> UnknownAttribute:
    """Return the error for torch's ``__getattr__``, which calls this, to raise."""
    asked = sys._getframe(1).f_locals  # pyright: ignore[reportPrivateUsage]
    ask_again(asked["self"], asked["name"])
    return UnknownAttribute(message)


def keyword_names(function: Callable[..., Any]) -> list[str]:
    """Return the names of the keyword arguments that a function spells out."""
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]


def keywords(function: Callable[..., Any]) -> list[str] | None:
    """Return the names of the keyword arguments that a function takes, or None if it takes any."""
    any_name = any(each.kind is each.VAR_KEYWORD for each in inspect.signature(function).parameters.values())
    return None if any_name else keyword_names(function)


def check_keywords(who: str, given: Iterable[str], accepted: Iterable[str] | None) -> None:
    """Refuse the first keyword argument that is not accepted, if there is one.

    Args:
        who: the function that was called, for the message.
        given: names of the keywords it was called with.
        accepted: names of those that there are; None for any.

    Raises:
        InputError: one is not accepted; with its counterpart or the nearest names.
    """
    names = list(accepted or ())
    for name in () if accepted is None else given:
        if name in names:
            continue
        ours = _KEYWORDS.get(name)
        if ours is not None and ours.partition("=")[0] in names:
            raise InputError(f"{who} takes no {name!r}: here it is {ours}.") from None
        if instead := _answer(_INSTEAD, name):
            raise InputError(f"{who} takes no {name!r}: {instead}") from None
        near = suggest(name, names)
        rest = "" if near and len(names) > FEW else f" It takes {', '.join(names) or 'none'}."
        raise InputError(f"{who} takes no {name!r}.{near}{rest}") from None
