"""`jaxrl import`, `jaxrl export` and `jaxrl score`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxrl_llm import data, hub
from jaxrl_llm.commands.arguments import require_package, require_positive
from jaxrl_llm.commands.model_card import model_card
from jaxrl_llm.commands.tables import show_report
from jaxrl_llm.compilation_cache import enable_compilation_cache
from jaxrl_llm.data.character_files import save_character_tokenizer
from jaxrl_llm.data.json_files import json_objects
from jaxrl_llm.evaluation import make_most_likely, make_score
from jaxrl_llm.models import (
    attention_path,
    load_model,
    parameter_count,
    save_adapters,
    save_imported,
    save_model,
    save_reward_model,
)
from jaxrl_llm.models.checkpoint_files import read_json
from jaxrl_llm.models.families import is_vision_language
from jaxrl_llm.models.transformer_config import Precision
from jaxrl_llm.ranges import Positive, require_range
from jaxrl_llm.run.configured import is_run
from jaxrl_llm.run.restored import restored_network, restored_policy, restored_run, run_config


def show_import(options: argparse.Namespace) -> None:
    """`jaxrl import`."""
    show_report(
        options,
        import_model(options.path, options.out, dtype=options.dtype, strict=options.strict),
        f"import of {options.path}",
    )


def show_export(options: argparse.Namespace) -> None:
    """`jaxrl export`."""
    if options.network is not None:
        if options.adapters:
            raise ValueError("--network and --adapters are both given, but only the policy has adapters; drop one")
        report = export_reward_model(options.path, options.out, options.network, dtype=options.dtype)
    else:
        report = export_run(options.path, options.out, dtype=options.dtype, adapters=options.adapters)
    show_report(options, report, f"export of {options.path}")


def show_score(options: argparse.Namespace) -> None:
    """`jaxrl score`: print a line of JSON for each line of the file."""
    require_positive(options, "batch")
    require_range(Positive, options.temperature, "--temperature")
    enable_compilation_cache()
    if options.top is not None:
        require_positive(options, "top")
    numbers = {name: getattr(options, name) for name in ("temperature", "batch", "dtype", "top")}
    lines = score_file(options.path, options.file, chat=options.chat, **numbers)
    for line in lines:
        print(json.dumps(line))


def import_model(directory: str, out: str | None, *, dtype: str | None = None, strict: bool = False) -> dict[str, Any]:
    """Read a whole checkpoint, check it, and write it in orbax's layout if `out` is given.

    Returns:
      A summary: architecture, sizes, parameters, tokenizer, attention in use.

    Raises:
      ValueError: for a checkpoint that cannot be used, naming the cause.
    """
    found = hub.model_directory(directory)
    execution = {} if dtype is None else {"parameter_dtype": dtype, "compute_dtype": dtype}
    model, params = load_model(found, strict=strict, **execution)
    tokenizer = data.load_tokenizer(found)
    data.require_embedding(tokenizer, model.vocabulary_size)
    config = model.config
    described = read_json(found / "config.json")
    report: dict[str, Any] = {
        "model": str(found),
        "architecture": ", ".join(described.get("architectures") or ["unknown"]),
        "reads": "text only; images are not read" if is_vision_language(described) else "text",
        "parameters": parameter_count(model.specs),
        "layers": config.layers,
        "width": config.width,
        "heads": f"{config.heads} query, {config.kv_heads} key/value, {config.head_size} wide",
        "vocabulary": f"{model.vocabulary_size} rows, {tokenizer.vocabulary_size} tokens",
        "end of sequence": ", ".join(repr(tokenizer.backend.id_to_token(id)) for id in tokenizer.eos_ids),
        "chat template": "yes" if tokenizer.chat_template else "no",
        "dtype": config.parameter_dtype,
        "attention of 1024 tokens": attention_path(config, queries=1024),
    }
    if out is not None:
        report["written to"] = str(save_imported(out, params, source=found))
    return report


def export_run(path: str, out: str, *, dtype: Precision | None = None, adapters: bool = False) -> dict[str, Any]:
    """Write the policy of a run or checkpoint as a directory that `transformers` loads, or its adapters for PEFT.

    Raises:
      ValueError: for a directory that is not empty, or a model that no supported family can express.
    """
    require_package("safetensors", "hf", "writing safetensors files")
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise ValueError(f"{out} exists and is not empty; export to a new directory")
    built, policy = restored_run(path)
    if adapters:
        if built.config.lora is None or built.directory is None:
            raise ValueError(f"--adapters was given, but {path} has no section lora on a checkpoint; leave it out")
        if dtype is not None:
            raise ValueError("--dtype and --adapters are both given, but adapters are stored in float32; drop one")
        files = save_adapters(out, policy.params, policy.model.config, built.config.lora, source=built.directory)
        names = [file.name for file in files] + _with_card(policy.source, out, adapters=True)
        return {"checkpoint": str(policy.source), "written to": out, "files": names, "adapters": "alone, for PEFT"}
    trained = policy.model.trained
    params = policy.params if trained is None else trained.merged(policy.params)
    files = save_model(out, params, policy.model.config, source=built.directory, dtype=dtype)
    files += with_own_tokenizer(out, policy.tokenizer)
    return {
        "checkpoint": str(policy.source),
        "written to": out,
        "files": [file.name for file in files] + _with_card(policy.source, out),
        "adapters": "none" if trained is None else "merged",
        "tokenizer": "copied" if built.directory else "the built-in one, as files that transformers reads",
    }


def export_reward_model(path: str, out: str, name: str, *, dtype: Precision | None = None) -> dict[str, Any]:
    """Write a reward model of a run as a directory that `AutoModelForSequenceClassification` loads.

    Raises:
      ValueError: for a network without a head, or on adapters, and for networks that `save_reward_model` refuses.
    """
    require_package("safetensors", "hf", "writing safetensors files")
    built, policy = restored_run(path)
    section = built.config.networks.get(name)
    if section is not None and section.path is not None and not section.learns:
        raise ValueError(f"network {name!r} is read from {section.path} and does not learn; use that directory")
    model, network, params = restored_network(path, name)
    if network.head is None:
        raise ValueError(f"--network is {name!r}, which has no head; name a network with a head, such as reward")
    if "backbone" not in params:
        params = params | {"backbone": policy.params}
    if model.trained is not None and network.model is None:
        raise ValueError(
            f"network {name!r} has a backbone of adapters, which transformers has no reward model of; train it in a "
            "run without section lora"
        )
    named = None if section is None or section.path is None or is_run(section.path) else section.path
    source = built.directory if network.model is None else named and hub.model_directory(named)
    tokenizer = policy.tokenizer
    pad = tokenizer.pad_id if tokenizer.pad_id not in tokenizer.eos_ids else None
    files = save_reward_model(out, params, model.config, source=source, dtype=dtype, pad_id=pad)
    files += [] if source else with_own_tokenizer(out, tokenizer)
    report = {
        "checkpoint": str(policy.source),
        "network": name,
        "written to": out,
        "files": [file.name for file in files] + _with_card(policy.source, out, scores=True),
    }
    note = "padding and end of sequence are the same token, so transformers scores the token before the end"
    return report if pad is not None else report | {"note": note}


def with_own_tokenizer(out: str, tokenizer: data.Tokenizer | None) -> list[Path]:
    """Write the built-in tokenizer beside a model of it; the files of other tokenizers come with the model."""
    if isinstance(tokenizer, data.CharacterTokenizer) and jax.process_index() == 0:
        return save_character_tokenizer(out, tokenizer)
    return []


def _with_card(source: Path, out: str, **kind: bool) -> list[str]:
    """Write the model card of an export from a checkpoint."""
    card = model_card(run_config(source), source, out, **kind)
    (Path(out) / "README.md").write_text(card)
    return ["README.md"]


def score_file(
    path: str,
    file: str,
    *,
    temperature: float,
    batch: int,
    dtype: str | None,
    top: int | None = None,
    chat: bool = False,
) -> list[dict[str, Any]]:
    """Log-probabilities of the texts or token ids of a file, one entry per line, in order.

    A line holds `tokens` (after `prompt_tokens`; without these the first token is not scored), or `completion` with
    `prompt`, or `text`. A prompt and its completion are encoded as in training: with the run's prompt format and chat
    template, and end of sequence after the completion. A model directory has no prompt format; with `chat` its chat
    template is applied.

    With `top`, a line has the texts and that many most likely tokens at each position of the completion, which is what
    the source `distributions` reads.

    Raises:
      ValueError: for a line with none of these, or with ids where `top` needs texts, naming the line.
    """
    policy = restored_policy(path, dtype=dtype, chat=chat)
    lines = json_objects(Path(file), "--file")
    texts = [_tokens(policy.tokenizer, line, where) for where, line in lines]
    policy = policy.for_context(max((len(prompt) + len(completion) for prompt, completion in texts), default=0))
    if top is not None:
        for where, line in lines:
            if "completion" not in line or "tokens" in line:
                raise ValueError(f"{where} has no completion; --top needs prompt and completion, as texts")
        likely = make_most_likely(policy.model, top, temperature=temperature, sequences_per_batch=batch)
        return [
            {"prompt": line["prompt"], "completion": line["completion"]}
            | {"top_tokens": found.tokens, "top_logprobs": found.logprobs}
            for (_, line), found in zip(lines, likely(policy.params, texts), strict=True)
        ]
    logprobs = make_score(policy.model, temperature=temperature, sequences_per_batch=batch)(policy.params, texts)
    return [
        {"tokens": list(completion), "logprobs": values, "total": sum(values), "prompt_tokens": list(prompt)}
        for (prompt, completion), values in zip(texts, logprobs, strict=True)
    ]


def _tokens(tokenizer: Any, line: Mapping[str, Any], where: str) -> tuple[list[int], list[int]]:
    """(prompt ids, completion ids) of a line."""
    if "tokens" in line:
        tokens, prompt = _ids(line, "tokens", where), _ids(line, "prompt_tokens", where)
        whole = [*prompt, *tokens]
        return _parted(whole, max(1, len(prompt)), where)
    if "completion" in line:
        item = {"body": _text(line, "prompt", where)}
        completion = tokenizer.completion_ids(item, _text(line, "completion", where))
        return tokenizer.prompt_ids(item), completion
    if "text" in line:
        prefix = list(getattr(tokenizer, "prefix_ids", ()))
        whole = [*prefix, *tokenizer.encode(_text(line, "text", where))]
        return _parted(whole, max(1, len(prefix)), where)
    raise ValueError(
        f"{where} has the fields {', '.join(line) or 'none'}; give tokens (and prompt_tokens), prompt and completion, "
        "or text"
    )


def _parted(whole: list[int], first: int, where: str) -> tuple[list[int], list[int]]:
    if not whole:
        raise ValueError(f"{where} holds no token")
    return whole[:first], whole[first:]


def _ids(line: Mapping[str, Any], name: str, where: str) -> list[int]:
    ids = line.get(name, [])
    if not isinstance(ids, list) or not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
        raise ValueError(f"{where}: {name} is {str(ids)[:80]}; it must be a list of whole numbers")
    return ids


def _text(line: Mapping[str, Any], name: str, where: str) -> str:
    if not isinstance(line.get(name), str):
        raise ValueError(f"{where}: {name} is {str(line.get(name))[:80]!r}; it must be a text")
    return line[name]
