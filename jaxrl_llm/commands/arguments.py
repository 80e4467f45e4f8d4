"""What the words of a command line mean: configs with their overrides, and numbers."""

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
      ConfigError: for no config, or one that cannot be.
    """
    if not words or ("=" in words[0] and not Path(words[0]).is_file()):
        raise ConfigError("no config given; write jaxrl train CONFIG.yaml [section.key=value ...], or --resume RUN")
    return load_config(config_path(words[0]), words[1:], vocabulary_size=CharacterTokenizer().vocabulary_size)


def require_positive(options: argparse.Namespace, *names: str) -> None:
    """Refuse options that are given and below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def require_package(name: str, extra: str, purpose: str) -> None:
    """Refuse, before anything is read, what an optional package is needed for that is not installed."""
    if importlib.util.find_spec(name) is None:
        raise ValueError(
            f"{purpose} needs the package {name}, which is not installed: pip install 'jaxrl_llm[{extra}]'"
        )
