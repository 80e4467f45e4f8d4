"""The model card of an export: base model, stages, data, method, accuracies, how to load it, and config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxrl_llm import __version__
from jaxrl_llm.bounds import counted
from jaxrl_llm.config import Config, as_tree
from jaxrl_llm.run.recipes import entry_of
from jaxrl_llm.run.staged import earlier_stages, last_stage

CARD = """\
---
{head}---

# {name}

{what} trained from {base} with jaxrl_llm {version}, on {data}: {stages}{lora}.{paper}

| | |
| --- | --- |
| rewards | {rewards} |
| advantages | {credit} |
| losses | {losses} |
| checkpoint | step {step} of {steps}, counted over all stages |
{results}
```python
{snippet}
```

Performance on other data was not evaluated. The whole config:

```yaml
{config}```
"""
MODEL = """\
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")"""
ADAPTERS = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{place}")
tokenizer = AutoTokenizer.from_pretrained("{base}")"""


def model_card(config: Config, source: Path, place: str, *, scores: bool = False, adapters: bool = False) -> str:
    """The text of README.md.

    Args:
      config: of the run, with all of its stages.
      source: the checkpoint.
      place: the exported directory.
      scores: the export is a reward model.
      adapters: the export has only the adapters of section lora.
    """
    tree = as_tree(config)
    base = (tree.get("model") or {}).get("path")
    head: dict[str, Any] = {
        "library_name": "peft" if adapters else "transformers",
        "pipeline_tag": f"text-{'classification' if scores else 'generation'}",
    }
    head |= {"tags": ["reinforcement-learning", "jaxrl_llm"]} | ({"base_model": base} if base else {})
    last, about = last_stage(config), config.about
    stages = [*(one for _, one in earlier_stages(config)), last]
    return CARD.format(
        head=yaml.safe_dump(head, sort_keys=False),
        name=config.name,
        what="LoRA adapters" if adapters else "A reward model" if scores else "A model",
        base=f"`{base}`" if base else "a model described by its shape",
        version=__version__,
        stages=", then ".join(_stage(one) for one in stages),
        lora=_lora(config, merged=not adapters),
        data=", ".join(dict.fromkeys(text for one in stages for text in _data(one))),
        paper=f" The method is that of {about.paper}." if getattr(about, "paper", "") else "",
        rewards=_named(last.rewards),
        credit=_named(last.credit),
        losses=_named(last.losses),
        step=source.name,
        steps=sum(one.training.steps for one in stages),
        results=_results(source.parent.parent / "summary.json"),
        snippet=_snippet(base, place, scores=scores, adapters=adapters),
        config=yaml.safe_dump(tree, sort_keys=False, allow_unicode=True),
    )


def _snippet(base: str | None, place: str, *, scores: bool, adapters: bool) -> str:
    """The Python lines that load the export."""
    if adapters:
        return ADAPTERS.format(base=base, place=place)
    auto = "AutoModelForSequenceClassification" if scores else "AutoModelForCausalLM"
    return MODEL.format(auto=auto, place=place)


def _stage(config: Config) -> str:
    """The steps of a stage, and the rows that it learns from."""
    entries = [entry_of(entry, "source") for entry in config.source]
    steps, rollout, parts = counted(config.training.steps, "step"), config.rollout, []
    for name, hyper in entries:
        if name == "sampler":
            kind = " of reinforcement" if config.rewards else " on its own samples"
            sizes = f"{config.training.prompts_per_step} prompts with {rollout.samples_per_prompt} completions each"
            parts.insert(0, f"{steps}{kind}, {sizes}")
            continue
        size = hyper.get("sequences_per_step", hyper.get("groups_per_step"))
        named = name.replace("_", " ") + (f" ({size} a step)" if size else "")
        parts.append(named if len(entries) > 1 else f"{steps} on {named}")
    return " and ".join(parts)


def _lora(config: Config, *, merged: bool) -> str:
    lora = config.lora
    if lora is None:
        return ""
    return f"; with LoRA of rank {lora.rank} (alpha {lora.alpha:g})" + (", merged into the weights" if merged else "")


def _data(config: Config) -> list[str]:
    """The training data of a stage."""
    entries = [entry_of(entry, "source")[1] for entry in config.source]
    files = [str(hyper["file"]) for hyper in entries if "file" in hyper]
    sources = [(one.path, one.task) for one in config.data.sources.values()] or [(config.data.path, config.task)]
    named = [f"`{path}`" if path else f"the built-in task {task.name}" if task else "" for path, task in sources]
    return [f"`{file}`" for file in files] or [name for name in named if name]


def _named(entries: Any) -> str:
    return ", ".join(f"`{json.dumps(entry) if not isinstance(entry, str) else entry}`" for entry in entries) or "none"


def _results(summary: Path) -> str:
    """Accuracies before and after, if the run has ended."""
    if not summary.is_file():
        return "\nThe run has not ended, so there is no final evaluation.\n"
    told = json.loads(summary.read_text())
    before, after = (_numbers(told.get(name)) for name in ("before", "after"))
    rows = [f"| {name} | {before[name]:.1%} | {value:.1%} |" for name, value in after.items() if name in before]
    return "\n".join(["", "| test problems | before | after |", "| --- | --- | --- |", *rows, ""]) if rows else "\n"


def _numbers(part: Any) -> dict[str, float]:
    found = part if isinstance(part, Mapping) else {}
    return {name: value for name, value in found.items() if name == "greedy" or "@" in name}
