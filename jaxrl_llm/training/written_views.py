"""Written views: a prompt is made from each row, and a network of the step completes it, for example as a judge.

The random keys of the tokens are derived from the run's key, the step, the view, the row's prompt and its sample
number, so the tokens depend neither on other rows nor on the mesh.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_llm.experience import Experience, KeyUse, Prompts, TrainState
from jaxrl_llm.models.mixture import geometric_mixture, value_guided
from jaxrl_llm.parallel.rules import constrain_rows, laid_out
from jaxrl_llm.rollout.generation import generate
from jaxrl_llm.signatures import call
from jaxrl_llm.terms import View
from jaxrl_llm.training.collect import sampling_layout
from jaxrl_llm.training.composition import Composition
from jaxrl_llm.training.networks import backbone_of, current, frozen_part
from jaxrl_llm.training.segments import Traced, Work

PARTS = ("prompt_tokens", "prompt_length", "tokens", "length", "mask")


def write_part(c: Composition, view: View, key: str) -> Traced:
    """The part in which a network completes the prompts of a view.

    Args:
      c: the composition of the step.
      view: with `written_by`; if it reads text, its prompts are already in the rows.
      key: entry of work with the rows.
    """

    def write(state: TrainState, work: Work) -> Work:
        rows: Experience = work[key]
        if view.on_host:
            made = {name: rows[f"{view.name}_{name}"] for name in PARTS}
            asked = made["length"] > 0
        else:
            returned = call(view.function, rows.known())
            made = {name: getattr(returned, name) for name in PARTS}
            asked = made["prompt_length"] > 0
        nothing = jnp.zeros((rows.tokens.shape[0], 0), jnp.int32)
        lengths = jnp.maximum(made["prompt_length"], 1)
        prompts = Prompts(made["prompt_tokens"], lengths, rows.prompt_id, nothing, jnp.zeros_like(lengths))
        written = _written(c, view, state, rows, prompts, asked & (rows.weight > 0))
        fields = {"prompt_tokens": made["prompt_tokens"], "prompt_length": lengths}
        fields |= {name: getattr(written, name) for name in PARTS[2:]}
        own = {name: value for name, value in rows.fields.items() if not name.startswith(f"{view.name}_")}
        return {key: replace(rows, fields=own).filled(**{f"{view.name}_{n}": x for n, x in fields.items()})}

    return Traced("write", write)


def _written(c: Composition, view: View, state: TrainState, rows: Experience, prompts: Prompts, asked: Array) -> Any:
    r, place = c.rollout, c.resources.placement
    assert r is not None  # ensured by `checked`
    models, laid = [], []
    for name in view.writers:
        network = c.networks.get(name)
        models.append(c.model if network is None or network.model is None else network.model)
        laid.append(sampling_layout(place, models[-1], current(c.model, c.networks, state, name)))
    (rules, weights), model = laid[0], models[0]
    if len(models) > 1:
        model, weights = geometric_mixture(*models, share=view.share), tuple(each for _, each in laid)
    if view.guided_by is not None:
        judge, params = _judge(c, view.guided_by, state)
        backbone = sampling_layout(place, judge, params["backbone"])[1]
        model = value_guided(model, judge, strength=view.strength, candidates=view.candidates)
        weights = weights, {"head": params["head"], "backbone": backbone}
    key = jax.random.fold_in(jax.random.fold_in(state.key, KeyUse.VIEW), zlib.crc32(view.name.encode()) % 2**31)
    complete = partial(
        generate,
        model,
        weights,
        key=key,
        step=state.step,
        samples_per_prompt=1,
        max_completion_tokens=view.max_completion_tokens or rows.tokens.shape[1],
        eos_ids=r.eos_ids,
        pad_id=r.pad_id,
        slots=r.slots,
        constrain=partial(constrain_rows, name="decoded_rows"),
    )
    complete = laid_out(complete, place.mesh, rules)
    written = complete(prompts, temperature=view.temperature, first_sample=rows.sample, active=asked)
    return constrain_rows(replace(written, mask=written.mask * written.weight[:, None]))


def _judge(c: Composition, name: str, state: TrainState) -> tuple[Any, dict[str, Any]]:
    """(model, full parameters of backbone and head) of a network with a head."""
    network, params = c.networks[name], current(c.model, c.networks, state, name)
    own = network.model if "backbone" in params else None
    frozen = frozen_part(c.model, state.params) if own is None else None
    model = own or c.model
    return model, {"head": params["head"], "backbone": backbone_of(model, params, state.params, frozen)}
