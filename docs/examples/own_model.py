"""Train a network of one's own: a Flax Linen module, warmed up on solutions, then reinforced with GRPO.

    python docs/examples/own_model.py

A policy is any module with `__call__`, `logits` and `init_cache` (`from_linen` has the protocol, docs/models.md the
story). This one is a small attention network with learned positions; it learns what six functions with meaningless
names do to a word.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from jaxrl_llm import advantages, data, losses, models, rewards
from jaxrl_llm.evaluation import make_evaluate, task_grader
from jaxrl_llm.rows import Written, demonstrations
from jaxrl_llm.training import Rollout, make_train_step

MAX_PROMPT, MAX_COMPLETION = 13, 9


class Cache(NamedTuple):
    """What was said so far: keys and values of every block, [layers, rows, slots, heads, head width]."""

    keys: Any
    values: Any
    positions: Any  # of the token in each slot, -1 where there is none
    used: Any  # slots written so far


class Block(nn.Module):
    """Attention and an MLP."""

    width: int
    heads: int

    def setup(self):
        self.norms = [nn.LayerNorm(), nn.LayerNorm()]
        self.qkv = nn.DenseGeneral((3, self.heads, self.width // self.heads))
        self.out = nn.DenseGeneral(self.width, axis=(-2, -1))
        self.up, self.down = nn.Dense(4 * self.width), nn.Dense(self.width)

    def __call__(self, x, positions, seen, stored, used):
        queries, keys, values = jnp.moveaxis(self.qkv(self.norms[0](x)), -3, 0)
        if stored is not None:
            write = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, used, 0, 0))  # noqa: E731
            keys, values = write(stored[0], keys), write(stored[1], values)
        scores = jnp.einsum("bthe,bshe->bhts", queries, keys) * queries.shape[-1] ** -0.5
        # A token sees its row up to itself. Where a slot is empty or padding, its position is -1.
        visible = (seen[:, None] <= positions[:, :, None]) & (seen[:, None] >= 0)
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -1e30))
        x = x + self.out(jnp.einsum("bhts,bshe->bthe", weights, values))
        return x + self.down(nn.gelu(self.up(self.norms[1](x)))), (keys, values)


class Network(nn.Module):
    """The policy."""

    vocabulary_size: int
    width: int = 64
    layers: int = 2
    heads: int = 4
    max_positions: int = MAX_PROMPT + MAX_COMPLETION

    def setup(self):
        self.embed = nn.Embed(self.vocabulary_size, self.width)
        self.place = nn.Embed(self.max_positions, self.width)
        self.blocks = [Block(self.width, self.heads) for _ in range(self.layers)]
        self.norm = nn.LayerNorm()
        self.scores = nn.Dense(self.vocabulary_size)

    def __call__(self, tokens, positions, cache):
        x = self.embed(tokens) + self.place(jnp.maximum(positions, 0))
        seen, used = positions, 0
        if cache is not None:
            used = cache.used
            seen = jax.lax.dynamic_update_slice(cache.positions, positions, (0, used))
        filled = []
        for index, block in enumerate(self.blocks):
            stored = None if cache is None else (cache.keys[index], cache.values[index])
            x, pair = block(x, positions, seen, stored, used)
            filled.append(pair)
        if cache is not None:
            keys, values = (jnp.stack(part) for part in zip(*filled, strict=True))
            cache = Cache(keys, values, seen, used + tokens.shape[1])
        return self.norm(x), cache

    def logits(self, hidden):
        return self.scores(hidden).astype(jnp.float32)

    def init_cache(self, rows, slots):
        empty = jnp.zeros((self.layers, rows, slots, self.heads, self.width // self.heads))
        return Cache(empty, empty, jnp.full((rows, slots), -1), jnp.int32(0))


def main(warm_up_steps: int = 200, steps: int = 50, problems: int = 64) -> tuple[dict, dict]:
    """Train, print, and return the accuracies on held-out problems before and after reinforcement."""
    task, tokenizer = data.tasks.task("composition", functions="KMNQTV", scratchpad=False), data.CharacterTokenizer()
    train = task.generate(level=1, count=4000)
    held_out = [asdict(item) for item in task.generate(level=1, count=problems, split="test")]
    model = models.from_linen(Network(tokenizer.vocabulary_size), vocabulary_size=tokenizer.vocabulary_size)
    largest = max(models.check_model(model).values())
    print(f"{models.parameter_count(model.specs):,} parameters; largest error of a law {largest:.1e}")

    sizes = dict(max_prompt_tokens=MAX_PROMPT, max_completion_tokens=MAX_COMPLETION)
    evaluate = make_evaluate(model, task_grader(task), tokenizer, samples_per_problem=8, k=(1, 8), **sizes)
    batches = data.supervised_batches(train, tokenizer, sequences_per_step=64, seed=0, scratchpad=False, **sizes)
    supervised_step = make_train_step(
        model, optax.adam(2e-3), source=Written(64), losses=[losses.negative_log_likelihood]
    )
    state = supervised_step.init(jax.random.key(0))
    for index in range(warm_up_steps):
        state, metrics = supervised_step(state, written=demonstrations(batches[index]))
    print(f"warm-up: {warm_up_steps} steps, loss {float(metrics['loss']):.3f}")
    params = state.params
    before = evaluate(params, held_out, jax.random.key(1))

    step = make_train_step(
        model,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(5e-4)),
        source=Rollout(
            samples_per_prompt=8,
            max_completion_tokens=MAX_COMPLETION,
            eos_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
        ),
        rewards=[rewards.exact_answer],
        credit=[("advantages", advantages.group_normalized)],
        losses=[losses.clipped_surrogate],
    )
    prompts = data.prompt_batches(
        train,
        tokenizer,
        prompts_per_step=24,
        max_prompt_tokens=MAX_PROMPT,
        max_answer_tokens=MAX_COMPLETION,
        seed=0,
    )
    state = step.init(jax.random.key(0), params)
    for index in range(steps):
        state, metrics = step(state, prompts[index].prompts)
        if index % 10 == 0 or index == steps - 1:
            print(f"step {index}: reward {float(metrics['reward']):.3f}")
    after = evaluate(state.params, held_out, jax.random.key(1))
    for name in ("greedy", "pass@1"):
        print(f"{name}: {before[name]:.1%} -> {after[name]:.1%}")
    return before, after


if __name__ == "__main__":
    main()
