"""Metrics of a batch of experience. The name of a metric says what it averages over."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrl_llm.experience import Experience, Source, TrainState
from jaxrl_llm.rollout.turns import metrics_of
from jaxrl_llm.training.composition import Composition
from jaxrl_llm.training.row_diagnostics import degenerate_completions, reward_relations
from jaxrl_llm.training.segments import Work


def constant_group_share(
    rewards: Float[Array, "B"], group: Int[Array, "B"], weight: Float[Array, "B"]
) -> Float[Array, ""]:
    """Share of groups whose rewards are all equal; such groups give no gradient to a group-relative method."""
    rows = rewards.shape[0]
    present = weight > 0
    highest = jax.ops.segment_max(jnp.where(present, rewards, -jnp.inf), group, num_segments=rows)
    lowest = jax.ops.segment_min(jnp.where(present, rewards, jnp.inf), group, num_segments=rows)
    exists = jax.ops.segment_sum(present.astype(jnp.float32), group, num_segments=rows) > 0
    constant = exists & (highest <= lowest)
    return constant.sum() / jnp.maximum(exists.sum(), 1)


def explained_variance(
    values: Float[Array, "B T"], returns: Float[Array, "B T"], mask: Float[Array, "B T"]
) -> Float[Array, ""]:
    """1 - var(returns - values) / var(returns) over trained tokens: 1 for a perfect value model, 0 for a constant
    one."""
    count = jnp.maximum(mask.sum(), 1.0)

    def variance(x):
        x = jnp.where(mask > 0, x, 0.0)
        return (mask * jnp.square(x - (mask * x).sum() / count)).sum() / count

    total = variance(returns)
    return jnp.where(total > 0, 1 - variance(returns - values) / jnp.where(total > 0, total, 1.0), 0.0)


def reward_metrics(
    components: Float[Array, "B K"], weight: Float[Array, "B"], names: Sequence[str]
) -> dict[str, Float[Array, ""]]:
    """Mean, standard deviation over rows, and share of applicable rows of each reward function.

    Args:
      components: one column per function; NaN where it does not apply.
      weight: of each row, rows to which no function applies included.
      names: of the functions.
    """
    metrics = {}
    for column, name in enumerate(names):
        applies = jnp.where(jnp.isnan(components[:, column]), 0.0, weight)
        value = jnp.where(applies > 0, components[:, column], 0.0)
        mean, spread = _mean_and_std(value, applies)
        metrics |= {f"reward/{name}": mean, f"reward/{name}_std": spread}
        metrics[f"reward/{name}_applies"] = applies.sum() / jnp.maximum(weight.sum(), 1.0)
    return metrics


def source_metrics(rows: Experience, weight: Float[Array, "B"], names: Sequence[str]) -> dict[str, Float[Array, ""]]:
    """For each source of a mixture: its share of the rows, and means of its rewards, right answers and lengths.

    Args:
      rows: a batch after credit, with `source_id`.
      weight: weight of each row as sampled.
      names: names of the sources, by index.
    """
    metrics, means = {}, {"completion_tokens": written_by_policy(rows).sum(-1)}
    if "rewards" in rows:
        means |= {"reward": rows["rewards"], "correct_share": rows["correct"]}
    for number, name in enumerate(names):
        own = weight * (rows["source_id"] == number)
        metrics[f"source/{name}/share"] = own.sum() / jnp.maximum(weight.sum(), 1.0)
        metrics |= {f"source/{name}/{what}": _mean_and_std(value, own)[0] for what, value in means.items()}
    return metrics


def _mean_and_std(x: Float[Array, "B"], weight: Float[Array, "B"]) -> tuple[Array, Array]:
    count = jnp.maximum(weight.sum(), 1.0)
    mean = (x * weight).sum() / count
    return mean, jnp.sqrt((jnp.square(x - mean) * weight).sum() / count)


def experience_metrics(
    experience: Experience,
    weight: Float[Array, "B"],
    rewards: Sequence[str] = (),
) -> dict[str, Array]:
    """Scalars of one batch: means over the sampled rows, or over their tokens if the name says so.

    Args:
      experience: a batch after credit, which may have set weights to 0.
      weight: weight of each row as sampled, so that rows left out since then are included; `kept_share` is the share
        that was kept. Rows to which no reward applies have weight 0, and count in `kept_share` and in the shares of
        rows to which each reward applies.
      rewards: names of the reward functions, one per column.
    """
    drawn = jnp.where(experience["unrated"] > 0, 1.0, weight) if "unrated" in experience else weight
    rows = jnp.maximum(weight.sum(), 1.0)
    mask = experience.mask * weight[:, None]
    tokens = jnp.maximum(mask.sum(), 1.0)
    mean = lambda x: (x * weight).sum() / rows  # noqa: E731
    token_mean = lambda x: (x * mask).sum() / tokens  # noqa: E731
    metrics = {}
    if "rewards" in experience:
        metrics |= {
            "reward": mean(experience["rewards"]),
            "reward_std": _mean_and_std(experience["rewards"], weight)[1],
            "correct_share": mean(experience["correct"]),
            "constant_group_share": constant_group_share(experience["rewards"], experience.group, weight),
        }
    metrics |= {
        "completion_tokens": mean(written_by_policy(experience).sum(-1)),
        "truncated_share": mean(experience.truncated.astype(jnp.float32)),
        "kept_share": jnp.where(experience.weight > 0, weight, 0.0).sum() / jnp.maximum(drawn.sum(), 1.0),
        "entropy_per_token": token_mean(experience.behaviour_entropy),
    }
    if rewards and "reward_components" in experience:
        metrics |= reward_metrics(experience["reward_components"], drawn, rewards)
    if "reference_logprobs" in experience:
        metrics["kl_reference_per_token"] = token_mean(experience.behaviour_logprobs - experience["reference_logprobs"])
    told = [jnp.shape(experience[name]) for name in ("old_values", "returns") if name in experience]
    if len(told) == 2 and told[0] == told[1]:  # not defined for a head with several outputs
        metrics["value_explained_variance"] = explained_variance(experience["old_values"], experience["returns"], mask)
    if "advantages" in experience:
        metrics["advantage_abs_per_token"] = token_mean(jnp.abs(experience["advantages"]))
    for name, (total, count) in metrics_of(experience, weight).items():
        metrics[f"episode/{name}"] = total / jnp.maximum(count, 1.0)
    return metrics


def written_by_policy(rows: Experience) -> Float[Array, "B T"]:
    """1 on completion tokens except observations of environments and tools."""
    return ((rows.source != Source.PAD) & (rows.source != Source.OBSERVATION)).astype(jnp.float32)


def step_metrics(c: Composition, state: TrainState, rows: Experience, work: Work) -> dict[str, Array]:
    """Scalars of a step before its update; empty for a step with only written rows."""
    if c.rollout is None:
        return {}
    metrics = experience_metrics(rows, work["sampled"], [t.name for t in c.rewards]) | work["report"]
    if c.resources.diagnostics:
        metrics |= row_diagnostics(rows, work["sampled"], [t.name for t in c.rewards], c.resources.scripts)
    if c.resources.sources and "source_id" in rows:
        metrics |= source_metrics(rows, work["sampled"], c.resources.sources)
    if c.rollout.engine is not None:
        metrics |= engine_metrics(rows)
    if c.rollout.off_policy_steps:
        metrics["staleness_steps"] = jnp.minimum(state.step, c.rollout.off_policy_steps).astype(jnp.float32)
    if "unrated" in rows:
        metrics["unrated_share"] = rows["unrated"].mean()
    held = state.memory.get("rollout:plan")
    if isinstance(held, dict) and "temperature" in held:
        metrics["extra_temperature"] = held["temperature"]
    return metrics


def row_diagnostics(
    rows: Experience, weight: Float[Array, "B"], rewards: Sequence[str], scripts: Int[np.ndarray, "V"] | None = None
) -> dict[str, Array]:
    """`degenerate_completions`, and `reward_relations` with each other, the length and the distance from the reference.

    Args:
      rows: a batch after credit.
      weight: weight of each row as sampled.
      rewards: names of the reward functions.
      scripts: script of each token of the vocabulary, see `degenerate_completions`.
    """
    found = degenerate_completions(rows, weight, scripts)
    if not rewards or "reward_components" not in rows:
        return found
    others = {"length": written_by_policy(rows).sum(-1)}
    if "reference_logprobs" in rows:
        gone = rows.behaviour_logprobs - rows["reference_logprobs"]
        others["kl"] = jnp.where(rows.mask > 0, gone, 0.0).sum(-1)
    total = rows.get("rewards")
    return found | reward_relations(rows["reward_components"], others, rows.group, weight, rewards, total)


def engine_metrics(rows: Experience) -> dict[str, Array]:
    """Difference of engine and policy: |old - behaviour| log-probabilities over trained tokens, and staleness in
    steps."""
    counted = rows.mask > 0
    gap = jnp.where(counted, jnp.abs(rows["old_logprobs"] - rows.behaviour_logprobs), 0.0)
    return {
        "engine_gap_max": gap.max(),
        "engine_gap_mean": gap.sum() / jnp.maximum(counted.sum(), 1),
        "staleness_steps": rows["staleness"].mean(),
    }


def drift_of(logprobs: Array, rows: Experience) -> tuple[dict[str, Array], dict[str, tuple[Array, Array]]]:
    """Difference of the policy from the sampling policy: maxima, and (sum, count) pairs over sampled tokens."""
    counted = rows.mask * (rows.weight[:, None] > 0) * (rows.source == Source.SAMPLED)
    if "extra" in rows:  # sampled at another temperature
        counted = counted * ~rows["extra"].astype(bool)[:, None]
    gap = jnp.where(counted > 0, jax.lax.stop_gradient(logprobs) - rows.behaviour_logprobs, 0.0)
    clipped = jnp.clip(gap, -20.0, 20.0)
    count = counted.sum()
    peaks = {"gap": jnp.abs(gap).max(), "ratio": jnp.exp(clipped).max()}
    return peaks, {"gap": (jnp.abs(gap).sum(), count), "kl": ((jnp.exp(clipped) - 1.0 - clipped).sum(), count)}


def learn_metrics(sums, peaks, drift) -> dict[str, Array]:
    """Average each logged pair over updates. The sampler gap is that of the first update, before parameters change."""
    metrics = {}
    for name, (total, count) in sums.items():
        # Pairs without a count are already divided; they are averaged over updates.
        per_update = jnp.where(count == 0, total, total / jnp.where(count == 0, 1.0, count))
        metrics[name] = per_update.mean()
    if not drift:
        return metrics
    safe = lambda pair, i: pair[0][i] / jnp.maximum(pair[1][i], 1.0)  # noqa: E731
    metrics["sampler_gap_max"] = peaks["gap"][0]
    metrics["sampler_gap_mean"] = safe(drift["gap"], 0)
    metrics["ratio_max"] = peaks["ratio"].max()
    metrics["kl_update"] = safe(drift["kl"], -1)
    return metrics
