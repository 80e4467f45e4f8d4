"""`jaxrl init`: a commented config for a file of problems and a model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl_llm.bounds import counted
from jaxrl_llm.data.chat import template_source
from jaxrl_llm.data.json_files import json_object
from jaxrl_llm.data.jsonl import fields_of, read_records
from jaxrl_llm.data.row_files import rows_of
from jaxrl_llm.rewards.verifiers.numbers import parsed_number

_PROMPTS = ("prompt", "problem", "question", "instruction", "input", "query", "body")
_ANSWERS = ("answer", "solution", "target", "output", "label", "ground_truth", "final_answer")
_LOOKED_AT = 1000
_RENDERED = 16  # the longest ones, whose prompts are rendered
_SPARE, _COMPLETION = 64, 512  # tokens

TEXT = """\
# Written by jaxrl init from the first {looked_at} of {count} of {data}. docs/config.md has every key.
#   jaxrl explain {out}      the parts of the step, and their cost
#   jaxrl train {out}        training.steps=20 evaluation.problems=32 for a first try
name: {name}

model:
  path: {model}              # a Hugging Face directory of a supported family
  parameter_dtype: float32
  compute_dtype: bfloat16    # float32 on a CPU

data:
  path: {data}
  # test_path: ...           # default: a tenth of the file is used for tests, and a tenth for validation
  format: {format}{fields}
  prompts: {prompts}         # chat renders the model's template, plain uses the text as it is
  prompt_format: {prompt_format}
  overlong_prompts: error    # drop leaves out prompts that are too long, and counts them; prompts are never truncated

rollout:
  samples_per_prompt: 8      # completions per prompt, which are compared with each other
  max_prompt_tokens: {prompt_tokens}     # {why_prompt_tokens}
  max_completion_tokens: {completion_tokens}{why_completion_tokens}

rewards:                     # {columns}
{rewards}

credit:
  - advantages: group_normalized
losses:
  - clipped_surrogate: {{clip_high: 0.28}}
  # - kl_estimate: {{coefficient: 0.01}}   # stay near the model that training starts from

training:
  steps: 200
  prompts_per_step: 32       # times samples_per_prompt completions per step
  sequences_per_microbatch: 16   # completions per backward pass: fewer take less memory
  learning_rate: 1.0e-6
  warmup_steps: 10

evaluation: {{problems: 128, samples_per_problem: 4, k: [1, 4], every_steps: 50}}
checkpoints: {{every_steps: 25}}
"""


def write_starter(options: argparse.Namespace) -> None:
    """Inspect a file, and write a config for it.

    Raises:
      ValueError: for a file that cannot be read, lines without a prompt, or an output file that exists.
    """
    data, out = options.data, Path(options.out)
    if out.exists():
        raise ValueError(f"{out} exists already; give another file with --out")
    keys, first = _keys(data)
    format, fields = _format(keys, first, data)
    records, _ = read_records(data, fields_of(format, **fields))
    records_seen = records[:_LOOKED_AT]
    rewards, prompt_format = _reward(records_seen)
    prompts = "chat" if format == "messages" or _has_template(options.model) else "plain"
    longest, how = _longest_prompt(records_seen, options.model, prompts, prompt_format)
    limits, of_context = _limits(longest, options.model)
    spare = sorted(keys - {*_used(format, fields)})
    text = TEXT.format(
        data=json.dumps(data),
        out=out,
        count=counted(len(records), "line"),
        looked_at=len(records_seen),
        name=out.stem,
        model=json.dumps(options.model) if options.model else "DIR",
        format=format,
        fields=f"\n  fields: {json.dumps(fields)}" if fields else "",
        prompts=prompts,
        prompt_format=json.dumps(prompt_format),
        prompt_tokens=limits[0],
        why_prompt_tokens=f"the longest is about {longest} {how}",
        completion_tokens=limits[1],
        why_completion_tokens=of_context,
        columns=f"your own function can read these columns as parameters: {', '.join(spare)}"
        if spare
        else "the first is the verifier",
        rewards=rewards,
    )
    out.write_text(text)
    print(f"wrote {out}; next: jaxrl explain {out}")


def _keys(data: str) -> tuple[set[str], Mapping[str, Any]]:
    """The names of the first rows' columns, and the first row."""
    found = [row.columns for row in rows_of(data)[0][:20]]
    if not found or not all(isinstance(line, dict) for line in found):
        raise ValueError(f"{data} has neither one JSON object per line nor rows of another known format")
    return set(found[0]).intersection(*found), found[0]


def _format(keys: set[str], first: Mapping[str, Any], data: str) -> tuple[str, dict[str, Any]]:
    """(data.format, data.fields) that fit the names of a file."""
    if "messages" in keys:
        return "messages", {} if "answer" in keys else {"answer": None}
    if {"question", "answer"} <= keys and "####" in str(first["answer"]):
        return "gsm8k", {}
    prompt = next((name for name in _PROMPTS if name in keys), None)
    if prompt is None:
        raise ValueError(
            f"{data} has no column of prompts; it has the fields {', '.join(sorted(keys))}, and one of "
            f"{', '.join(_PROMPTS)} or messages is needed (or name yours in data.fields: {{prompt: ...}})"
        )
    answer = next((name for name in _ANSWERS if name in keys), None)
    fields: dict[str, Any] = {} if prompt == "prompt" else {"prompt": prompt}
    if answer != "answer":
        fields["answer"] = answer
    if answer is not None and "\\boxed" in str(first[answer]):
        fields["answer_from"] = "boxed"
    elif answer is not None and "####" in str(first[answer]):
        fields["answer_from"] = "hashes"
    return "prompt", fields


def _used(format: str, fields: Mapping[str, Any]) -> tuple[Any, ...]:
    own = {"gsm8k": ("question", "answer"), "messages": ("messages", "answer"), "prompt": ("prompt", "answer")}[format]
    return (*own, fields.get("prompt"), fields.get("answer"))


def _reward(records: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """(reward entries for the form of the answers, the prompt format that asks for this form)."""
    answers = [str(record["answer"]) for record in records if record["answer"]]
    boxed = "{body}\nReason step by step, and write the final answer in \\boxed{}."
    if not answers:
        own = '  - {python: "rewards_of_mine:graded"}   # def graded(completions): return [... a number for each ...]\n'
        return own + "  # the file has no reference answers for a verifier", "{body}"
    numbers = sum(parsed_number(answer) is not None for answer in answers)
    if numbers >= 0.9 * len(answers):
        return f"  - number_match             # numbers are {numbers} of {counted(len(answers), 'answer')}", boxed
    if any("\\" in answer for answer in answers):
        return "  - latex_match              # answers are LaTeX; needs pip install 'jaxrl_llm[math]'", boxed
    text = "  - exact_match              # the text between <a> and </a> is the answer"
    return text, "{body}\nWrite the answer as <a>answer</a>."


def _has_template(model: str | None) -> bool:
    """Whether a local model has a chat template; a name on the hub is assumed to be a chat model."""
    if model is None or not Path(model).is_dir():
        return model is not None
    return template_source(Path(model), json_object(Path(model) / "tokenizer_config.json")) is not None


def _longest_prompt(
    records: Sequence[Mapping[str, Any]], model: str | None, prompts: str, prompt_format: str
) -> tuple[int, str]:
    """(tokens of the longest prompt in its format and template, how they were counted)."""
    if not model or not (Path(model) / "tokenizer.json").is_file():
        added = len(prompt_format) - len("{body}")
        longest = max(len(record["body"]) for record in records) + added
        return longest // 3, "with prompt_format, assuming three characters per token, without a tokenizer"
    from jaxrl_llm.data import load_tokenizer, with_chat, with_prompt_format

    tokenizer = load_tokenizer(Path(model))
    chat = prompts == "chat"
    shaped = with_chat(tokenizer, format=prompt_format) if chat else with_prompt_format(tokenizer, prompt_format)

    def plain_length(record: Mapping[str, Any]) -> int:
        turns = record.get("messages", [{"content": record["body"]}])
        return sum(len(tokenizer.encode(turn["content"])) for turn in turns)

    # A template adds about the same to every prompt, and takes milliseconds each.
    chosen = sorted(records, key=plain_length)[-_RENDERED:]
    longest = max(len(shaped.prompt_ids(record)) for record in chosen)
    return longest, f"with prompt_format{' and the chat template' if chat else ''}, by the model's tokenizer"


def _limits(longest: int, model: str | None) -> tuple[tuple[int, int], str]:
    """((max_prompt_tokens, max_completion_tokens), a comment on the second) that fit in the model's context."""
    prompt, completion = -(-(longest + _SPARE) // _SPARE) * _SPARE, _COMPLETION
    if model and (Path(model) / "config.json").is_file():
        from jaxrl_llm.models.weights import longest_context

        context = longest_context(Path(model))
        if context is not None and prompt + completion > context:
            prompt = min(prompt, max(longest, context // 2)) if longest < context else context // 2
            return (prompt, context - prompt), f"   # the room in the model's context of {context} tokens"
    return (prompt, completion), ""
