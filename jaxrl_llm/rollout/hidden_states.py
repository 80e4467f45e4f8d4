"""Teacher-forced scoring: hidden states that predict the completion tokens of given rows."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxrl_llm.experience import Branches
from jaxrl_llm.models.model import Model
from jaxrl_llm.rollout.positions import completion_positions, prompt_positions


def predicting_hidden(
    model: Model,
    params: PyTree,
    prompt_tokens: Int[Array, "B P"],
    prompt_length: Int[Array, "B"],
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    *,
    router_choices: Int[Array, "B P+T L k"] | None = None,
    samples_per_prompt: int = 1,
) -> Float[Array, "B T D"]:
    """Hidden state that predicts each completion token: the state of the token before it.

    Positions are computed from lengths, so padding ids are not read. A mixture of experts can use recorded choices.

    Args:
      model: the policy.
      params: its parameters.
      prompt_tokens, prompt_length, tokens, length: as in `Experience`.
      router_choices: recorded choices for prompt and completion tokens.
      samples_per_prompt: number of consecutive rows with the same prompt; if the model benefits, the prompt is
        processed once for all of them, forward and backward.
    """
    return observed_hidden(
        model,
        params,
        prompt_tokens,
        prompt_length,
        tokens,
        length,
        router_choices=router_choices,
        samples_per_prompt=samples_per_prompt,
    )[0]


def observed_hidden(
    model: Model,
    params: PyTree,
    prompt_tokens: Int[Array, "B P"],
    prompt_length: Int[Array, "B"],
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    *,
    router_choices: Int[Array, "B P+T L k"] | None = None,
    samples_per_prompt: int = 1,
    names: tuple[str, ...] = (),
) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
    """`predicting_hidden`, and named internal quantities of the model for each token of prompt and completion."""
    if samples_per_prompt > 1 and model.shared_scoring and router_choices is None and not names:
        one = prompt_tokens[::samples_per_prompt], prompt_length[::samples_per_prompt]
        return _continued_hidden(model, params, *one, tokens, length), {}
    prompt_width, width = prompt_tokens.shape[1], tokens.shape[1]
    positions = jnp.concatenate(
        [prompt_positions(prompt_length, prompt_width), completion_positions(prompt_length, length, width)], axis=1
    )
    replayed = {} if router_choices is None else {"router_choices": jnp.moveaxis(router_choices, 2, 0)}
    arguments = params, jnp.concatenate([prompt_tokens, tokens], axis=1), positions, None
    if not names:
        return model.apply(*arguments, **replayed)[0][:, prompt_width - 1 : -1], {}
    if model.observe is None:
        raise ValueError(
            f"the model does not expose internal quantities (Model.observe), so it has no {', '.join(names)}"
        )
    hidden, _, observed = model.observe(*arguments, names=names, **replayed)
    return hidden[:, prompt_width - 1 : -1], {name: jnp.moveaxis(observed[name], 0, 2) for name in names}


def _continued_hidden(
    model: Model,
    params: PyTree,
    prompt_tokens: Int[Array, "N P"],
    prompt_length: Int[Array, "N"],
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
) -> Float[Array, "B T D"]:
    """Hidden states of B / N completions of each prompt, after a single pass over the prompt."""
    (count, width), samples = prompt_tokens.shape, tokens.shape[0] // prompt_tokens.shape[0]
    positions = prompt_positions(prompt_length, width)
    hidden, cache = model.apply(params, prompt_tokens, positions, model.init_cache(count, width))
    last = jnp.repeat(hidden[:, -1:], samples, axis=0)
    # The prediction of the last token is not needed.
    before = tokens[:, :-1]
    if before.shape[1] == 0:
        return last
    positions = completion_positions(jnp.repeat(prompt_length, samples), length, before.shape[1])
    hidden, _ = model.apply(params, before, positions, model.expand_cache(cache, samples, before.shape[1]))
    return jnp.concatenate([last, hidden], axis=1)


def branched_hidden(
    model: Model,
    params: PyTree,
    prompt_tokens: Int[Array, "B P"],
    prompt_length: Int[Array, "B"],
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    branches: Branches,
) -> Float[Array, "B*Q A D"]:
    """Hidden state that predicts each token of sequences that continue the same rows from different positions.

    A row is processed once for all of its branches, which share its keys and values, each up to its own position. A
    model without `Model.cut_cache` processes each branch as a whole sequence.

    Args:
      model, params: the network.
      prompt_tokens, prompt_length, tokens, length: of the rows, as in `Experience`.
      branches: the continuations.
    """
    count = branches.kept.shape[1]
    kept, end, ends = (x.reshape(-1, *x.shape[2:]) for x in (branches.kept, branches.length, branches.tokens))
    start = jnp.repeat(prompt_length, count) + kept
    if model.cut_cache is None:
        (rows, width), after = tokens.shape, ends.shape[1]
        place = jnp.arange(width + after)
        own = jnp.pad(jnp.repeat(tokens, count, axis=0), ((0, 0), (0, after)))
        behind = jnp.take_along_axis(ends, jnp.clip(place - kept[:, None], 0, after - 1), axis=1)
        whole = jnp.where(place < kept[:, None], own, behind)
        prompts, real = jnp.repeat(prompt_tokens, count, axis=0), jnp.repeat(prompt_length, count, axis=0)
        hidden = predicting_hidden(model, params, prompts, real, whole, kept + end)
        at = jnp.minimum(kept[:, None] + jnp.arange(after), width + after - 1)
        return jnp.take_along_axis(hidden, at[..., None], axis=1)
    rows, prompt_width, width = tokens.shape[0], prompt_tokens.shape[1], tokens.shape[1]
    positions = jnp.concatenate(
        [prompt_positions(prompt_length, prompt_width), completion_positions(prompt_length, length, width)], axis=1
    )
    both = jnp.concatenate([prompt_tokens, tokens], axis=1)
    hidden, cache = model.apply(params, both, positions, model.init_cache(rows, prompt_width + width))
    first = jnp.take_along_axis(hidden, prompt_width - 1 + branches.kept[..., None], axis=1)
    first = first.reshape(rows * count, 1, -1)
    before = ends[:, :-1]
    if before.shape[1] == 0:
        return first
    cache = model.cut_cache(model.expand_cache(cache, count, before.shape[1]), start)
    hidden, _ = model.apply(params, before, completion_positions(start, end, before.shape[1]), cache)
    return jnp.concatenate([first, hidden], axis=1)


def prompt_hidden(
    model: Model, params: PyTree, prompt_tokens: Int[Array, "B P"], prompt_length: Int[Array, "B"]
) -> Float[Array, "B P D"]:
    """Hidden state at each prompt token, which predicts the next one."""
    positions = prompt_positions(prompt_length, prompt_tokens.shape[1])
    return model.apply(params, prompt_tokens, positions, None)[0]
