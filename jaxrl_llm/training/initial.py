"""The initial state of a step, with every array created in its final sharding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxrl_llm.experience import TrainState
from jaxrl_llm.network_names import compared_with
from jaxrl_llm.parallel.backend import options_of_one_run
from jaxrl_llm.parallel.rules import laid_out
from jaxrl_llm.training.collect import PLAN, SELECTION, first_choices, first_store
from jaxrl_llm.training.composition import Composition
from jaxrl_llm.training.networks import POLICY, given_shapes, initial_networks
from jaxrl_llm.training.segments import in_device_memory, parameter_shardings, placed_state


def initial_state(
    c: Composition, key: Array, params: PyTree | None = None, given: Mapping[str, PyTree] | None = None
) -> TrainState:
    """A fresh state. Everything is copied, so the caller's arrays stay usable after the state is donated."""
    memory = {name: method.init() for name, method in c.stateful.items()}
    if c.rollout is not None and (of_plan := c.plan.memory()) is not None:
        memory[PLAN] = of_plan
    if c.rollout is not None and c.rollout.selection is not None:
        memory[SELECTION] = first_choices(c, key)
    return TrainState(
        networks=initial_networks(c.model, c.optimizer, c.networks, key, params, given or {}),
        # A method may use one zero array twice, but every buffer can be donated only once.
        memory=jax.tree.map(jnp.copy, memory),
        key=jnp.copy(key),
        step=jnp.int32(0),
        store=first_store(c),
    )


def initialiser(c: Composition) -> tuple[Callable[..., TrainState], Composition]:
    """(`initial_state` compiled: (key, params, networks) -> state, the composition with the shardings of its state)."""
    place = c.resources.placement
    if place.mesh is None:
        return jax.jit(laid_out(partial(initial_state, c), None, place.rules), compiler_options=options_of_one_run()), c
    models = {POLICY: c.model} | {name: one.model for name, one in c.networks.items() if one.model is not None}
    state = jax.eval_shape(partial(initial_state, c), jax.random.key(0), None, given_shapes(c.networks))
    placed = placed_state(models, state, place.mesh, place.rules, offload=place.offload)
    c = replace(c, placed=placed)
    return _initial_on_mesh(c), c


def in_use(c: Composition, state: TrainState) -> TrainState:
    """The state with the offloaded arrays that the update reads in device memory."""
    reference, read = c.networks.get("reference"), {"optimizer"}
    if reference is not None and (reference.moves or "reference" in map(compared_with, c.named)):
        read |= {"reference"}
    return in_device_memory(state, c.placed, c.resources.placement.offload & read)


def _initial_on_mesh(c: Composition) -> Callable[..., TrainState]:
    """`initial_state` with every array created in its final sharding: no device ever holds the whole state."""
    place = c.resources.placement
    assert place.mesh is not None
    on_device = jax.tree.map(lambda s: s.with_memory_kind("device"), c.placed)
    program = jax.jit(
        laid_out(partial(initial_state, c), place.mesh, place.rules),
        out_shardings=on_device,
        compiler_options=options_of_one_run(),
    )
    lies = parameter_shardings(c.model, place.mesh, place.rules)

    def init(key: Array, params: PyTree | None = None, networks: Mapping[str, PyTree] | None = None) -> TrainState:
        state = program(key, None if params is None else jax.device_put(params, lies), networks)
        return jax.tree.map(lambda x, s: jax.device_put(x, s) if s.memory_kind == "pinned_host" else x, state, c.placed)

    return init
