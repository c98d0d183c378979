"""Options of transformers' classes, refused in words where nothing takes them, and transformers kept quiet."""

from __future__ import annotations

import inspect
import logging as standard
import re
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging

from prisma_core.plugin import InputError, check_keywords, keyword_names, suggest

UNKNOWN = re.compile(r"unexpected keyword argument '(\w+)'")


def settings(kind: Any) -> list[str]:
    """Return the names of what a class of configurations can be given."""
    properties = [name for name, value in inspect.getmembers(kind) if isinstance(value, property) and value.fset]
    fields = [*keyword_names(kind), *getattr(kind, "attribute_map", {}), *properties, "attn_implementation"]
    return [name for name in dict.fromkeys(fields) if not name.startswith("_") and name != "self"]


def check_settings(who: str, kind: Any, options: Mapping[str, Any]) -> None:
    """Refuse settings that a configuration does not have, and those of its parts; transformers would keep them unread.

    Raises:
        InputError: with the nearest there are.
    """
    check_keywords(who, options, settings(kind))
    for name, part in getattr(kind, "sub_configs", {}).items():
        given = options.get(name)
        if isinstance(given, Mapping) and "Auto" not in part.__name__:
            left = {key: value for key, value in given.items() if key != "model_type"}
            check_settings(f"{who}'s {name}", part, left)


def refuse_unknown(who: str, error: TypeError, kind: Any, config: Any) -> NoReturn:
    """Raise what says that a class took an option for none of its own, or the error again if it is about another thing.

    Raises:
        InputError: with the nearest there are.
    """
    match = UNKNOWN.search(str(error))
    if match is None:
        raise error
    near = suggest(match[1], [*settings(type(config)), *keyword_names(kind)])
    raise InputError(
        f"{who} takes no option {match[1]!r}: neither {type(config).__name__} nor {kind.__name__} has it.{near}"
    ) from error


@contextmanager
def quiet() -> Generator[None]:
    """Keep transformers from writing about a load, of which our errors say all; then it is as talkative as before."""
    level, bars, others = logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.set_verbosity(standard.CRITICAL)
    logging.disable_progress_bar()  # the hub's as well
    try:
        yield
    finally:
        logging.set_verbosity(level)
        with warnings.catch_warnings(action="ignore"):  # the environment may forbid the hub's bars
            if bars:
                logging.enable_progress_bar()
            (disable_progress_bars if others else enable_progress_bars)()
