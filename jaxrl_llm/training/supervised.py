"""Supervised fine-tuning: the learner of reinforcement, on demonstrations, with a log-likelihood loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from jaxrl_llm.data import SupervisedBatch
from jaxrl_llm.experience import Experience, KeyUse, TrainState
from jaxrl_llm.losses import Aggregation, negative_log_likelihood
from jaxrl_llm.models.model import Model
from jaxrl_llm.parallel.backend import compiler_options
from jaxrl_llm.parallel.rules import RULES, Rules, constrain_rows, laid_out
from jaxrl_llm.training.learn import LossTerm, Update, make_learn
from jaxrl_llm.training.placement import parameter_shardings, placed_state
from jaxrl_llm.training.trainable import trainable_part


def demonstrations(batch: SupervisedBatch) -> Experience:
    """Reference completions as experience: what the batch marks is trained on, end of sequence included.

    That is every token of a completion, and of a conversation what the policy shall learn to say in it.
    """
    rows, width = batch.tokens.shape
    nothing = jnp.zeros((rows, width), jnp.float32)
    return Experience(
        prompt_tokens=jnp.asarray(batch.prompt_tokens),
        prompt_length=jnp.asarray(batch.prompt_length),
        prompt_id=jnp.asarray(batch.prompt_id),
        answer_tokens=jnp.zeros((rows, 1), jnp.int32),
        answer_length=jnp.zeros(rows, jnp.int32),
        sample=jnp.zeros(rows, jnp.int32),
        group=jnp.arange(rows, dtype=jnp.int32),
        weight=jnp.asarray(batch.weight),
        tokens=jnp.asarray(batch.tokens),
        length=jnp.asarray(batch.length),
        source=jnp.asarray(batch.source),
        mask=jnp.asarray(batch.mask),
        behaviour_logprobs=nothing,
        behaviour_entropy=nothing,
        truncated=jnp.zeros(rows, bool),
        turn=jnp.asarray(batch.turn),
    )


def make_supervised_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    aggregation: Aggregation = "token_mean",
    sequences_per_microbatch: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules = RULES,
) -> tuple[Callable[..., TrainState], Callable]:
    """(init, step) of maximum likelihood on completion tokens; prompts carry no loss.

    Args:
      model: the policy.
      optimizer: an optax transformation.
      aggregation: how token losses become one number.
      sequences_per_microbatch: rows differentiated at once; None takes the whole batch.
      mesh: devices to run on; None leaves placement to jax.
      rules: from the names of axes to those of the mesh.

    Returns:
      init: (key, params or None) -> TrainState; None draws parameters.
      step: (state, experience) -> (state, metrics); the state is donated.
    """
    loss = LossTerm(partial(negative_log_likelihood, aggregation=aggregation), name="negative_log_likelihood")
    update = Update(sequences_per_microbatch=sequences_per_microbatch)
    learn = make_learn(model, optimizer, [loss], update, temperature=1.0, samples_per_prompt=1)

    def init(key: Array, params: PyTree | None = None) -> TrainState:
        if params is None:
            params = model.init(jax.random.fold_in(key, KeyUse.INITIALISE))
        return TrainState(params, optimizer.init(trainable_part(model, params)), None, {}, jnp.copy(key), jnp.int32(0))

    def step(state: TrainState, rows: Experience) -> tuple[TrainState, dict[str, Array]]:
        state, metrics = learn(state, constrain_rows(rows), [jnp.float32(1.0)])
        return state, {name: metrics[name] for name in ("loss", "gradient_norm", "parameter_norm")}

    if mesh is None:
        return jax.jit(init), jax.jit(step, donate_argnums=0)
    placed = placed_state(model, jax.eval_shape(init, jax.random.key(0)), mesh, rules)
    start = jax.jit(laid_out(init, mesh, rules), out_shardings=placed)
    lies = parameter_shardings(model, mesh, rules)
    returned = (placed, NamedSharding(mesh, P()))
    return (
        lambda key, params=None: start(key, None if params is None else jax.device_put(params, lies)),
        jax.jit(
            laid_out(step, mesh, rules),
            donate_argnums=0,
            out_shardings=returned,
            compiler_options=compiler_options(mesh),
        ),
    )
