"""Networks with scalar outputs that are trained beside the policy: value models and token reward models.

A function that names one of their outputs brings the network into the step. Its state is that of the position before a
token, so V_t is what is expected before token t is drawn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxrl_llm.experience import CriticState, Experience
from jaxrl_llm.models.heads import Backbone, HeadConfig, at_first, from_policy, head_outputs
from jaxrl_llm.models.model import Model
from jaxrl_llm.rollout.hidden_states import predicting_hidden
from jaxrl_llm.training.trainable import trainable_part, whole


class Output(NamedTuple):
    """What a data name means: which critic, and of which of its parameters.

    Attributes:
      critic: name of the critic.
      target: of its slowly moving copy.
      per_row: one number (or one a head) a row, at the first token; else one a token.
    """

    critic: str
    target: bool = False
    per_row: bool = False


# Numbers a token of each critic.
HEADS = {"value": 1, "twin": 2, "token_reward": 1}
# What credit functions may name: the critics before the update.
BEFORE = {
    "old_values": Output("value"),
    "old_twin_values": Output("twin", per_row=True),
    "twin_values": Output("twin", target=True, per_row=True),
    "token_reward_logits": Output("token_reward"),
}
# What losses may name, on top: the critics being trained.
CURRENT = {
    "values": Output("value"),
    "twin_values": Output("twin", per_row=True),
    "token_reward_logits": Output("token_reward"),
}


@dataclass(frozen=True)
class Critic:
    """How the critics of a step are made.

    Attributes:
      optimizer: of their parameters.
      backbone: "own" starts as a copy of the policy; "shared" reads the policy's hidden states, which then learn from
        the critic's loss too.
      target_rate: how far the slow copy moves towards the critic at each step; None takes the critic itself.
    """

    optimizer: optax.GradientTransformation
    backbone: Backbone = "own"
    target_rate: float | None = None

    def __post_init__(self):
        if self.backbone not in ("own", "shared"):
            raise ValueError(f"critic.backbone is {self.backbone!r}; it must be 'own' or 'shared'")
        if self.target_rate is not None and not 0 < self.target_rate <= 1:
            raise ValueError(
                f"critic.target_rate is {self.target_rate}; it is the share of a step that the slow copy moves and "
                "must lie in (0, 1]; leave it out for no slow copy"
            )


def critics_named(names: Collection[str]) -> tuple[str, ...]:
    """The critics that a collection of data names asks for."""
    asked = {output.critic for table in (BEFORE, CURRENT) for name, output in table.items() if name in names}
    return tuple(sorted(asked))


def initial_critic(model: Model, critic: Critic, key: Array, policy: PyTree, name: str) -> CriticState:
    """A fresh critic: what learns of the policy's parameters with a new head, or the head alone."""
    learns = trainable_part(model, policy)
    params = from_policy(model, learns, key, HeadConfig(outputs=HEADS[name]), backbone=critic.backbone)
    target = None if critic.target_rate is None else jax.tree.map(jnp.copy, params)
    return CriticState(params, critic.optimizer.init(params), target)


def critic_outputs(
    model: Model, params: PyTree, rows: Experience, policy_hidden: Float[Array, "B T D"], frozen: PyTree = None
) -> Float[Array, "B T N"]:
    """Outputs of a critic at every completion token.

    Args:
      model: the policy's architecture, which the backbone has too.
      params: of the critic.
      rows: what to judge.
      policy_hidden: hidden states of the policy, for a critic that shares its backbone.
      frozen: of the policy's parameters, which a critic with a backbone of its own reads too.
    """
    hidden = policy_hidden
    if "backbone" in params:
        hidden = predicting_hidden(
            model,
            whole(model, params["backbone"], frozen),
            rows.prompt_tokens,
            rows.prompt_length,
            rows.tokens,
            rows.length,
        )
    return head_outputs(params["head"], hidden)


def named(
    table: Mapping[str, Output], wanted: Collection[str], outputs: Mapping[tuple[str, bool], Array], rows: Experience
) -> dict[str, Array]:
    """What is wanted of a table, in the shape that its name promises: [B, T], [B] or [B, heads]."""
    result = {}
    for name in sorted(set(table) & set(wanted)):
        output = table[name]
        value = outputs[output.critic, output.target]
        value = at_first(value, rows.mask) if output.per_row else value
        result[name] = value[..., 0] if HEADS[output.critic] == 1 else value
    return result


def moved_target(state: CriticState, critic: Critic) -> CriticState:
    """The slow copy after one step towards the critic."""
    if state.target_params is None or critic.target_rate is None:
        return state
    rate = critic.target_rate
    follow = lambda new, old: (old + rate * (new - old)).astype(old.dtype)  # noqa: E731
    return replace(state, target_params=jax.tree.map(follow, state.params, state.target_params))
