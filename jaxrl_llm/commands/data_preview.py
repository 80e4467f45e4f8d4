"""`jaxrl data`: the problems of a config, before training."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from jaxrl_llm.commands.arguments import loaded_config
from jaxrl_llm.commands.tables import show
from jaxrl_llm.config import Config, ConfigError
from jaxrl_llm.data import Tokenizer
from jaxrl_llm.data.row_files import SPLITS
from jaxrl_llm.data.splits import prompt_key
from jaxrl_llm.data.tasks.items import record, reference_response
from jaxrl_llm.run.batches import encoded, grader, prompt_batches
from jaxrl_llm.run.policy_parts import described_policy
from jaxrl_llm.run.problems import data_sets, own_data
from jaxrl_llm.run.rewards_tried import answers_of, require_answers, require_columns, require_usable_answers
from jaxrl_llm.run.samples import spread
from jaxrl_llm.run.staged import last_stage, staged
from jaxrl_llm.run.stages import Stage, written_of

_MOST = 20_000  # problems per split whose tokens are counted
_BINS, _BAR = 10, 40


def show_data(options: argparse.Namespace) -> int:
    """Print some prompts as the policy reads them, statistics of all prompts, and what a run would refuse; status 2 if
    it would refuse anything."""
    whole = loaded_config(options.config)
    config = last_stage(whole)
    if not config.has_problems:
        raise ConfigError("this config has no problems; name a task, data.path or data.sources")
    found = preview(config, described_policy(config)[1], shown=options.count, split=options.split)
    found["refused"] = refusals(whole)
    status = 2 if found["refused"] else 0
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return status
    console = Console()
    for number, one in enumerate(found["prompts"], start=1):
        console.rule(
            Text(f"{options.split} {number}: item {one['item_id']} {one['data_source']}".strip()), align="left"
        )
        console.print(Text(one["prompt"]))
        console.print(Text(f"reference answer: {one['answer'] or 'none'}", style="dim"))
        if one["response"]:
            console.print(Text(f"reference completion: {one['response']}", style="dim"))
    console.rule()
    show(options, found["splits"], "tokens of prompts, and of reference completions (or answers)")
    if found["sources"]:
        show(options, found["sources"], "the mixture")
    console.print(Text(f"\ntokens of prompts of the {options.split} split"))
    for line in _bars(found["histogram"]):
        console.print(Text(line))
    told = [{"split": split, "left out": count, "why": why} for split, why, count in found["left_out"]]
    for rows, title in ((told, "left out"), (found["equal"], "equal prompts")):
        console.print()
        show(options, rows, title)
    for text in found["refused"]:
        print(f"error: {text}", file=sys.stderr)
    return status


def refusals(config: Config) -> list[str]:
    """What `jaxrl train` would refuse of the data of a config, in the order of its checks."""
    found: list[str] = []

    def tried(check: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return check(*arguments)
        except ValueError as error:
            found.extend([] if str(error) in found else [str(error)])
            return None

    if (described := tried(staged, config)) is None:
        return found
    stages = [Stage(**each) for each in described]
    built = stages[-1].parts
    sets = tried(data_sets, built.config) or data_sets(built.config, overlap="keep")
    for stage in stages:
        own = tried(own_data, stage, stages[-1], sets) or {}
        for check in (require_answers, require_columns, require_usable_answers):
            tried(check, stage.parts, own)
        if own and stage.samples:
            tried(prompt_batches, stage.parts, own["train"])
        tried(written_of, stage.parts, own)
    held_out = [sets[split] for split in ("validation", "test")]
    tried(grader, built, *(each for each in held_out if answers_of(each)))
    for each in held_out:
        tried(encoded, built, each)
    return found


def preview(config: Config, tokenizer: Tokenizer, *, shown: int, split: str) -> dict[str, Any]:
    """The output of `jaxrl data` as plain data.

    Args:
      config: of a run or a stage.
      tokenizer: of its policy.
      shown: number of example prompts, spread evenly over the split.
      split: the split of the examples and of the histogram.
    """
    sets = data_sets(config, overlap=None if config.data.overlap == "drop" else "keep")
    lengths, limits = {}, (config.rollout.max_prompt_tokens, config.rollout.max_completion_tokens)
    for name, one in sets.items():
        items = [record(one[int(i)], int(i)) for i in spread(len(one), min(_MOST, len(one)))]
        lengths[name] = [(len(tokenizer.prompt_ids(item)), _reference_tokens(item, tokenizer)) for item in items]
    chosen = [record(sets[split][int(i)], int(i)) for i in spread(len(sets[split]), min(shown, len(sets[split])))]
    return {
        "prompts": [_shown(item, tokenizer) for item in chosen],
        "splits": [row for name, of in lengths.items() for row in _summary(name, len(sets[name]), of, limits)],
        "sources": _shares(config, sets["train"]),
        "histogram": _histogram([prompt for prompt, _ in lengths[split]]),
        "left_out": [(name, why, n) for name, one in sets.items() for why, n in getattr(one, "dropped", {}).items()],
        "equal": _equal({name: [record(each, place) for place, each in enumerate(one)] for name, one in sets.items()}),
    }


def _reference(item: Mapping[str, Any]) -> str:
    """The reference completion of a record; "" if it has only an answer."""
    return item["response"] if "response" in item else reference_response(item).removesuffix("<eos>")


def _reference_tokens(item: Mapping[str, Any], tokenizer: Tokenizer) -> int:
    text = _reference(item)
    return len(tokenizer.completion_ids(item, text) if text else tokenizer.encode(item["answer"]))


def _shown(item: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    ids = tokenizer.prompt_ids(item)
    return {
        "item_id": item["item_id"],
        "data_source": item.get("data_source", ""),
        "prompt": tokenizer.decode(ids),
        "tokens": len(ids),
        "answer": item["answer"],
        "response": _reference(item),
    }


def _summary(
    split: str, count: int, lengths: Sequence[tuple[int, int]], limits: tuple[int, int]
) -> list[dict[str, Any]]:
    """Token counts of the prompts and references of a split, and how many exceed the limits of the run."""
    rows = []
    for what, of, limit in zip(("prompt", "reference"), np.array(lengths).T, limits, strict=True):
        row: dict[str, Any] = {"split": split, "problems": count, "tokens of": what}
        row |= {
            name: int(np.percentile(of, q)) for name, q in (("least", 0), ("median", 50), ("95%", 95), ("most", 100))
        }
        rows.append(row | {"limit": limit, "over it": int((of > limit).sum())})
    return rows


def _histogram(lengths: Sequence[int]) -> list[dict[str, int]]:
    """Counts in up to `_BINS` integer ranges of equal width."""
    least, width = min(lengths), -(-(max(lengths) - min(lengths) + 1) // _BINS)
    counts = np.bincount((np.array(lengths) - least) // width)
    return [
        {"from": least + place * width, "to": least + (place + 1) * width - 1, "prompts": int(count)}
        for place, count in enumerate(counts)
    ]


def _shares(config: Config, train: Any) -> list[dict[str, Any]]:
    """For each source of a mixture: its share of the prompts, and how often a run visits each of its problems."""
    names = getattr(train, "sources", ())
    rows = Counter(each["data_source"] for each in train) if names else Counter()
    weights = dict(zip(names, train.weights or [rows[name] for name in names], strict=True)) if names else {}
    asked, total = config.training.steps * config.training.prompts_per_step, sum(weights.values())
    return [
        {
            "source": name,
            "problems": rows[name],
            "share of a step": f"{weight / total:.1%}",
            "passes in this run": f"{asked * weight / total / rows[name]:.2f}",
        }
        for name, weight in weights.items()
    ]


def _equal(sets: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Equal prompts within each split and between each two splits, also up to case and white space."""
    keys = {name: [prompt_key(each) for each in items] for name, items in sets.items()}
    loose = {name: [" ".join(key.lower().split()) for key in of] for name, of in keys.items()}
    rows = []
    for name in sets:
        rows.append(_counts(f"within {name}", *(len(of[name]) - len(set(of[name])) for of in (keys, loose))))
    for first in SPLITS:
        for second in SPLITS[SPLITS.index(first) + 1 :]:
            counts = (_common(of[first], of[second]) for of in (keys, loose))
            rows.append(_counts(f"{first} and {second}", *counts))
    return rows


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    there = set(second)
    return sum(key in there for key in first)


def _counts(where: str, equal: int, alike: int) -> dict[str, Any]:
    return {"where": where, "equal": equal, "but for case and space": alike}


def _bars(histogram: Sequence[Mapping[str, Any]]) -> list[str]:
    most = max(row["prompts"] for row in histogram)
    names = [f"{row['from']}" + (f"-{row['to']}" if row["to"] > row["from"] else "") for row in histogram]
    wide = max(map(len, names))
    return [
        f"{name:>{wide}}  {'█' * -(-_BAR * row['prompts'] // most):<{_BAR}}  {row['prompts']:,}"
        for name, row in zip(names, histogram, strict=True)
    ]
