"""What a step computes before the update because, and only because, something names it.

Everything here is without gradient and looks at the policy (or a critic, or the reference) as the step found it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxrl_llm.experience import CriticState, Experience
from jaxrl_llm.models.logprobs import positions_per_chunk, scaled_log_softmax, token_statistics
from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel.rules import constrain_rows, map_shards, shards
from jaxrl_llm.rollout.hidden_states import predicting_hidden, prompt_hidden
from jaxrl_llm.training.credit import VOCABULARY, CreditTerm
from jaxrl_llm.training.critics import BEFORE, critic_outputs, named
from jaxrl_llm.training.trainable import frozen_part
from jaxrl_llm.training.wiring import call, filled

FROM_POLICY = frozenset({"old_logprobs", "old_entropy", "hidden", "prompt_logprobs", "prompt_mask"})
FROM_REFERENCE = frozenset({"reference_logprobs"})
FROM_DATA = frozenset({"demonstration_tokens", "demonstration_length"})
# Names that are computed when, and only when, something names them.
ON_DEMAND = FROM_POLICY | FROM_REFERENCE | FROM_DATA | BEFORE.keys() | {"baseline_rewards"}


def needs_a_pass(wanted: Collection[str], *, own_samples: bool) -> bool:
    """Whether a model has to read completions for what is wanted; `own_samples` as for `policy_view`."""
    recorded = {"old_logprobs", "old_entropy"} if own_samples else set()
    return bool((FROM_POLICY | FROM_REFERENCE | BEFORE.keys()).intersection(wanted) - recorded)


def by_microbatch(
    function: Callable[[Experience], Experience], rows: Experience, size: int | None, *, together: bool = False
) -> Experience:
    """`function`, which looks at each row alone, on `size` rows at a time: it needs no more memory than the update.

    Args:
      function: rows -> rows.
      rows: all of them.
      size: rows of a piece; None, or one that does not divide the rows, takes all at once.
      together: a piece is rows that follow one another. Else every so many rows make a piece, so that each device of a
        mesh finds its part of every piece among its own rows.
    """
    count = rows.tokens.shape[0]
    if not size or count % size or size == count:
        return function(rows)
    pieces = count // size

    def split(x):
        if together:
            return x.reshape(pieces, size, *x.shape[1:])
        return x.reshape(size, pieces, *x.shape[1:]).swapaxes(0, 1)

    def joined(x):
        return (x if together else x.swapaxes(0, 1)).reshape(count, *x.shape[2:])

    filled = jax.lax.map(function, constrain_rows(jax.tree.map(split, rows), None))
    return constrain_rows(jax.tree.map(joined, filled))


def hidden_states(
    model: Model, params: PyTree, rows: Experience, *, replayed: bool = False, samples_per_prompt: int = 1
) -> Float[Array, "B T D"]:
    """Hidden state that predicts each completion token, through the experts that were recorded where `replayed`."""
    routes = rows.router_choices if replayed else None
    rows_of = rows.prompt_tokens, rows.prompt_length, rows.tokens, rows.length
    return predicting_hidden(model, params, *rows_of, router_choices=routes, samples_per_prompt=samples_per_prompt)


def policy_view(
    model: Model,
    params: PyTree,
    rows: Experience,
    wanted: Collection[str],
    *,
    temperature: float,
    own_samples: bool,
) -> Experience:
    """Fill in what is wanted of the policy before the update.

    Args:
      model: the policy.
      params: its parameters.
      rows: completions.
      wanted: names; those that are not of `FROM_POLICY`, or are known already, are left alone.
      temperature: the one that is trained at.
      own_samples: every completion was drawn by this policy at this temperature, so that the sampler's record is what
        another pass would give.
    """
    wanted = frozenset(name for name in FROM_POLICY.intersection(wanted) if getattr(rows, name, None) is None)
    values: dict[str, Any] = {}
    if own_samples:
        record = {"old_logprobs": rows.behaviour_logprobs, "old_entropy": rows.behaviour_entropy}
        values |= {name: record[name] for name in wanted & record.keys()}
    if wanted & {"prompt_logprobs", "prompt_mask"}:
        logprobs, mask = prompt_logprobs(model, params, rows, temperature=temperature)
        values |= {name: v for name, v in (("prompt_logprobs", logprobs), ("prompt_mask", mask)) if name in wanted}
    if wanted - values.keys():
        hidden = hidden_states(model, params, rows, replayed=True)
        if "hidden" in wanted:
            values["hidden"] = hidden
        if wanted & {"old_logprobs", "old_entropy"} - values.keys():
            scored = token_statistics(
                model,
                params,
                hidden,
                rows.tokens,
                temperature=temperature,
                entropy="old_entropy" in wanted,
                support=rows.support,
            )
            inside = jnp.arange(rows.tokens.shape[1]) < rows.length[:, None]
            both = (("old_logprobs", scored.logprobs), ("old_entropy", scored.entropy))
            values |= {n: jnp.where(inside, v, 0.0) for n, v in both if n in wanted and v is not None}
    return filled(rows, **values)


def prompt_logprobs(
    model: Model, params: PyTree, rows: Experience, *, temperature: float
) -> tuple[Float[Array, "B P"], Float[Array, "B P"]]:
    """Log-probability of each prompt token after the first, and a mask that is 1 on them."""
    hidden = prompt_hidden(model, params, rows.prompt_tokens, rows.prompt_length)
    scored = token_statistics(model, params, hidden[:, :-1], rows.prompt_tokens[:, 1:], temperature=temperature)
    width = rows.prompt_tokens.shape[1]
    mask = (jnp.arange(width) > width - rows.prompt_length[:, None]).astype(jnp.float32)
    return jnp.pad(scored.logprobs, ((0, 0), (1, 0))) * mask, mask


def reference_logprobs(
    model: Model, params: PyTree, rows: Experience, *, temperature: float, samples_per_prompt: int = 1
) -> Float[Array, "B T"]:
    """Log-probabilities of the completions under the reference, by the function that the policy goes through.

    Each `samples_per_prompt` rows that follow one another have the same prompt.
    """
    with jax.named_scope("reference"):
        hidden = hidden_states(model, params, rows, samples_per_prompt=samples_per_prompt)
        scored = token_statistics(model, params, hidden, rows.tokens, temperature=temperature, support=rows.support)
        return scored.logprobs


def critic_view(
    model: Model,
    policy: PyTree,
    critics: Mapping[str, CriticState],
    rows: Experience,
    wanted: Collection[str],
) -> Experience:
    """Fill in what is wanted of the critics before the update."""
    asked = {(BEFORE[name].critic, BEFORE[name].target) for name in BEFORE.keys() & set(wanted)}
    if not asked:
        return rows
    shared = any("backbone" not in critics[name].params for name, _ in asked)
    hidden = hidden_states(model, policy, rows) if shared else jnp.zeros((0,))
    kept, outputs = frozen_part(model, policy), {}
    for name, target in asked:
        slow = critics[name].target_params
        params = slow if target and slow is not None else critics[name].params
        outputs[name, target] = critic_outputs(model, params, rows, hidden, kept)
    return filled(rows, **named(BEFORE, wanted, outputs, rows))


def over_vocabulary(
    model: Model, params: PyTree, rows: Experience, terms: Sequence[CreditTerm], *, temperature: float
) -> dict[int, Float[Array, "B T"]]:
    """Values of the credit entries that read whole distributions, by place in the list; one pass in chunks.

    Such a function sees the log-softmax [B, chunk, V] of the policy before the update and the tokens [B, chunk].
    """
    chosen = {index: term for index, term in enumerate(terms) if term.over_vocabulary}
    if not chosen:
        return {}
    split = hidden_states(model, params, rows), rows.tokens
    part = -(-model.vocabulary_size // shards("vocabulary"))
    scored = partial(_by_vocabulary, model, chosen, temperature, part)
    return map_shards(scored, params, split, "rows", "positions")


def _by_vocabulary(
    model: Model, chosen: Mapping[int, CreditTerm], temperature: float, part: int, params: PyTree, rows: Any
) -> dict[int, Float[Array, "B T"]]:
    """`over_vocabulary` of the rows that are here, of a vocabulary of which a device holds `part`."""
    hidden, tokens = rows
    count, width = tokens.shape
    chunk = positions_per_chunk(count, width, part)
    pieces = -(-width // chunk)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, pieces * chunk - width)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(count, pieces, chunk, *x.shape[2:]).swapaxes(0, 1)

    def score(piece):
        hidden, tokens = piece
        provided = {VOCABULARY: scaled_log_softmax(model.logits(params, hidden), temperature), "tokens": tokens}
        return {index: call(term.function, provided) for index, term in chosen.items()}

    values = jax.lax.map(score, (split(hidden), split(tokens)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(count, pieces * chunk)[:, :width], values)
