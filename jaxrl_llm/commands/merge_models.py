"""`jaxrl merge`: merge several models of one architecture into one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxrl_llm.bounds import counted
from jaxrl_llm.commands.arguments import require_package
from jaxrl_llm.commands.model_files import with_own_tokenizer
from jaxrl_llm.commands.tables import show_report
from jaxrl_llm.data import Tokenizer
from jaxrl_llm.models import load_reward_model, merging, save_model, save_reward_model
from jaxrl_llm.models.checkpoint_files import read_json
from jaxrl_llm.models.sequence_classifiers import holds_reward_model
from jaxrl_llm.run.directories import is_run
from jaxrl_llm.run.restored import restored_policy, restored_run

Method = Literal["average", "slerp", "task", "ties", "dare", "select"]


def show_merge(options: argparse.Namespace) -> None:
    """`jaxrl merge`."""
    weights = None if options.weights is None else _numbers(options.weights)
    report = merge_models(
        options.models,
        options.out,
        method=options.method,
        weights=weights,
        base=options.base,
        share=options.share,
        seed=options.seed,
    )
    show_report(options, report, f"merge of {counted(len(options.models), 'model')}")


def merge_models(
    paths: Sequence[str],
    out: str,
    *,
    method: Method = "average",
    weights: Sequence[float] | None = None,
    base: str | None = None,
    share: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the merge of several models as a directory that `transformers` loads.

    Args:
      paths: runs, checkpoints or model directories, of one architecture; reward models are directories, such as those
        that `jaxrl export --network` writes.
      out: new directory.
      method: average and slerp take no base; task, ties, dare and select scale changes from `base`.
      weights: one per model; for slerp only t; for ties and select only the scale of the merged change.
      base: the model that the others were fine-tuned from.
      share: share of each tensor's changes that ties and select keep (0.2), or dare drops (0.9).
      seed: random seed of dare.

    Raises:
      ValueError: for options that the method does not take, models of different architectures, or an output directory
      with files.
    """
    require_package("safetensors", "hf", "writing safetensors files")
    _require_options(paths, method, weights, base, share)
    read = {path: _read(path) for path in {*paths, *([] if base is None else [base])}}
    model, _, source, tokenizer = read[paths[0]]
    for path, (_, params, *_) in read.items():
        if _shapes(params) != _shapes(read[paths[0]][1]):
            raise ValueError(f"{path} has other parameters than {paths[0]}; merge models of one architecture")
    merged = _merged(
        [read[path][1] for path in paths], None if base is None else read[base][1], method, weights, share, seed
    )
    if "head" in merged:
        pad_id = read_json(Path(paths[0]) / "config.json").get("pad_token_id")
        files = save_reward_model(out, merged, model.config, source=source, pad_id=pad_id)
    else:
        files = save_model(out, merged, model.config, source=source) + with_own_tokenizer(out, tokenizer)
    return {
        "models": ", ".join(paths),
        "method": method,
        "weights": "equal" if weights is None else ", ".join(f"{number:g}" for number in weights),
        "base": base or "none",
        "written to": out,
        "files": [file.name for file in files],
        "tokenizer": f"that of {paths[0]}" if source else "the built-in one",
    }


def _merged(trees: list[PyTree], base: PyTree, method: Method, weights: Any, share: float | None, seed: int) -> PyTree:
    match method:
        case "average":
            return merging.averaged(trees, weights)
        case "slerp":
            return merging.spherical(trees[0], trees[1], 0.5 if weights is None else weights[0])
        case "ties":
            scale = 1.0 if weights is None else weights[0]
            return merging.elected(base, trees, density=0.2 if share is None else share, scale=scale)
        case "select":
            scale = 1.0 if weights is None else weights[0]
            return merging.selected(base, trees[0], density=0.2 if share is None else share, scale=scale)
        case "dare":
            dropped = 0.9 if share is None else share
            trees = [
                merging.dropped_and_rescaled(base, tree, share=dropped, seed=seed + place)
                for place, tree in enumerate(trees)
            ]
    return merging.task_arithmetic(base, trees, weights)


def _require_options(paths: Sequence[str], method: str, weights: Any, base: str | None, share: float | None) -> None:
    if method not in get_args(Method):
        raise ValueError(f"--method is {method!r}; it must be one of {', '.join(get_args(Method))}")
    if method in ("average", "slerp") and base is not None:
        raise ValueError(f"--base is given, but --method {method} does not use it; leave it out")
    if method not in ("average", "slerp") and base is None:
        raise ValueError(f"--method {method} scales changes from a base model; give it with --base")
    if share is not None and method not in ("ties", "dare", "select"):
        raise ValueError(f"--share is given, but --method {method} does not use it; leave it out")
    if method == "slerp" and len(paths) != 2:
        raise ValueError(f"--method slerp needs two models, but {len(paths)} are given")
    if method == "select" and len(paths) != 1:
        raise ValueError(f"--method select keeps the largest changes of one model, but {len(paths)} are given")
    if method == "average" and len(paths) < 2:
        raise ValueError("--method average needs two models or more, but one is given")
    wanted = 1 if method in ("slerp", "ties", "select") else len(paths)
    if weights is not None and len(weights) != wanted:
        raise ValueError(
            f"--weights has {counted(len(weights), 'number')}; --method {method} of {counted(len(paths), 'model')} "
            f"takes {wanted}"
        )


def _read(path: str) -> tuple[Any, PyTree, Path | None, Tokenizer | None]:
    """(model, parameters with adapters merged, directory of its files, tokenizer) of a run or a model directory; of a
    reward model in the files of Hugging Face its head and backbone, and no tokenizer."""
    if (Path(path) / "config.json").is_file() and holds_reward_model(path):
        return *load_reward_model(path), Path(path), None
    if is_run(Path(path)):
        built, policy = restored_run(path)
        source = built.directory
    else:
        policy = restored_policy(path)
        source = policy.source
    trained = policy.model.trained
    params = policy.params if trained is None else trained.merged(policy.params)
    return policy.model, params, source, policy.tokenizer


def _shapes(params: PyTree) -> Any:
    return jax.tree.map(jnp.shape, params)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--weights is {text!r}; give numbers with commas between them, such as 0.5,0.5") from None
