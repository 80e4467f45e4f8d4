"""Selection of prompts by their pass rates: filters, learnability, and the variance over visits."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.experience import Selection
from jaxrl_llm.ranges import Count, Natural, Share, ranged
from jaxrl_llm.selection.knapsack import mixed_probability
from jaxrl_llm.selection.pools import (
    Records,
    column,
    items_by_turns,
    items_by_weight,
    means_of,
    record_ids,
    visited,
    wanted_items,
)

Rule = Literal["variance", "deviation", "mixed", "band"]


@ranged
def informativeness(
    success: Float[Array, "*N"],
    *,
    rule: Rule = "variance",
    low: float | None = None,
    high: float | None = None,
    samples_per_prompt: Count = 8,
) -> Float[Array, "*N"]:
    """Value of prompts for training, by their pass rates.

        variance    p (1 - p)                   learnability
        deviation   2 sqrt(p (1 - p))           expected absolute advantage, normalised by the deviation
        mixed       1 - p^G - (1 - p)^G         probability that a group has right and wrong samples
        band        1[low < p < high]           a filter; both ends are excluded

    `band` is RIF-RFT with low 0 (solved at least once), AceReason's late stage with high 1 (failed at least once),
    Guru's filter with 0.1 and 0.9, Light-R1's with 0.2 and 0.625. An unknown rate (NaN) has the largest value of the
    rule.

    Args:
      success: p, pass rate of each prompt.
      rule: as above.
      low: lower end of the band; None for no bound.
      high: upper end of the band; None for no bound.
      samples_per_prompt: G of the rule `mixed`.

    Returns:
      A number of at least 0 for each rate.

    Raises:
      ValueError: for an unknown rule, or an empty band.

    Reference: RIF-RFT (2507.05386); Guru (2506.14965); Light-R1 (2503.10460); AceReason-Nemotron 1.1 (2506.13284).
    Certainty: verified
    """
    if rule not in get_args(Rule):
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(get_args(Rule))}")
    lowest, highest = -np.inf if low is None else low, np.inf if high is None else high
    if lowest >= highest:
        raise ValueError(f"low is {low} and high is {high}; low must be below high")
    known = ~jnp.isnan(success)
    p = jnp.where(known, success, 0.5).astype(jnp.float32)
    values = {
        "variance": lambda: p * (1.0 - p),
        "deviation": lambda: 2.0 * jnp.sqrt(p * (1.0 - p)),
        "mixed": lambda: mixed_probability(jnp.float32(samples_per_prompt), p),
        "band": lambda: (((p > lowest) & (p < highest)) | ~known).astype(jnp.float32),
    }
    return values[rule]()


@ranged
def kept_by_two_maps(
    strong: Float[Array, "*N"], weak: Float[Array, "*N"], *, low: float = 0.1, high: float = 0.9
) -> Bool[Array, "*N"]:
    """Prompts that are not impossible for a strong model and not trivial for a weak one: strong > low and weak < high.

    Args:
      strong: pass rate of the strong model; an unknown rate (NaN) keeps the prompt.
      weak: pass rate of the weak model; NaN as for `strong`.
      low: pass rate of the strong model up to which a prompt is impossible.
      high: pass rate of the weak model from which a prompt is trivial.

    Returns:
      True for prompts to keep.

    Reference: Guru (2506.14965).
    Certainty: verified
    """
    return ~(strong <= low) & ~(weak >= high)


class Rates(NamedTuple):
    """State of `by_pass_rate`: the pass rate of each item (NaN if unknown) and its visits."""

    success: Float[Array, "I"]
    visits: Int[Array, "I"]


@ranged
def by_pass_rate(
    *,
    records: Records,
    rule: Rule = "variance",
    low: float | None = None,
    high: float | None = None,
    rate: Share = 1.0,
    pass_rate: str | None = None,
    samples_per_prompt: Count | None = None,
) -> Selection:
    """Prompts by the `informativeness` of their pass rates, which are updated by rollouts.

        p_i <- (1 - rate) p_i + rate mean(correct of the item's rows)    (the first mean as it is)

    `band` takes the prompts inside the band in rotation, so that an epoch covers all of them; other rules draw with
    replacement, P_i = informativeness(p_i) / sum_j informativeness(p_j). Prompts without a rate count as the most
    informative. If all values are 0, the draw is uniform and the metric `wanted_share` is 0.

    A prompt outside the band is never drawn again. With `pass_rate` and rate 0 the rates of the data stay fixed.

    Args:
      records: records of the data, one per item; filled from the run.
      rule, low, high: as in `informativeness`.
      rate: step size of the pass rates; 1 takes the rate of the last visit.
      pass_rate: column of the records with pass rates of another run or model; null for an unknown rate.
      samples_per_prompt: G of the rule `mixed`; filled from the run.

    Returns:
      A `Selection`.

    Raises:
      ValueError: as for `informativeness`; for a column that a record lacks, a pass rate outside [0, 1], or a rate of 0
      without `pass_rate`.

    Reference: RIF-RFT (2507.05386); Guru (2506.14965); Light-R1 (2503.10460); AceReason-Nemotron 1.1 (2506.13284).
    Certainty: reconstructed
    """
    ids = record_ids(records)
    start = np.full(len(records), np.nan, np.float32)
    if pass_rate is not None:
        found = column(records, pass_rate, f"pass_rate is {pass_rate}")
        start = np.array([np.nan if value is None else float(value) for value in found], np.float32)
        if (wrong := np.flatnonzero((start < 0) | (start > 1))).size:
            raise ValueError(f"{pass_rate} of record {wrong[0]} is {found[wrong[0]]}; it must lie in [0, 1]")
    elif rate == 0:
        raise ValueError("rate is 0 and pass_rate is missing, so pass rates stay unknown; name a column in pass_rate")

    def worth(memory: Rates) -> Float[Array, "I"]:
        samples = samples_per_prompt or 8
        return informativeness(memory.success, rule=rule, low=low, high=high, samples_per_prompt=samples)

    def init() -> Rates:
        return Rates(jnp.asarray(start), jnp.zeros(len(ids), jnp.int32))

    worth(init())  # raises for invalid hyper-parameters

    def choose(memory: Rates, key: Array, count: int) -> Int[Array, "N"]:
        if rule == "band":
            return wanted_items(worth(memory) > 0, memory.visits, key, count, ids)
        return items_by_weight(worth(memory), key, count, ids)

    def update(memory: Rates, item: Int[Array, "B"], correct: Float[Array, "B"], weight: Float[Array, "B"]) -> Rates:
        mean, met = means_of(correct, item, weight, len(ids))
        known = ~jnp.isnan(memory.success)
        moved = jnp.where(known, (1.0 - rate) * jnp.where(known, memory.success, 0.0) + rate * mean, mean)
        moved = moved if rate > 0 else jnp.where(known, memory.success, jnp.nan)
        return Rates(jnp.where(met, moved, memory.success), visited(memory.visits, item, weight))

    def report(memory: Rates) -> dict[str, Array]:
        known = ~jnp.isnan(memory.success)
        mean = jnp.where(known, memory.success, 0.0).sum() / jnp.maximum(known.sum(), 1)
        return {"wanted_share": (worth(memory) > 0).mean(), "known_share": known.mean(), "pass_rate": mean}

    return Selection(init, choose, update, report)


class History(NamedTuple):
    """State of `most_variable`: visits of each item, running mean and sum of squares of its pass rate, and steps."""

    visits: Int[Array, "I"]
    mean: Float[Array, "I"]
    squares: Float[Array, "I"]
    steps: Int[Array, ""]


@ranged
def most_variable(*, records: Records, explore_steps: Natural, prompts: Count = 1, first: Natural = 0) -> Selection:
    """All prompts at first, then only those whose pass rate varied most over their visits: one-shot RLVR.

        score_i = sqrt(sum_v (a_vi - mean_v a_vi)^2 / V)    the deviation of the pass rate over V visits

    The chosen prompts fill the batch in equal parts. The paper chooses in a separate run and restarts from the base
    policy; here training continues. With `explore_steps` 0 the prompts are those from number `first` on.

    Args:
      records: records of the data, one per item; filled from the run.
      explore_steps: steps on all prompts, in rotation; a score needs at least two visits of the prompt.
      prompts: number of prompts to choose.
      first: number of the first prompt if `explore_steps` is 0.

    Returns:
      A `Selection`.

    Raises:
      ValueError: for more prompts than the data has.

    Reference: One-shot RLVR (2504.20571).
    Certainty: verified
    """
    ids = record_ids(records)
    if first + prompts > len(ids):
        raise ValueError(
            f"first + prompts is {first + prompts}, but the data has {len(ids)} prompts; lower one of the two"
        )

    def ranked(memory: History) -> Int[Array, "I"]:
        return jnp.lexsort((jnp.asarray(ids), -memory.squares / jnp.maximum(memory.visits, 1)))

    def init() -> History:
        zero = jnp.zeros(len(ids), jnp.float32)
        return History(jnp.zeros(len(ids), jnp.int32), zero, zero, jnp.int32(1))

    def choose(memory: History, key: Array, count: int) -> Int[Array, "N"]:
        every = items_by_turns(jnp.zeros(count, jnp.int32), np.zeros(len(ids), np.int32), memory.visits, key, ids, 1)
        best = ranked(memory)[:prompts] if explore_steps else first + jnp.arange(prompts)
        # After n updates, this chooses the prompts of step n + 1.
        few = best[jnp.arange(count) % prompts].astype(jnp.int32)
        return jnp.where(memory.steps < explore_steps, every, few)

    def update(
        memory: History, item: Int[Array, "B"], correct: Float[Array, "B"], weight: Float[Array, "B"]
    ) -> History:
        mean, met = means_of(correct, item, weight, len(ids))
        met = met & (memory.steps < explore_steps)  # the scores are then final
        visits = memory.visits + met
        step = mean - memory.mean
        moved = memory.mean + step / jnp.maximum(visits, 1)
        squares = jnp.where(met, memory.squares + step * (mean - moved), memory.squares)
        return History(visits, jnp.where(met, moved, memory.mean), squares, memory.steps + 1)

    def report(memory: History) -> dict[str, Array]:
        best = ranked(memory)[0]
        score = jnp.sqrt(memory.squares[best] / jnp.maximum(memory.visits[best], 1))
        return {"exploring": memory.steps <= explore_steps, "best_item": best, "best_score": score}

    return Selection(init, choose, update, report)
