"""Keyword arguments that are passed on: refused in words where nothing takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from prisma_core.errors import InputError, suggest

FEW = 15  # so many names are listed next to a suggestion

# Spellings of the same thing elsewhere, and ours.
_OURS = {
    "names_filter": "names=",
    "fwd_hooks": "hooks={name: hook}",
    "bwd_hooks": "backward={name: hook}",
    "incl_bwd": "loss=",
    "pos_slice": "pos=",
}

# What has no keyword here, and what to do instead.
_INSTEAD = {
    "return_type": "what the model gives out is what is returned; in run_with_cache, output=False leaves it out.",
    "return_cache_object": "a cache is always an ActivationCache. dict(cache) is a plain dictionary.",
    "reset_hooks_end": "hooks end with their scope, and nothing is left on the model.",
    "clear_contexts": "hooks end with their scope, and nothing is left on the model.",
    "is_permanent": "hooks end with their scope; keep the scope open, or put an ExitStack around it.",
    "prepend_bos": "tokens are what the model's own tokenizer makes of a text: model.tokens(text).",
    "start_at_layer": "only a vision transformer can go on from a stream. Of a pair of towers that is model.vision.",
    "stop_at_layer": "only one transformer has layers to stop at. Of a pair give it to model.vision or model.text.",
}

# Attributes known from elsewhere, and what they are here.
_ATTRIBUTES = {
    "cfg": "here the facts are model.spec.",
    "hook_dict": "here it is model.hook_points().",
    "mod_dict": "here it is dict(model.named_modules()).",
    "add_hook": "here hooks are a scope: with model.hooks({name: hook}): ...",
    "add_perma_hook": "here hooks are a scope: with model.hooks({name: hook}): ...",
    "add_caching_hooks": "here a cache is a scope: with model.caching(names) as cache: ...",
    "get_caching_hooks": "here a cache is a scope: with model.caching(names) as cache: ...",
    "reset_hooks": "hooks end with their scope, and nothing is left on the model.",
    "clear_contexts": "hooks end with their scope, and nothing is left on the model.",
    "to_tokens": "here it is model.tokens(text), of a model that reads texts.",
    "to_str_tokens": "here it is model.tokens(text), of a model that reads texts; its tokenizer is model.tokenizer.",
    "to_string": "the tokenizer of a model that reads texts is model.tokenizer.",
    "from_pretrained": "here it is prisma.load('timm:NAME').",
    "set_use_attn_result": "asking is what switches on: names='attn.hook_result'.",
    "set_use_split_qkv_input": "asking is what switches on: names='hook_q_input'.",
    "set_use_attn_in": "asking is what switches on: names='hook_q_input'.",
    "set_use_hook_mlp_in": "what the MLP reads is ln2.hook_normalized, and the stream before it hook_resid_mid.",
    "fold_layer_norm": "here it is prisma_core.transformer.rewrites.rewrite(model, fold_layer_norm).",
    "center_writing_weights": "here it is prisma_core.transformer.rewrites.rewrite(model, center_writing_weights).",
    "fold_value_biases": "here it is prisma_core.transformer.rewrites.rewrite(model, fold_value_biases).",
    "cache_dict": "a cache is a mapping itself: dict(cache).",
    "stack_activation": "here it is torch.stack([cache[name, layer] for layer in range(n)]).",
    "compute_head_results": "asking is what switches on: names='attn.hook_result', or cache.stack_head_results().",
    "get_neuron_results": "here it is cache.stack_neuron_results(neuron_slice=...).",
    "get_full_resid_decomposition": "take cache.decompose_resid, stack_head_results and stack_neuron_results.",
    "apply_slice_to_batch_dim": "take what you need of the batch before the pass.",
    "toggle_autodiff": "open torch.no_grad() around the pass.",
}


def elsewhere(name: str) -> str | None:
    """Return what an attribute that other libraries have is here, if it is one of those."""
    return _ATTRIBUTES.get(name)


def keywords(*functions: Callable[..., Any]) -> list[str] | None:
    """Return the names of the keyword arguments that functions take together, or None if one of them takes any."""
    taken: list[str] = []
    for function in functions:
        parameters = inspect.signature(function).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return None
        taken += named(function)
    return list(dict.fromkeys(taken))


def named(function: Callable[..., Any]) -> list[str]:
    """Return the names of the keyword arguments that a function spells out."""
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]


def check_keywords(who: str, given: Iterable[str], taken: Iterable[str] | None) -> None:
    """Refuse keyword arguments that nothing takes.

    Args:
        who: what they were given to.
        given: their names.
        taken: the names there are; None for any.

    Raises:
        InputError: one is not among them; the nearest are suggested.
    """
    if taken is None:
        return
    names = list(taken)
    for name in given:
        if name in names:
            continue
        ours = _OURS.get(name)
        if ours is not None and ours.partition("=")[0] in names:
            raise InputError(f"{who} takes no {name!r}: here it is {ours}.")
        if name in _INSTEAD:
            raise InputError(f"{who} takes no {name!r}: {_INSTEAD[name]}")
        near = suggest(name, names)
        rest = "" if near and len(names) > FEW else f" It takes {', '.join(names) or 'none'}."
        raise InputError(f"{who} takes no {name!r}.{near}{rest}")
