"""Suites: several evaluations of one model, from a YAML file.

    samples: 8
    k: [1, 8]
    evaluations:
      gsm8k: {data: gsm8k.jsonl, format: gsm8k}
      sums:  {task: addition, levels: [1, 2], problems: 100}
      mine:  {data: mine.jsonl, grader: "my_module:grade", by: [source]}

Keys beside `evaluations` apply to all of them, unless an evaluation sets them itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import pydantic

from jaxrl_llm.bounds import file_bytes
from jaxrl_llm.evaluation.benchmark_formats import Format
from jaxrl_llm.evaluation.evaluate import require_k
from jaxrl_llm.yaml_text import MOST_BYTES, yaml_values


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: its problems, sampling and grading.

    Attributes:
      data: a JSONL file of problems; None for a built-in task, or the problems of the run.
      task: a built-in task.
      levels: of the task; None for all of them.
      options: of the task.
      split: "test", "validation" or "train" of the run's problems, or of the task's.
      format: format of the lines of `data`, see `benchmark_formats`.
      fields: changes to the names of fields.
      grader: number, text, math, choice, code, or module:function; None: the default of the format, the task or the
          run.
      prompt_format: text of the prompt with `{body}` in place of the problem.
      problems: number of problems, spread evenly; None for all (for a run: evaluation.problems).
      samples: sampled completions per problem; None for the largest k.
      k: of pass@k, maj@k and best-of-k.
      temperature: of the samples; None for the run's, or 1.
      seed: of the samples.
      by: columns whose values are reported separately.
      rewards: further rewards of each sample, as in section rewards of a config; None: the run's.
      max_prompt_tokens, max_completion_tokens: limits; None for the run's, or the model's context and 256.
    """

    data: str | None = None
    task: str | None = None
    levels: tuple[int, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    split: Literal["test", "validation", "train"] = "test"
    format: Format = "prompt"
    fields: dict[str, Any] = field(default_factory=dict)
    grader: str | None = None
    prompt_format: str = "{body}"
    problems: int | None = None
    samples: int | None = None
    k: tuple[int, ...] = (1, 8)
    temperature: float | None = None
    seed: int = 0
    by: tuple[str, ...] = ()
    rewards: tuple[Any, ...] | None = None
    max_prompt_tokens: int | None = None
    max_completion_tokens: int | None = None

    def __post_init__(self):
        for name in ("problems", "samples", "max_prompt_tokens", "max_completion_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must lie in [0, 2**32)")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; samples need one above 0 (greedy is always measured)")
        if self.data is not None and self.task is not None:
            raise ValueError(f"data is {self.data!r} and task is {self.task!r}; name one of them")
        if "{body}" not in self.prompt_format:
            raise ValueError(f"prompt_format is {self.prompt_format!r}; it needs {{body}} in place of the problem")
        require_k(self.k, self.samples_per_problem)

    @property
    def samples_per_problem(self) -> int:
        """Sampled completions of each problem."""
        return self.samples or max(self.k, default=1)


def evaluation_of(values: Mapping[str, Any], where: str) -> Evaluation:
    """An `Evaluation` from plain data.

    Raises:
      ValueError: for an unknown name (with the nearest known one), or an invalid value.
    """
    known = [each.name for each in fields(Evaluation)]
    if unknown := [name for name in values if name not in known]:
        near = difflib.get_close_matches(str(unknown[0]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        raise ValueError(f"{where} has no key {unknown[0]!r}; {hint}")
    try:
        return pydantic.TypeAdapter(Evaluation).validate_python(dict(values))
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        said = problem["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where}{'.' + name if name else ''}: {said}") from None


def read_suite(path: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Evaluation]:
    """The evaluations of a suite by name.

    Args:
      path: a YAML file.
      overrides: keys for all of them, which replace those of the file.

    Raises:
      ValueError: for an unreadable file, or invalid evaluations, by name.
    """
    file = Path(path)
    try:
        tree = yaml_values(file_bytes(file, MOST_BYTES).decode("utf-8-sig"), f"--suite {path}")
    except (OSError, ValueError) as error:
        raise ValueError(f"--suite {path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("evaluations"), dict) or not tree["evaluations"]:
        raise ValueError(f"--suite {path} names no evaluations; write `evaluations:` with one entry for each, by name")
    common = {name: value for name, value in tree.items() if name != "evaluations"}
    found = {}
    for name, own in tree["evaluations"].items():
        if "/" in str(name) or not isinstance(own or {}, dict):
            raise ValueError(f"--suite {path}: evaluations.{name} must be a mapping, under a name without a slash")
        one = evaluation_of({**common, **(own or {}), **(overrides or {})}, f"{path}: evaluations.{name}")
        beside = None if one.data is None else file.parent / one.data
        found[str(name)] = replace(one, data=str(beside)) if beside is not None and beside.is_file() else one
    return found
