"""The model card of an export: base model, data, method, accuracies and config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxrl_llm import __version__
from jaxrl_llm.config import Config, as_tree

CARD = """\
---
{head}---

# {name}

Trained from {base} by reinforcement with jaxrl_llm {version}: {steps} steps of {prompts} prompts with {samples}
completions each, on {data}.{paper}

| | |
| --- | --- |
| rewards | {rewards} |
| advantages | {credit} |
| losses | {losses} |
| checkpoint | step {step} |
{results}
```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
```

Performance on other data was not evaluated. The whole config:

```yaml
{config}```
"""


def model_card(config: Config, source: Path, place: str, *, scores: bool = False) -> str:
    """The text of README.md.

    Args:
      config: of the run.
      source: the checkpoint.
      place: the exported directory.
      scores: the export is a reward model.
    """
    tree = as_tree(config)
    base = (tree.get("model") or {}).get("path")
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": f"text-{'classification' if scores else 'generation'}",
    }
    head |= {"tags": ["reinforcement-learning", "jaxrl_llm"]} | ({"base_model": base} if base else {})
    about = config.about
    return CARD.format(
        head=yaml.safe_dump(head, sort_keys=False),
        name=config.name,
        base=f"`{base}`" if base else "a model described by its shape",
        version=__version__,
        steps=config.training.steps,
        prompts=config.training.prompts_per_step,
        samples=config.rollout.samples_per_prompt,
        data=_data(config),
        paper=f" The method is that of {about.paper}." if getattr(about, "paper", "") else "",
        rewards=_named(config.rewards),
        credit=_named(config.credit),
        losses=_named(config.losses),
        step=source.name,
        results=_results(source.parent.parent / "summary.json"),
        place=place,
        auto="AutoModelForSequenceClassification" if scores else "AutoModelForCausalLM",
        config=yaml.safe_dump(tree, sort_keys=False, allow_unicode=True),
    )


def _data(config: Config) -> str:
    """The training data."""
    sources = [(one.path, one.task) for one in config.data.sources.values()] or [(config.data.path, config.task)]
    return ", ".join(
        f"`{path}`" if path else f"the built-in task {task.name if task else ''}" for path, task in sources
    )


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
