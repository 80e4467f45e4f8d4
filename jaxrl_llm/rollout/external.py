"""Sampling by an external engine, and a probe that compares its log-probabilities with the policy's.

An engine has its own numerics. Its log-probabilities are those of the sampling distribution; the trainer computes the
log-probabilities of the policy for the same tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxrl_llm.endpoints import Endpoint, EndpointError
from jaxrl_llm.experience import Experience, Prompts, Source
from jaxrl_llm.models.logprobs import token_statistics
from jaxrl_llm.models.model import Model
from jaxrl_llm.rollout.completions_api import Completion, completion
from jaxrl_llm.rollout.hidden_states import predicting_hidden
from jaxrl_llm.rollout.sampling import row_keys


class LogprobGap(NamedTuple):
    """|engine's log-probability - ours| over tokens, in nats."""

    largest: float
    mean: float
    tokens: int


def engine_generate(
    engine: Endpoint,
    prompts: Prompts,
    key: Array,
    step: int,
    *,
    samples_per_prompt: int,
    max_completion_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    vocabulary_size: int,
    temperature: float = 1.0,
    first_sample: int | Int[Array, "..."] = 0,
) -> Experience:
    """What `generate` returns, sampled by an engine: arrays on the host, rows prompt-major.

    Each row is a separate request with a seed derived from (run key, step, prompt id, sample number), so that an engine
    with support for seeds is reproducible. Requests run in threads; the first failure ends the batch.

    Args:
      engine: address and request settings.
      prompts: N left-padded prompts.
      key: the run's key.
      step: training step.
      samples_per_prompt: G; B = N * G.
      max_completion_tokens: T, end of sequence included.
      eos_ids: tokens that end a completion, as its last token.
      pad_id: fills the rest.
      vocabulary_size: of the policy; other ids are refused.
      temperature: of the softmax, above 0.
      first_sample: number of the first sample of a prompt; one number, or one per prompt.

    Returns:
      `Experience` as from `generate`, except that `behaviour_entropy` is 0, since an engine does not report it; the
      training step replaces it by the entropy of its own policy.

    Raises:
      ValueError: for sizes below 1 or a temperature that is not above 0.
      EndpointError: for a failed request, or an unusable response.
    """
    if samples_per_prompt < 1 or max_completion_tokens < 1:
        raise ValueError(
            f"rollout.samples_per_prompt is {samples_per_prompt} and rollout.max_completion_tokens is "
            f"{max_completion_tokens}; both must be at least 1"
        )
    if not temperature > 0:
        raise ValueError(f"rollout.temperature is {temperature}; an engine needs a temperature above 0")
    count = prompts.tokens.shape[0]
    per_row = jax.tree.map(lambda x: np.repeat(np.asarray(x), samples_per_prompt, axis=0), jax.device_get(prompts))
    first = np.broadcast_to(np.asarray(jax.device_get(first_sample), np.int32), (count,))
    sample = np.repeat(first, samples_per_prompt) + np.tile(np.arange(samples_per_prompt, dtype=np.int32), count)
    seeds = np.asarray(request_seeds(key, np.int32(step), per_row.prompt_id, sample))
    width = per_row.tokens.shape[1]

    def ask(row: int) -> Completion:
        return completion(
            engine,
            per_row.tokens[row, width - per_row.length[row] :].tolist(),
            seed=int(seeds[row]),
            temperature=float(temperature),
            max_completion_tokens=max_completion_tokens,
            eos_ids=tuple(eos_ids),
            vocabulary_size=vocabulary_size,
            what=f"the request for prompt {per_row.prompt_id[row]}, sample {sample[row]} of step {step}",
        )

    rows = _in_threads(ask, count * samples_per_prompt, engine.concurrency)
    tokens = np.full((len(rows), max_completion_tokens), pad_id, np.int32)
    logprobs = np.zeros(tokens.shape, np.float32)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = row.tokens
        logprobs[number, : len(row.tokens)] = row.logprobs
    length = np.array([len(row.tokens) for row in rows], np.int32)
    inside = np.arange(max_completion_tokens) < length[:, None]
    values: dict[str, Any] = dict(
        prompt_tokens=per_row.tokens,
        prompt_length=per_row.length,
        prompt_id=per_row.prompt_id,
        answer_tokens=per_row.answer_tokens,
        answer_length=per_row.answer_length,
        sample=sample,
        group=np.repeat(np.arange(count, dtype=np.int32), samples_per_prompt),
        weight=np.ones(len(rows), np.float32),
        tokens=tokens,
        length=length,
        source=np.where(inside, Source.SAMPLED, Source.PAD).astype(np.int8),
        mask=inside.astype(np.float32),
        behaviour_logprobs=logprobs,
        behaviour_entropy=np.zeros_like(logprobs),
        truncated=np.array([not row.ended for row in rows]),
        fields=dict(per_row.fields),
    )
    return Experience(**values)


@jax.jit
def request_seeds(
    key: Array, step: Array | int, prompt_id: Int[Array, "B"], sample: Int[Array, "B"]
) -> Int[Array, "B"]:
    """A seed for each request; at most 31 bits, which every engine accepts."""
    bits = jax.vmap(lambda k: jax.random.bits(k, dtype=jnp.uint32))(row_keys(key, step, prompt_id, sample))
    return (bits >> 1).astype(jnp.int32)


def _in_threads(ask: Callable[[int], Completion], count: int, concurrency: int) -> list[Completion]:
    """ask(0), ask(1), ... in order. After a failure no further request is sent."""
    failing = threading.Event()

    def asked(row: int) -> Completion | None:
        if failing.is_set():
            return None
        try:
            return ask(row)
        except BaseException:
            failing.set()
            raise

    with ThreadPoolExecutor(min(concurrency, count), thread_name_prefix="engine") as pool:
        futures = [pool.submit(asked, row) for row in range(count)]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        if failing.is_set():
            pool.shutdown(wait=False, cancel_futures=True)
        failed = [error for f in futures if f in done and (error := f.exception()) is not None]
        if failed:
            raise failed[0]
        return [row for future in futures if (row := future.result()) is not None]


def logprob_gap(model: Model, params: PyTree, rows: Experience, *, temperature: float) -> LogprobGap:
    """Differences of the recorded log-probabilities from those of a teacher-forced pass of the model."""
    ours = np.asarray(_scored(model, temperature)(params, rows))
    gap = np.abs(ours - np.asarray(rows.behaviour_logprobs))[np.asarray(rows.mask) > 0]
    return LogprobGap(float(gap.max(initial=0.0)), float(gap.mean()) if gap.size else 0.0, int(gap.size))


def _scored(model: Model, temperature: float) -> Callable[[PyTree, Experience], Array]:
    def score(params: PyTree, rows: Experience) -> Float[Array, "B T"]:
        hidden = predicting_hidden(model, params, rows.prompt_tokens, rows.prompt_length, rows.tokens, rows.length)
        return token_statistics(model, params, hidden, rows.tokens, temperature=temperature).logprobs

    return jax.jit(score)


def probe(
    engine: Endpoint,
    model: Model,
    params: PyTree,
    prompts: Prompts,
    key: Array,
    *,
    max_completion_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    temperature: float = 1.0,
    step: int = 0,
    bound: float = 0.05,
    largest_bound: float = 1.0,
) -> LogprobGap:
    """Sample one completion of each prompt, score it with the model, and refuse an engine with other log-probabilities.

    Args:
      engine: as for `engine_generate`, as are the following sizes.
      model, params: the policy that the engine should serve.
      prompts: a few are enough.
      bound: for the mean |difference| over tokens, in nats.
      largest_bound: for the largest one; low precision alone can change single tokens by tenths.

    Returns:
      The differences.

    Raises:
      EndpointError: (a ValueError) above a bound, or as `engine_generate`.
    """
    rows = engine_generate(
        engine,
        prompts,
        key,
        step,
        samples_per_prompt=1,
        max_completion_tokens=max_completion_tokens,
        eos_ids=eos_ids,
        pad_id=pad_id,
        vocabulary_size=model.vocabulary_size,
        temperature=temperature,
    )
    gap = logprob_gap(model, params, rows, temperature=temperature)
    if not (gap.mean <= bound and gap.largest <= largest_bound):
        # A frequent cause: the engine's numbers equal ours at another temperature.
        raw = logprob_gap(model, params, rows, temperature=1.0) if temperature != 1 else gap
        hint = (
            f" Ours before temperature differ by only {raw.mean:.4g}, so the cause is the log-probabilities mode."
            if raw.mean <= bound
            else ""
        )
        raise EndpointError(
            f"the log-probabilities of {engine.url} ({engine.model}) differ from ours by {gap.mean:.4g} on average and "
            f"{gap.largest:.4g} at most, in nats over {gap.tokens} sampled tokens at temperature {temperature:g}; the "
            f"bounds are {bound:g} (rollout.engine.probe_bound) and {largest_bound:g} "
            "(rollout.engine.probe_largest_bound). Likely causes: the weights were not loaded; the engine reports "
            "log-probabilities before temperature (vLLM: start it with --logprobs-mode processed_logprobs); it samples "
            "at another temperature or truncated (top-k, top-p); it serves another model or tokenizer; its precision "
            f"is so low that the bounds must be raised.{hint}"
        )
    return gap
