"""open_clip's tokenizers: made as a configuration says, and kept with a saved model."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from prisma_core.plugin import LoadError, PluginError, code_in, hub, qualified_name, read_json, without_code

FACTS, FILES = "tokenizer.json", "files"
SIMPLE, OF_TRANSFORMERS = "open_clip.tokenizer.SimpleTokenizer", "open_clip.tokenizer.HFTokenizer"
# What a configuration may say of either tokenizer. ``bpe_path`` and all that transformers takes besides is the user's.
OF_SIMPLE = {"context_length", "clean", "additional_special_tokens", "reduction_mask"}
OF_FILES = {"context_length", "clean", "strip_sep_token", "language", "tokenizer_mode"}
PATTERNS = ("*.json", "*.txt", "*.model")  # files of transformers' tokenizers
NEEDED = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
LONGEST = 1 << 20
CLEANING = ("lower", "whitespace", "canonicalize")


class Tokenizer:
    """The tokenizer that a text tower's configuration asks for, made at first use: some come from the hub.

    Args:
        config: of the text tower.
        of: what the model is called, for errors.
        folder: where the tokenizer's files lie, if it needs any; default the hub.
    """

    def __init__(self, config: Mapping[str, Any] | None = None, of: str = "the model", folder: Path | None = None):
        self.config = dict(config or {})
        self.of = of
        self.folder = folder
        self._made: Any = None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self.made()(list(texts))

    def made(self) -> Any:
        """Return open_clip's own object.

        Raises:
            LoadError: its files cannot be reached or read.
        """
        if self._made is None:
            self._made = self._make()
        return self._made

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of some tokens, special ones included."""
        made = self.made()
        return str(getattr(made, "tokenizer", made).decode(list(tokens)))

    def _make(self) -> Any:
        from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH

        name = self.config.get("hf_tokenizer_name")
        settings: dict[str, Any] = {"context_length": DEFAULT_CONTEXT_LENGTH}
        settings |= {key: self.config[key] for key in ("context_length",) if key in self.config}
        settings |= _mapping(self.config.get("tokenizer_kwargs") or {}, self.of)
        if not name:
            return _simple(settings, self.of)
        settings["tokenizer_mode"] = self.config.get("tokenizer_mode")
        if not isinstance(name, str):
            raise LoadError(f"The tokenizer of {self.of} is named {name!r}: expected the name of a repository.")
        folder = self.folder or (Path(name) if Path(name).is_dir() else None)
        if folder is None:
            reference = f"the tokenizer of {self.of}, {name},"
            instead = "Set model.tokenizer, or give tokens [text pos]."
            folder = hub.snapshot(name, PATTERNS, reference=reference, needs=NEEDED, instead=instead)
        return _of_files(folder, settings)


def _of_files(folder: Path, settings: Mapping[str, Any]) -> Any:
    """Return a tokenizer of transformers inside open_clip's; no code that its files name is run.

    Raises:
        LoadError: a setting is none of open_clip's, or the files cannot be read.
        PluginError: transformers is not installed.
    """
    from open_clip.tokenizer import HFTokenizer

    _check_settings(settings, OF_FILES, folder)
    if importlib.util.find_spec("transformers") is None:
        raise PluginError(
            f'The tokenizer in {folder} needs transformers, which is not installed: pip install "prisma-interp[clip]"'
        )
    try:
        with without_code(folder) as files:
            return HFTokenizer(str(files), **{**settings, "local_files_only": True, "trust_remote_code": False})
    except Exception as error:  # the library below raises that very class
        raise LoadError(f"The tokenizer in {folder} could not be read: {error}.{code_in(folder)}") from error


def _mapping(settings: object, where: object) -> dict[str, Any]:
    if not isinstance(settings, dict):
        raise LoadError(f"tokenizer_kwargs of {where} is {settings!r}: expected settings by name.")
    return settings


def _check_settings(settings: Mapping[str, Any], known: Collection[str], where: object) -> None:
    """Refuse what a configuration may not say: paths, tokens and code among it, which the library would follow.

    Raises:
        LoadError: with the names.
    """
    if others := [name for name in settings if name not in known]:
        raise LoadError(
            f"The tokenizer of {where} has settings that no file may give ({', '.join(others)}): expected none but "
            f"{', '.join(sorted(known))}. Make the tokenizer yourself, and set model.tokenizer."
        )
    length = settings.get("context_length")
    if type(length) is not int or not 0 < length <= LONGEST:
        raise LoadError(f"The tokenizer of {where} has context_length={length!r}: expected 1 to {LONGEST} tokens.")


# -------------------------------------------------------------------- saved


def save(made: Any, folder: Path) -> None:
    """Write one of open_clip's own tokenizers into a folder.

    Raises:
        LoadError: it holds what its facts do not say.
    """
    kind = qualified_name(made)
    facts: dict[str, Any] = {"kind": kind, "context_length": made.context_length, "clean": _cleaning(made)}
    if kind == OF_TRANSFORMERS:
        facts |= {"strip_sep_token": made.strip_sep_token, "tokenizer_mode": made.tokenizer_mode}
        made.tokenizer.save_pretrained(folder / FILES)
    elif kind == SIMPLE:
        facts["additional_special_tokens"] = [made.decoder[token] for token in made.all_special_ids[2:]]
        again = _simple({name: value for name, value in facts.items() if name != "kind"}, "the model")
        if made.reduction_fn is not None:
            raise LoadError("it shortens texts at random (reduction_mask)")
        if (again.encoder, again.bpe_ranks) != (made.encoder, made.bpe_ranks):
            raise LoadError("its vocabulary is another than the one that comes with open_clip (bpe_path)")
    else:
        raise LoadError(f"{kind} is none of open_clip's tokenizers that can be saved")
    (folder / FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def load(folder: Path) -> Any:
    """Return the tokenizer that ``save`` wrote."""
    settings = read_json(folder / FACTS)
    kind = settings.pop("kind", None)
    return _simple(settings, folder) if kind == SIMPLE else _of_files(folder / FILES, settings)


def _simple(settings: Mapping[str, Any], where: object) -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    _check_settings(settings, OF_SIMPLE, where)
    try:
        return SimpleTokenizer(**settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise LoadError(f"The tokenizer of {where} cannot be made of {dict(settings)}: {error}") from error


def _cleaning(made: Any) -> str:
    from open_clip.tokenizer import get_clean_fn

    for name in CLEANING:
        if get_clean_fn(name) is made.clean_fn:
            return name
    raise LoadError("it cleans texts with a function of one's own (clean_fn)")
