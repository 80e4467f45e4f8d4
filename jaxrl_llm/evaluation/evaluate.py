"""Sampling completions of held-out problems and grading them: records of all samples, and accuracies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxrl_llm.bounds import there_are
from jaxrl_llm.data import evaluation_batches
from jaxrl_llm.data.buckets import buckets
from jaxrl_llm.data.encoding import Tokenizer
from jaxrl_llm.data.tasks.items import named_item, own_columns
from jaxrl_llm.evaluation.grading import Grade, Grader
from jaxrl_llm.evaluation.measures import accuracies, episode_means
from jaxrl_llm.experience import Experience, Prompts, without_end
from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel import hosts
from jaxrl_llm.parallel.rules import RULES, Rules, constrain_rows, decoding, laid_out
from jaxrl_llm.ranges import Count, NonNegative, ranged
from jaxrl_llm.rewards.host import Reading, answered
from jaxrl_llm.rollout import (
    Environment,
    HostEnvironment,
    generate,
    generate_turns,
    host_generate_turns,
    host_turns,
    opened,
)
from jaxrl_llm.rollout.decoding_weights import weights_for_decoding
from jaxrl_llm.rollout.host_calls import Caller
from jaxrl_llm.rollout.turns import metrics_of
from jaxrl_llm.signatures import call as called_with
from jaxrl_llm.signatures import names, on_host

# Metrics of an evaluation other than accuracies and means over episodes.
COUNTED = frozenset({"completion_tokens", "truncated_share", "problems", "samples_per_problem"})
# (prompt ids, completion ids) of rows -> log-probabilities of the completions under a reference policy.
Scored = Callable[[Sequence[tuple[list[int], list[int]]]], list[list[float]]]


class Drawn(NamedTuple):
    """The completions of a batch: B rows, N problems.

    Attributes:
      tokens, length, truncated: as in `Experience`.
      logprob: [B] log-probability of the completion under its sampling distribution; for a greedy one at temperature 1.
      solved: [B] whether the environment reports success; None without one.
      rewards: name -> [B] rewards computed from arrays.
      episodes: name -> ([N] sums, [N] counts) of an environment's metrics over the samples of each problem.
    """

    tokens: Any
    length: Any
    truncated: Any
    logprob: Any
    solved: Any
    rewards: dict[str, Any]
    episodes: dict[str, Any]


@ranged
def make_records(
    model: Model,
    grade: Grader,
    tokenizer: Tokenizer,
    *,
    samples_per_problem: Count,
    max_prompt_tokens: Count,
    max_completion_tokens: Count,
    sequences_per_batch: Count = 1152,
    temperature: NonNegative = 1.0,
    overlong: Literal["error", "drop"] = "error",
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules = RULES,
    gather: bool = True,
    environment: Environment | HostEnvironment | None = None,
    call: Caller | None = None,
    rewards: Mapping[str, Callable[..., Any]] | None = None,
    reference: Scored | None = None,
    columns: Sequence[str] = (),
    answers_encoded: bool = True,
) -> Callable[..., Iterator[list[dict[str, Any]]]]:
    """Build records(params, items, key, done=0) -> lists of records, one list per batch; see `measures` for a record.

    If a grader or a reward fails, the records that were graded before are yielded, and then its error is raised.

    Args:
      model, grade, tokenizer: the policy, the grader, and the tokenizer.
      samples_per_problem: completions at `temperature`, after a greedy one in the same program.
      max_prompt_tokens, max_completion_tokens: limits; prompts are padded to the smallest width of `buckets` that holds
          a batch.
      sequences_per_batch: completions decoded together; it does not change the completions.
      temperature: of the samples.
      overlong: whether a prompt that is too long is an error, or is left out.
      mesh, rules: sharding of rows and parameters. All processes must call it, and get the same records.
      gather: gather parameters sharded over `fsdp` once per batch; otherwise once per token.
      environment: environment of conversations, which also decides whether an episode is solved.
      call: caller of an environment in Python (`opened`); without it the environment is opened for each evaluation.
      rewards: further rewards of every sample; functions of arrays of rows, or of text.
      reference: scores the samples under another policy; not with an environment.
      columns: columns of the items to keep in the records.
      answers_encoded: encode reference answers as tokens, for environments and some rewards. False for users' data,
        whose answers may be any text.

    The iterator skips the first `done` problems, to continue an interrupted evaluation.
    """
    rows, rewards = 1 + samples_per_problem, dict(rewards or {})
    in_program = {name: function for name, function in rewards.items() if not on_host(function)}
    readings = [Reading(function, name) for name, function in rewards.items() if name not in in_program]
    decode = decoding_program(
        model, tokenizer, rows, max_completion_tokens, temperature, mesh, rules, gather, environment, in_program
    )

    def records(params: PyTree, items: Sequence[dict[str, Any]], key: Array, done: int = 0):
        batches = evaluation_batches(
            items if answers_encoded else [{**item, "answer": ""} for item in items],
            tokenizer,
            prompts_per_batch=problems_per_batch(samples_per_problem, sequences_per_batch),
            max_prompt_tokens=max_prompt_tokens,
            max_answer_tokens=max_completion_tokens,
            overlong=overlong,
            widths=buckets(max_prompt_tokens),
        )
        given = {item.get("item_id", number): item for number, item in enumerate(items)}
        with ExitStack() as stack:
            ready = call
            if isinstance(environment, HostEnvironment) and ready is None:
                ready = stack.enter_context(opened(environment))
            first, known = divmod(done, problems_per_batch(samples_per_problem, sequences_per_batch))
            for batch in batches[first:]:
                places = np.flatnonzero(batch.weight)[known:]
                known = 0
                if not len(places):
                    continue
                placed = batch._replace(prompts=hosts.placed_rows(batch.prompts, mesh, rules))
                python = isinstance(environment, HostEnvironment)
                inputs = (placed, key, ready) if python else (placed.prompts, placed.weight, key)
                drawn = Drawn(*hosts.host_copy(tuple(decode(params, *inputs))))
                of = [given.get(item["item_id"], item) | {"item_id": item["item_id"]} for item in batch.items]
                found: list[dict[str, Any]] = []
                try:
                    found.extend(graded(batch, of, drawn, places))
                except (Exception, KeyboardInterrupt):
                    if found:
                        yield found
                    raise
                yield found

    def graded(batch: Any, items: list[dict[str, Any]], drawn: Drawn, places: Any) -> Iterator[dict[str, Any]]:
        for index in places:
            item, own = items[index], range(index * rows, (index + 1) * rows)
            ids = [drawn.tokens[row][: drawn.length[row]].tolist() for row in own]
            texts = [tokenizer.decode(without_end(each, tokenizer.eos_ids)) for each in ids]
            samples = [_sample(item, text, grade, drawn, row) for text, row in zip(texts, own, strict=True)]
            for name, value in _rewards(readings, item, texts, drawn, own).items():
                for sample, number in zip(samples, value, strict=True):
                    sample.setdefault("rewards", {})[name] = number
            if reference is not None:
                prompt = batch.prompts.tokens[index][-int(batch.prompts.length[index]) :].tolist()
                for sample, scores in zip(samples, reference([(prompt, each) for each in ids]), strict=True):
                    sample["reference_logprob"] = round(sum(scores), 5)
            entry = {"item_id": item["item_id"], "prompt": item["body"], "answer": item["answer"]}
            entry["columns"] = {name: column(item, name) for name in columns}
            if drawn.episodes:
                entry["episodes"] = {name: [float(p[index]) for p in pair] for name, pair in drawn.episodes.items()}
            yield entry | {"greedy": samples[0], "samples": samples[1:]}

    return records


def make_evaluate(
    model: Model,
    grade: Grader,
    tokenizer: Tokenizer,
    *,
    samples_per_problem: int,
    k: Sequence[int],
    by: str | None = None,
    **settings: Any,
) -> Callable[..., dict[str, float]]:
    """Build evaluate(params, items, key, write=None) -> metrics; compiles a decoding program for each width.

    Each problem is decoded once greedily and `samples_per_problem` times, in one program. The result holds `greedy`
    (accuracy of the greedy completion), `pass@k` (unbiased) and `maj@k` (k > 1) for each k, means over problems; over
    the sampled completions `completion_tokens`, `truncated_share`, and the means of an environment's metrics;
    `problems` and `samples_per_problem` are the counts.

    Args:
      model, grade, tokenizer, samples_per_problem: as for `make_records`.
      k: of pass@k and maj@k.
      by: one of `columns`: accuracies are also reported for each of its values, as `source/VALUE/pass@1`; None: not.
      **settings: the other settings of `make_records`.

    `write` is called with the records of each batch.

    Raises:
      ValueError: when a k exceeds the number of samples.
    """
    require_k(k, samples_per_problem)
    records_of = make_records(model, grade, tokenizer, samples_per_problem=samples_per_problem, **settings)

    def evaluate(
        params: PyTree, items: Sequence[dict[str, Any]], key: Array, write: Callable[[list], Any] | None = None
    ) -> dict[str, float]:
        records: list[dict[str, Any]] = []
        for batch in records_of(params, items, key):
            records += batch
            if write is not None:
                write(batch)
        samples = [each for record in records for each in record["samples"]]
        found = accuracies(records, k)
        values = [] if by is None else [record["columns"][by] for record in records]
        parts = {f"source/{value}/": np.array([one == value for one in values]) for value in dict.fromkeys(values)}
        return {
            **{name: float(np.mean(of)) for name, of in found.items()},
            **{part + name: float(np.mean(of[own])) for part, own in parts.items() for name, of in found.items()},
            **episode_means(records),
            "completion_tokens": float(np.mean([each["tokens"] for each in samples])),
            "truncated_share": float(np.mean([each["truncated"] for each in samples])),
            "problems": len(records),
            "samples_per_problem": samples_per_problem,
        }

    return evaluate


def require_k(k: Sequence[int], samples: int) -> None:
    """Raise ValueError if there are too few samples per problem for pass@k."""
    if not k or min(k) < 1:
        raise ValueError(f"k is {list(k)}; give numbers of at least 1")
    if max(k) > samples:
        raise ValueError(f"k is {list(k)}, but {there_are(samples, 'sample')} a problem; k must not exceed that number")


def problems_per_batch(samples_per_problem: int, sequences_per_batch: int) -> int:
    """Number of problems whose completions are decoded together."""
    return max(1, sequences_per_batch // (1 + samples_per_problem))


def column(item: Mapping[str, Any], name: str) -> Any:
    """A column of an item: of the line of a file that it was read from, or of the item itself.

    Raises:
      ValueError: for a missing column, or a value other than a number, text or boolean.
    """
    columns = own_columns(item)
    if not isinstance(value := columns.get(name), str | int | float | bool):
        known = sorted(each for each, held in columns.items() if isinstance(held, str | int | float | bool))
        raise ValueError(
            f"{named_item(item)} has no column {name!r} that holds a number or a text; there are "
            f"{', '.join(known) or 'none'}"
        )
    return value


def decoding_program(
    model: Model,
    tokenizer: Tokenizer,
    rows: int,
    max_completion_tokens: int,
    temperature: float,
    mesh: jax.sharding.Mesh | None,
    rules: Rules,
    gather: bool,
    environment: Environment | HostEnvironment | None,
    rewards: Mapping[str, Callable[..., Any]],
) -> Callable[..., Drawn]:
    """(parameters, prompts, weights of problems, key) -> `Drawn`, `rows` completions per problem, in one program; with
    an environment in Python (parameters, batch, key, its caller) -> `Drawn`, in several programs."""
    sizes: dict[str, Any] = {
        "samples_per_prompt": rows,
        "max_completion_tokens": max_completion_tokens,
        "eos_ids": tokenizer.eos_ids,
        "pad_id": tokenizer.pad_id,
        "temperature": jnp.asarray([0.0] + [temperature] * (rows - 1)),
    }

    @jax.jit
    def facts(experience: Experience, counted: Array) -> Drawn:
        count = counted.shape[0]
        of_problem = jnp.repeat(jnp.eye(count) * counted[:, None], rows, axis=1)
        sampled = jnp.arange(count * rows) % rows > 0
        return Drawn(
            experience.tokens,
            experience.length,
            experience.truncated,
            (experience.behaviour_logprobs * experience.mask).sum(1),
            experience.get("solved"),
            {name: called_with(function, experience.known()) for name, function in rewards.items()},
            jax.vmap(lambda weight: metrics_of(experience, weight))(of_problem * sampled),
        )

    if isinstance(environment, HostEnvironment):
        turns = host_turns(model, environment, encode=tokenizer.encode, decode=tokenizer.decode, **sizes)

        def in_python(params: PyTree, batch: Any, key: Array, call: Any) -> Drawn:  # `records` opens the environment
            asked = (turns, params, batch.prompts, batch.items, key, 0, call)
            return facts(host_generate_turns(*asked, present=np.asarray(batch.weight) > 0), batch.weight)

        return in_python

    def sampled(params: PyTree, prompts: Prompts, counted: Array, key: Array) -> Drawn:
        given = (model, weights_for_decoding(model, params) if gather else params, prompts, key, 0)
        if environment is not None:
            return facts(generate_turns(*given, environment, **sizes, constrain=constrain_rows), counted)
        return facts(generate(*given, **sizes, constrain=constrain_rows), counted)

    return jax.jit(laid_out(sampled, mesh, decoding(rules, gathered=gather)))


def _sample(item: Mapping[str, Any], text: str, grade: Grader, drawn: Drawn, row: int) -> dict[str, Any]:
    """The record of one completion; for a conversation the environment decides whether it is right."""
    said = Grade(*grade(item, text))
    right, answer = bool(said.right), said.answer
    if drawn.solved is not None:
        right = bool(drawn.solved[row] > 0)
        answer = item["answer"] if right else None if answer == item["answer"] else answer
    sample = {
        "completion": text,
        "correct": right,
        "answer": answer,
        "tokens": int(drawn.length[row]),
        "truncated": bool(drawn.truncated[row]),
        "logprob": round(float(drawn.logprob[row]), 5),
    }
    more = {"score": said.score, "confidence": said.confidence}
    return sample | {name: float(value) for name, value in more.items() if value is not None}


def _rewards(
    readings: Sequence[Reading], item: Mapping[str, Any], texts: list[str], drawn: Drawn, own: range
) -> dict[str, list[float | None]]:
    """Values of every reward for the completions of one problem; None where it does not apply."""
    text = {"completions": texts, "prompts": [item["body"]], "answers": [item["answer"]], "items": [dict(item)]}
    text = {name: values if len(values) == len(texts) else values * len(texts) for name, values in text.items()}
    text |= {name[:-1]: values for name, values in text.items()}
    arrays = {"tokens": drawn.tokens, "length": drawn.length, "truncated": drawn.truncated}
    data = text | {name: value[own.start : own.stop] for name, value in arrays.items()}
    found = {name: value[own.start : own.stop].tolist() for name, value in drawn.rewards.items()}
    for reading in readings:
        columns = {name: [value] * len(texts) for name, value in ({**(item.get("raw") or {}), **item}).items()}
        asked = {name: value for name, value in (columns | data).items() if name in names(reading.function)}
        values = answered(reading, asked, rows=len(texts), names=[reading.name]).values[reading.name]
        found[reading.name] = [None if value is None else float(value) for value in values]
    return {name: [None if v is None or np.isnan(v) else v for v in values] for name, values in found.items()}
