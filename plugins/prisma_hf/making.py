"""Models of transformers' classes with weights drawn at random, and what is said where none can be made."""

from __future__ import annotations

import pickle
import zipfile
from typing import Any

from safetensors import SafetensorError
from torch import nn

from prisma_core.plugin import LoadError

# What transformers and the readers of files below it raise over files that are broken, missing or of something else.
BROKEN = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    ArithmeticError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
OF_FILES = {"local_files_only", "trust_remote_code"}


def fresh(where: str, kind: Any, config: Any, options: dict[str, Any]) -> nn.Module:
    """Return a model with weights drawn at random.

    Raises:
        InputError: an option is none of the class.
        LoadError: the class cannot be made of this configuration.
    """
    from prisma_hf.options import refuse_unknown

    build = getattr(kind, "from_config", None) or kind._from_config  # auto classes have the one, others the other
    options = {name: value for name, value in options.items() if name not in OF_FILES}
    try:
        return build(config, **options).eval()
    except TypeError as error:
        if options:
            refuse_unknown(where, error, kind, config)
        raise LoadError(unfit(where, kind, config, error)) from error
    except (AttributeError, *BROKEN) as error:
        raise LoadError(unfit(where, kind, config, error)) from error


def of_class(kind: Any, name: str, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    """Return a class's model with weights drawn at random, and its configuration.

    Raises:
        InputError: an option is none of the configuration's.
        LoadError: the configuration makes no model.
    """
    from huggingface_hub.errors import StrictDataclassError

    from prisma_hf.options import check_settings

    check_settings(f"hf:{name}", kind.config_class, options)
    try:
        config = kind.config_class(**options)
        return kind(config), config
    except (StrictDataclassError, AttributeError, TypeError, *BROKEN) as error:
        raise LoadError(f"hf:{name} cannot be made with these options: {brief(error)}") from error


def unfit(where: str, kind: Any, config: Any, error: Exception) -> str:
    """Return what to say where a class stumbled over a configuration."""
    config_class = getattr(kind, "config_class", None)
    reason = (
        "" if config_class is None or isinstance(config, config_class) else f" takes a {config_class.__name__}, and"
    )
    return (
        f"{where} has a {type(config).__name__}. {kind.__name__}{reason} cannot be made of it: {brief(error)}. "
        "Name a class that fits with architecture=NAME."
    )


def brief(error: Exception) -> str:
    """Return an error's message without the advice behind it, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 700 else f"{text[:700]}..."
