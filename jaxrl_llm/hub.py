"""Finds the files of a model: a local directory, or else a snapshot of a Hugging Face repository."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jaxrl_llm.data.extras import imported
from jaxrl_llm.models.checkpoint_files import read_json
from jaxrl_llm.models.families import config_from_json

# Safetensors, settings, tokenizer, template. Pickled weights, which execute code when read, are never downloaded.
WEIGHTS = ("*.safetensors",)
DESCRIPTION = ("*.json", "*.jinja")
# Copies of the weights in other layouts, which would double the download.
IGNORED = ("*/*", "consolidated*")

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def model_directory(
    model: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None, weights: bool = True
) -> Path:
    """The local directory of a model.

    Args:
      model: a local directory; or owner/name of a repository, which is downloaded once (its safetensors, JSON files and
        templates) and then read from the cache. An existing directory is never looked up on the hub. Weights are
        downloaded only if config.json is supported.
      revision: branch, tag or commit of the repository; name a commit to get the same files every time.
      cache_dir: directory of snapshots; None uses the hub's own cache.
      weights: download the weights too; otherwise only the description and the tokenizer.

    Raises:
      ValueError: for a path that does not exist, a file, a directory without config.json, a revision of a local
        directory, a repository that cannot be downloaded, or one whose config.json is not supported.
    """
    local = Path(model).expanduser()
    if local.exists():
        if revision is not None:
            raise ValueError(
                f"revision is {revision!r}, but {local} is a local directory, which has no revisions; leave it out"
            )
        return _with_config(local)
    if not _REPOSITORY.fullmatch(str(model)):
        raise ValueError(
            f"model path {str(model)!r} does not exist, and is not owner/name of a Hugging Face repository; give the "
            "directory that holds config.json"
        )
    found = _snapshot(str(model), DESCRIPTION, revision, cache_dir)
    if not weights:
        return found
    try:
        config_from_json(read_json(found / "config.json"))
    except ValueError as error:
        raise ValueError(f"{str(model)!r} is not supported, and no weights were downloaded: {error}") from None
    return _snapshot(str(model), (*WEIGHTS, *DESCRIPTION), revision, cache_dir)


def _snapshot(name: str, patterns: Sequence[str], revision: str | None, cache_dir: str | Path | None) -> Path:
    hub = imported("huggingface_hub")
    try:
        found = hub.snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=list(patterns),
            ignore_patterns=list(IGNORED),
        )
    except (OSError, ValueError) as error:
        cause = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(
            f"{name!r} is not a local directory, and could not be downloaded as a Hugging Face repository: "
            f"{type(error).__name__}: {cause}; check the spelling, the network, and for a gated model that you are "
            "logged in (hf auth login), or give a local directory"
        ) from error
    return _with_config(Path(found))


def _with_config(directory: Path) -> Path:
    if not directory.is_dir():
        raise ValueError(f"model path {directory} is a file; give the directory that holds config.json")
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"{directory} has no config.json, so it is not a model directory; give the directory in which the model "
            "was "
            "saved with save_pretrained, or downloaded"
        )
    return directory
