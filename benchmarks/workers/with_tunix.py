"""Tunix's sampler and its GRPOLearner as workers of the benchmarks, in their fastest settings on a CPU."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from laps import job, laps
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3.params import create_model_from_safe_tensors
from tunix.rl.rollout.base_rollout import CacheConfig, RolloutConfig
from tunix.rl.rollout.vanilla_rollout import VanillaRollout

what, workload, directory = job()
if workload["dtype"] != "float32":
    raise SystemExit(f"this worker computes in float32 on a CPU, not in {workload['dtype']}; omit Tunix")
lap = laps()
mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
config = qwen3.ModelConfig(
    num_layers=workload["layers"],
    vocab_size=workload["vocabulary"],
    embed_dim=workload["width"],
    hidden_dim=workload["mlp_width"],
    num_heads=workload["heads"],
    head_dim=workload["head_width"],
    num_kv_heads=workload["kv_heads"],
    rope_theta=1_000_000,
    norm_eps=1e-6,
    use_tied_embedding=True,
)
versions = {"tunix": importlib.metadata.version("google-tunix"), "jax": jax.__version__}
prompts = [" ".join(map(str, prompt)) for prompt in workload["prompt_tokens"]]
prompt_tokens = len(workload["prompt_tokens"][0])
# Rows that are generated and differentiated together. Fewer than all are faster, since they fit the CPU's caches.
PROMPTS_AT_A_TIME = workload.get("tunix_prompts", 2)


class Symbols:
    """A tokenizer whose texts are numbers. The ids of end of sequence and padding are never sampled."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # none

    def eos_id(self) -> int:
        return workload["vocabulary"]

    def pad_id(self) -> int:
        return workload["vocabulary"] + 1


def loaded() -> qwen3.Qwen3:
    """The model with the shared weights."""
    with mesh:
        return create_model_from_safe_tensors(str(directory), config, mesh, jnp.float32)


def prompt_logprob(model: qwen3.Qwen3) -> float:
    """Mean log-probability of the prompts, by which the weights of the workers are compared."""
    tokens = jnp.asarray(workload["prompt_tokens"])
    rows, length = tokens.shape
    positions = jnp.tile(jnp.arange(length), (rows, 1))
    mask = jnp.tile(jnp.tril(jnp.ones((length, length), bool)), (rows, 1, 1))
    logprobs = jax.nn.log_softmax(model(tokens, positions, None, mask)[0][:, :-1])
    return float(jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1).mean())


def rollout_config(completion_tokens: int) -> RolloutConfig:
    """Plain sampling in a cache that is exactly large enough."""
    return RolloutConfig(
        max_tokens_to_generate=completion_tokens,
        max_prompt_length=prompt_tokens,
        kv_cache_size=prompt_tokens + completion_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=None,
    )


def rollout() -> None:
    """One lap: all completions of all prompts, at full length."""
    model = loaded()
    cache = CacheConfig(
        cache_size=prompt_tokens + workload["completion_tokens"],
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    with mesh:
        sampler = VanillaRollout(model, Symbols(), cache)
        rows = [prompt for prompt in prompts for _ in range(workload["samples"])]
        size = PROMPTS_AT_A_TIME * workload["samples"]
        request = lap(versions=versions, prompt_logprob=prompt_logprob(model))
        while True:
            settings = rollout_config(request["completion_tokens"])
            parts = [sampler.generate(rows[i : i + size], settings) for i in range(0, len(rows), size)]
            request = lap(tokens=sum(len(tokens) for part in parts for tokens in part.tokens))


def step() -> None:
    """One lap: one step of GRPO, from the rollout to the update."""
    import optax
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role

    actor, reference = loaded(), loaded()
    half = workload["vocabulary"] / 2
    drawn: list[int] = []

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        ids = [[int(word) for word in text.split()] for text in completions]
        drawn.extend(map(len, ids))
        return [sum(token < half for token in row) / len(row) for row in ids]

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(workload["learning_rate"], weight_decay=0.0))
    cluster = RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=Symbols(),
        cluster_config=ClusterConfig(
            role_to_mesh={Role.ACTOR: mesh, Role.REFERENCE: mesh, Role.ROLLOUT: mesh},
            rollout_engine="vanilla",
            training_config=RLTrainingConfig(
                actor_optimizer=optimizer,
                eval_every_n_steps=10**6,
                max_steps=10**6,
                mini_batch_size=len(prompts),
                train_micro_batch_size=PROMPTS_AT_A_TIME,
                rollout_micro_batch_size=PROMPTS_AT_A_TIME,
                compute_logps_micro_batch_size=PROMPTS_AT_A_TIME,
                pbar_description=None,
            ),
            rollout_config=rollout_config(workload["completion_tokens"]),
        ),
    )
    learner = GRPOLearner(
        rl_cluster=cluster,
        algo_config=GRPOConfig(
            num_generations=workload["samples"], num_iterations=1, beta=workload["kl"], epsilon=workload["clip"]
        ),
        reward_fns=reward,
    )

    def batches() -> Iterator[dict[str, Any]]:
        # The learner requests the next batch after each step.
        lap(versions=versions, prompt_logprob=prompt_logprob(actor))
        while True:
            yield {"prompts": np.array(prompts)}
            jax.block_until_ready(nnx.state(cluster.actor_trainer.model, nnx.Param))
            lap(tokens=sum(drawn), updates=cluster.actor_trainer.train_steps)
            drawn.clear()

    with mesh:
        learner.train(batches())


{"rollout": rollout, "step": step}[what]()
