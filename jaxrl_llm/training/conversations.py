"""Training on conversations: which environment answers, what cannot be had with one, and a step with one in Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import jax
from jax.sharding import NamedSharding

from jaxrl_llm.experience import Experience, Prompts, TrainState
from jaxrl_llm.rollout.environment_checks import require_environment
from jaxrl_llm.rollout.environments import Environment
from jaxrl_llm.rollout.host_calls import Caller
from jaxrl_llm.rollout.host_environments import HostEnvironment, opened
from jaxrl_llm.rollout.host_turns import HostTurns, host_generate_turns
from jaxrl_llm.rollout.turns import TURN_FIELDS
from jaxrl_llm.training.score import RewardTerm, host_components

AnyEnvironment = Environment | HostEnvironment


def check_conversations(
    environment: AnyEnvironment, rollout: Mapping[str, Any], wanted: frozenset[str], others: Mapping[str, Any]
) -> None:
    """Refuse what conversations cannot be had with.

    Args:
      environment: what answers.
      rollout: settings of the rollout by name, as they are set; those that are not have false values.
      wanted: on-demand fields that something names.
      others: further parts by name; None where they are not there.

    Raises:
      ValueError: naming the part and the remedy.
    """
    given = [f"rollout.{name}" for name, value in rollout.items() if value]
    given += [name for name, value in others.items() if value is not None]
    if isinstance(environment, HostEnvironment) and "baseline_rewards" in wanted:
        given += ["a greedy baseline ('baseline_rewards')"]
    if given:
        raise ValueError(
            f"{given[0]} is set, but an environment answers the task in turns, and conversations are drawn one way; "
            "leave it out, or choose a task of one completion"
        )


def prepared(environment: AnyEnvironment, prompts: Prompts, vocabulary_size: int) -> None:
    """Check an environment inside the program against prompts of the widths that will be used."""
    if isinstance(environment, Environment):
        require_environment(environment, prompts, vocabulary_size=vocabulary_size)


def run_with_host_environment(
    turns: HostTurns,
    programs: Sequence[Callable],
    rewards: Sequence[RewardTerm],
    decode: Callable[[Sequence[int]], str] | None,
) -> Callable[..., tuple[TrainState, dict[str, Any], Experience]]:
    """A step whose conversations wait for an environment in Python, and then runs two programs.

    It takes `call=`, from `opened(environment)`; without it the environment is opened for the one step.
    """

    def run(
        state: TrainState,
        prompts: Prompts,
        items: Sequence[dict] | None = None,
        stored: Experience | None = None,
        *,
        call: Caller | None = None,
    ):
        if items is None:
            raise ValueError(
                "this step has an environment in Python: call step(state, prompts, items) with one dictionary a prompt "
                "(body, answer, ...)"
            )
        with ExitStack() as stack:
            ready = call or stack.enter_context(opened(turns.environment))
            rows = host_generate_turns(turns, state.params, prompts, items, state.key, state.step, ready)
        rows = programs[0](state, rows)
        if any(term.on_host for term in rewards):
            assert decode is not None  # `wanted_fields` has checked it
            components: Any = host_components(rewards, rows, items, decode)
            placement = rows.reward_components.sharding
            if isinstance(placement, NamedSharding):
                components = jax.device_put(components, placement)
            rows = rows.replace(reward_components=components)
        return programs[1](state, rows, stored)

    return run


__all__ = [
    "TURN_FIELDS",
    "AnyEnvironment",
    "check_conversations",
    "prepared",
    "run_with_host_environment",
]
