"""Outputs of networks on rows before the update; only outputs that a function reads are computed.

All outputs are without gradient and use the parameters at the start of the step. A view is another sequence made from a
row; it is scored like the row itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxrl_llm.experience import Branches, Experience, Sequences, TrainState
from jaxrl_llm.fields import provided_by
from jaxrl_llm.models.heads import at_first, at_last, head_outputs
from jaxrl_llm.models.logprobs import positions_per_chunk, scaled_log_softmax, token_statistics
from jaxrl_llm.models.model import Model
from jaxrl_llm.network_names import Score
from jaxrl_llm.parallel.rules import constrain_rows, map_shards, shards
from jaxrl_llm.rollout.hidden_states import branched_hidden, predicting_hidden, prompt_hidden
from jaxrl_llm.rollout.positions import completion_positions, prompt_positions
from jaxrl_llm.signatures import call
from jaxrl_llm.terms import Fill
from jaxrl_llm.training.composition import Composition
from jaxrl_llm.training.networks import Network, backbone_of, current, frozen_part
from jaxrl_llm.training.passes import Plain, Size, at_smallest_size, hidden_of, in_rows
from jaxrl_llm.training.passes import scored as scored_by
from jaxrl_llm.training.segments import in_device_memory


def sequences(c: Composition, rows: Experience, view: str) -> tuple[Plain, Float[Array, "B T"]]:
    """(sequences to score, mask of their tokens) of the rows themselves (view ""), or of a view with one sequence per
    row."""
    made, mask = scored_of(c, rows, view)
    if isinstance(made, Branches):
        raise ValueError(
            f"view {view!r} makes several sequences of a row, for which only log-probabilities and entropy before the "
            "update are available; read those, or make a view of one sequence"
        )
    return made, mask


def scored_of(c: Composition, rows: Experience, view: str) -> tuple[Plain | Branches, Float[Array, "B ..."]]:
    """(sequences to score, mask of their tokens) of the rows themselves (view ""), or of a view."""
    if not view:
        own = Plain(rows.prompt_tokens, rows.prompt_length, rows.tokens, rows.length, rows.support, rows.router_choices)
        return own, rows.mask
    if c.views[view].stored:
        read = {name: rows[f"{view}_{name}"] for name in ("prompt_tokens", "prompt_length", "tokens", "length", "mask")}
        made = Sequences(**read)
    else:
        made = call(c.views[view].function, rows.known())
        if isinstance(made, Branches):
            return made, made.mask
    own = Plain(made.prompt_tokens, made.prompt_length, made.tokens, made.length, None, None)
    return own, made.mask


def by_microbatch(
    function: Callable[[Experience], Experience], rows: Experience, size: int | None, *, together: bool = False
) -> Experience:
    """Apply `function`, which treats rows independently, to `size` rows at a time, so it needs no more memory than the
    update.

    Args:
      function: rows -> rows.
      rows: all of them.
      size: rows per piece; None, or a size that does not divide the rows, processes all at once.
      together: pieces are consecutive rows. Otherwise pieces are strided, so that each device of a mesh has its part of
        every piece among its own rows.
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


def viewed(
    c: Composition,
    state: TrainState,
    rows: Experience,
    wanted: Collection[str],
    *,
    own_samples: bool,
    rows_are_groups: bool = False,
) -> Experience:
    """Rows with all wanted outputs of networks before the update.

    Args:
      c, state: of the step.
      rows: completions.
      wanted: names; those that the rows already have, or that are not outputs of networks, are ignored.
      own_samples: every completion was sampled by this policy at this temperature, so that the sampler's
        log-probabilities equal those of another pass.
      rows_are_groups: every `c.samples` consecutive rows have the same prompt.
    """
    wanted = frozenset(name for name in wanted if name not in rows)
    if c.rollout is not None and c.rollout.engine is not None:
        wanted |= {"old_entropy"} - rows.fields.keys()
    asked = {name: found for name in sorted(wanted) if (found := c.score(name)) is not None}
    special = wanted & provided_by("network")
    special |= wanted & c.view_masks
    if not asked and not special:
        return rows
    place = c.resources.placement
    if "reference" in c.networks and any(found.network == "reference" for found in asked.values()):
        state = in_device_memory(state, c.placed, place.offload & {"reference"})
    # On one device the pieces are consecutive rows, and so may be whole groups.
    at_once, together = c.update.sequences_per_microbatch, place.mesh is None or place.mesh.size == 1
    whole_groups = not at_once or (together and at_once % c.samples == 0)
    samples = c.samples if rows_are_groups and whole_groups else 1

    recorded = {"old_logprobs", "old_entropy"} if own_samples else set()
    own = [found.view for name, found in asked.items() if name not in recorded] + [""] * ("hidden" in special)

    def said(rows: Experience, size: Size) -> dict[str, Array]:
        values = _of_policy(c, state, rows, wanted, size, own_samples=own_samples)
        for name, found in asked.items():
            if name not in values and name not in rows:
                values |= _scores(c, state, rows, found, asked, samples, size)
        return {name: values[name] for name in (*asked, *sorted(special)) if name in values}

    def scored(rows: Experience) -> Experience:
        return rows.filled(**(at_smallest_size(c.update, rows, said) if "" in own else said(rows, None)))

    rows = by_microbatch(scored, rows, at_once, together=together) if wanted - recorded else scored(rows)
    if c.rollout is not None and c.rollout.engine is not None:
        # An engine does not report the entropy of its distribution; the policy's entropy is used instead.
        rows = replace(rows, behaviour_entropy=jnp.asarray(rows["old_entropy"]))
    return rows


def _of_policy(
    c: Composition, state: TrainState, rows: Experience, wanted: frozenset[str], size: Size, *, own_samples: bool
) -> dict[str, Array]:
    """The wanted outputs of the policy on its own rows, in one pass."""
    model, params, values = c.model, state.params, {}
    if own_samples:
        record = {"old_logprobs": rows.behaviour_logprobs, "old_entropy": rows.behaviour_entropy}
        values |= {name: record[name] for name in wanted & record.keys()}
    if wanted & {"prompt_logprobs", "prompt_mask"}:
        logprobs, mask = prompt_logprobs(model, params, rows, temperature=c.temperature)
        values |= {name: v for name, v in (("prompt_logprobs", logprobs), ("prompt_mask", mask)) if name in wanted}
    for view in c.views:
        if f"{view}_mask" in wanted:
            values[f"{view}_mask"] = scored_of(c, rows, view)[1]
    names = {"hidden", "old_logprobs", "old_entropy", "logprobs", "entropy"} & wanted - values.keys()
    source, routes = sequences(c, rows, "")[0], rows.router_choices
    if names == {"hidden"}:
        values["hidden"] = in_rows(hidden_of(model, params, source, size, router_choices=routes)[0], source, size)
    elif names:
        entropy = bool(names & {"old_entropy", "entropy"})
        options = {"temperature": c.temperature, "entropy": entropy, "router_choices": routes}
        scored = scored_by(model, params, source, size, **options)
        inside = jnp.arange(rows.tokens.shape[1]) < rows.length[:, None]
        for name in names:
            if name == "hidden":
                values["hidden"] = scored.hidden()
                continue
            value: Any = scored.statistics.entropy if name.endswith("entropy") else scored.statistics.logprobs
            values[name] = jnp.where(inside, value, 0.0)
    return values


def _scores(
    c: Composition,
    state: TrainState,
    rows: Experience,
    found: Score,
    asked: Mapping[str, Score],
    samples: int,
    size: Size,
) -> dict[str, Array]:
    """All requested outputs of one network on one view, in one pass; views use their full width."""
    size = None if found.view else size
    together = {name: s for name, s in asked.items() if (s.network, s.view) == (found.network, found.view)}
    network = c.networks.get(found.network)
    if network is not None and (made_from := owner(c, found.network)).head is not None:
        source, mask = sequences(c, rows, found.view)
        said = of_head(
            made_from,
            made_from.model or c.model,
            current(c.model, c.networks, state, found.network),
            source,
            mask,
            {s.quantity for s in together.values()},
            policy=state.params,
            frozen=frozen_part(c.model, state.params) if made_from.model is None else None,
            size=size,
        )
        return {name: said[s.quantity] for name, s in together.items()}
    model = c.model if network is None or network.model is None else network.model
    temperature = c.temperature if network is None or network.temperature is None else network.temperature
    with jax.named_scope(found.network):
        params = current(c.model, c.networks, state, found.network)
        entropy = any(s.quantity == "entropy" for s in together.values())
        source, _ = scored_of(c, rows, found.view)
        shape = source.tokens.shape
        if isinstance(source, Branches):
            own = rows.prompt_tokens, rows.prompt_length, rows.tokens, rows.length
            hidden, tokens = branched_hidden(model, params, *own, source), source.tokens.reshape(-1, shape[-1])
            scored = token_statistics(model, params, hidden, tokens, temperature=temperature, entropy=entropy)
        else:
            options = {"temperature": temperature, "entropy": entropy}
            options |= {"samples_per_prompt": 1 if found.view else samples}
            scored = scored_by(model, params, source, size, **options).statistics
    said = {n: scored.logprobs if s.quantity == "logprobs" else scored.entropy for n, s in together.items()}
    return {name: jnp.asarray(value).reshape(shape) for name, value in said.items()}


def owner(c: Composition, name: str) -> Network:
    """The origin of a network, which defines the head of a copy."""
    network = c.networks[name]
    return owner(c, network.origin) if network.head is None and network.origin in c.networks else network


def of_head(
    network: Network,
    model: Model,
    params: PyTree,
    source: Plain,
    mask: Float[Array, "B T"],
    quantities: Collection[str],
    *,
    policy: PyTree,
    policy_hidden: Float[Array, "B T D"] | None = None,
    frozen: PyTree = None,
    size: Size = None,
) -> dict[str, Array]:
    """Outputs of a network with a head on sequences, by quantity.

    Values are computed from the state before each token: [B T], [B T N], or one of them per row, depending on
    `network.says`. Scores are computed from the state after the last token: [B] or [B N].

    Args:
      network: its description.
      model: the architecture of its backbone.
      params: "head", and "backbone" unless it shares the policy's.
      source: the sequences.
      mask: counted tokens.
      quantities: "values", "scores".
      policy: the policy's parameters, for a head that shares its backbone.
      policy_hidden: the policy's hidden states of these sequences, if known.
      frozen: the frozen part of the policy's parameters, which an own backbone also reads.
      size: a size that holds the sequences.
    """
    assert network.head is not None
    own = "backbone" in params
    backbone = backbone_of(model, params, policy, frozen)
    found = {}
    if "values" in quantities:
        hidden = None if own else policy_hidden
        if hidden is None:
            hidden = in_rows(hidden_of(model, backbone, source, size)[0], source, size)
        values = head_outputs(params["head"], hidden)
        if network.says == "first":
            values = at_first(values, mask)
        found["values"] = values
    if "scores" in quantities:
        found["scores"] = head_outputs(params["head"], final_hidden(model, backbone, source))
    return {name: value[..., 0] if network.head.outputs == 1 else value for name, value in found.items()}


def final_hidden(model: Model, params: PyTree, source: Plain) -> Float[Array, "B D"]:
    """Hidden state after the last token of each sequence."""
    positions = jnp.concatenate(
        [
            prompt_positions(source.prompt_length, source.prompt_tokens.shape[1]),
            completion_positions(source.prompt_length, source.length, source.tokens.shape[1]),
        ],
        axis=1,
    )
    hidden = model.apply(params, jnp.concatenate([source.prompt_tokens, source.tokens], axis=1), positions, None)[0]
    return at_last(hidden, positions)


def hidden_states(
    model: Model, params: PyTree, rows: Experience, *, replayed: bool = False, samples_per_prompt: int = 1
) -> Float[Array, "B T D"]:
    """Hidden state that predicts each completion token; with `replayed`, with the recorded experts."""
    routes = rows.router_choices if replayed else None
    rows_of = rows.prompt_tokens, rows.prompt_length, rows.tokens, rows.length
    return predicting_hidden(model, params, *rows_of, router_choices=routes, samples_per_prompt=samples_per_prompt)


def prompt_logprobs(
    model: Model, params: PyTree, rows: Experience, *, temperature: float
) -> tuple[Float[Array, "B P"], Float[Array, "B P"]]:
    """Log-probability of each prompt token after the first, and a mask that is 1 on these tokens."""
    hidden = prompt_hidden(model, params, rows.prompt_tokens, rows.prompt_length)
    scored = token_statistics(model, params, hidden[:, :-1], rows.prompt_tokens[:, 1:], temperature=temperature)
    width = rows.prompt_tokens.shape[1]
    mask = (jnp.arange(width) > width - rows.prompt_length[:, None]).astype(jnp.float32)
    return jnp.pad(scored.logprobs, ((0, 0), (1, 0))) * mask, mask


def over_vocabulary(
    model: Model, params: PyTree, rows: Experience, terms: Sequence[Fill], *, temperature: float
) -> dict[int, Float[Array, "B T"]]:
    """Values of the credit entries that read full distributions, by index in the list; one pass in chunks.

    Such a function gets the log-softmax [B, chunk, V] of the policy before the update and the tokens [B, chunk].
    """
    chosen = {index: term for index, term in enumerate(terms) if term.over_vocabulary}
    if not chosen:
        return {}
    split = hidden_states(model, params, rows), rows.tokens
    part = -(-model.vocabulary_size // shards("vocabulary"))
    scored = partial(_by_vocabulary, model, chosen, temperature, part)
    return map_shards(scored, params, split, "rows", "positions")


def _by_vocabulary(
    model: Model, chosen: Mapping[int, Fill], temperature: float, part: int, params: PyTree, rows: Any
) -> dict[int, Float[Array, "B T"]]:
    """`over_vocabulary` of the local rows, with a vocabulary of which each device holds `part`."""
    hidden, tokens = rows
    count, width = tokens.shape
    chunk = positions_per_chunk(count, width, part)
    pieces = -(-width // chunk)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, pieces * chunk - width)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(count, pieces, chunk, *x.shape[2:]).swapaxes(0, 1)

    def score(piece):
        hidden, tokens = piece
        provided = {
            "log_probabilities": scaled_log_softmax(model.logits(params, hidden), temperature),
            "tokens": tokens,
        }
        return {index: call(term.function, provided) for index, term in chosen.items()}

    values = jax.lax.map(score, (split(hidden), split(tokens)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(count, pieces * chunk)[:, :width], values)
