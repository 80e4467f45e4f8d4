"""Parsing of command-line words: configs with their overrides, assignments and numbers."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from jaxrl_llm.config import Config, ConfigError, load_config
from jaxrl_llm.data import CharacterTokenizer
from jaxrl_llm.shipped import config_path


def loaded_config(words: Sequence[str]) -> Config:
    """The config that a file or a shipped recipe and `section.key=value` overrides give.

    Raises:
      ConfigError: for no config, or an invalid one.
    """
    if not words or ("=" in words[0] and not Path(words[0]).is_file()):
        raise ConfigError("no config given; write jaxrl train CONFIG.yaml [section.key=value ...], or --resume RUN")
    return load_config(config_path(words[0]), words[1:], vocabulary_size=CharacterTokenizer().vocabulary_size)


def assignments(words: Sequence[str], option: str) -> dict[str, str]:
    """Words of the form NAME=VALUE as a dictionary.

    Raises:
      ValueError: for a word of another form, with the name of the option.
    """
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{option} is {word!r}; write NAME=COLUMN, such as answer=solution")
    return dict(word.split("=", 1) for word in words)


def require_positive(options: argparse.Namespace, *names: str) -> None:
    """Raise ValueError for options that are given and below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def require_package(name: str, extra: str, purpose: str) -> None:
    """Raise ValueError if an optional package is not installed; called before anything is read."""
    if importlib.util.find_spec(name) is None:
        raise ValueError(
            f"{purpose} needs the package {name}, which is not installed: pip install 'jaxrl_llm[{extra}]'"
        )
