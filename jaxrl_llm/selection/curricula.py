"""Curricula from easy to hard prompts: in stages with replay, or up to a growing difficulty."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.experience import Selection
from jaxrl_llm.ranges import Count, NonNegative, OpenShare, Positive, Share, ShareBelowOne, ranged
from jaxrl_llm.selection.pools import (
    Records,
    column,
    items_by_turns,
    items_by_weight,
    means_of,
    pool,
    record_ids,
    visited,
)

Advance = Literal["steps", "success", "plateau", "epochs"]
Pace = Literal["competence", "gaussian"]


class Stages(NamedTuple):
    """State of `easy_to_hard`.

    Attributes:
      stage: current stage.
      steps: steps in the current stage (one more in the first stage, whose first two choices are made together).
      scores: mean score of the stage's rows in each of its last steps, the newest last; NaN for missing ones.
      visits: steps in which each item was trained on.
    """

    stage: Int[Array, ""]
    steps: Int[Array, ""]
    scores: Float[Array, "W"]
    visits: Int[Array, "I"]


@ranged
def has_plateaued(
    scores: Float[Array, "W"], *, window: Count = 20, tolerance: float = 0.01, chance: float = 0.0
) -> Bool[Array, ""]:
    """Whether the mean of the last `window` scores is above chance, and less than `tolerance` above the window before.

    False while there are fewer than 2 * window scores.

    Args:
      scores: mean score of each step, the newest last; NaN for missing ones.
      window: steps per mean.
      tolerance: smallest difference of the means that counts as a gain.
      chance: score of a random policy; constant scores at or below it are not a plateau.

    Returns:
      A boolean scalar.

    Reference: MedCCO (2505.19213).
    Certainty: reconstructed
    """
    if len(scores) < 2 * window:
        return jnp.bool_(False)
    last, before = scores[-window:].mean(), scores[-2 * window : len(scores) - window].mean()
    return (last - before < tolerance) & (last > chance)  # False where one is NaN


@ranged
def stage_slots(
    stage: Int[Array, ""], turn: Int[Array, ""], key: Array, *, count: Count, replay: Share, power: NonNegative = 0.0
) -> Int[Array, "N"]:
    """Stage of each slot of a step: floor(replay * count) slots of earlier stages, the others of the current stage.

        power 0    evenly, the remainder to the earliest stages; with fewer slots than stages, in rotation over steps
        power > 0  stage j with probability P_j ~ (stage - j)^-power

    Args:
      stage: current stage, from 0; stage 0 replays nothing.
      turn: number of the step, for the rotation.
      key: random key of the power law.
      count: slots per step.
      replay: share of the slots for earlier stages.
      power: exponent of the power law.

    Returns:
      A stage per slot.

    Reference: CRAFT-GUI (2508.11360).
    Certainty: reconstructed
    """
    replayed = int(np.floor(count * replay + 1e-9))
    slot, earlier = jnp.arange(count), jnp.maximum(stage, 1)
    if power > 0:
        # age = stage - j, at least 1
        age = jnp.arange(1, _MOST_STAGES + 1)
        law = jnp.where(age <= earlier, age.astype(jnp.float32) ** -power, 0.0)
        drawn = jax.random.categorical(key, jnp.log(law), shape=(count,))
        old = earlier - 1 - drawn
    else:
        shift = jnp.where(replayed < earlier, turn * replayed, 0)
        old = (slot + shift) % earlier
    return jnp.where((slot < replayed) & (stage > 0), old, stage)


# Most stages that a power law can replay.
_MOST_STAGES = 256


@ranged
def easy_to_hard(
    *,
    records: Records,
    level: str = "level",
    cuts: tuple[float, ...] = (),
    descending: bool = False,
    advance: Advance = "steps",
    steps_per_stage: Count = 50,
    score: Literal["correct", "rewards"] = "correct",
    threshold: float = 0.7,
    window: Count = 20,
    tolerance: float = 0.01,
    chance: float = 0.0,
    replay: ShareBelowOne = 0.2,
    replay_power: NonNegative = 0.0,
) -> Selection:
    """Prompts of one level after another, with replay of earlier levels.

        steps     advance after `steps_per_stage` steps
        success   advance when the mean score of the last `window` steps exceeds `threshold`
        plateau   advance when that mean is less than `tolerance` above the `window` before, and above `chance`
        epochs    advance when each prompt of the level has been trained on once

    The last level lasts until the end of the run. Scores are means over the rows of the current level. floor(replay N)
    prompts of a step are of earlier levels (`stage_slots`); within a level items are taken in rotation. Levels may be
    those of a task (qweb: distance to the goal; Mobile-R1, CRAFT-GUI: steps of a solution), answer formats (Curr-ReFT,
    MedCCO), or pass rates from high to low (SARI: `descending`, `epochs`, no replay).

    Args:
      records: records of the data, one per item; filled from the run.
      level: column of the records with the levels, which are sorted in ascending order.
      cuts: bounds of the stages; if given, the stage of a value is the number of cuts below it.
      descending: order from the largest value to the smallest.
      advance: rule of advancing, as above.
      steps_per_stage: steps of a stage under the rule `steps`.
      score: field that `success` and `plateau` average.
      threshold: bound of the rule `success`.
      window: steps per mean in `success` and `plateau`.
      tolerance: as in `has_plateaued`.
      chance: as in `has_plateaued`.
      replay: share of prompts from earlier levels.
      replay_power: exponent of the decay of replay with the age of a level; 0 replays all evenly.

    Returns:
      A `Selection`.

    Raises:
      ValueError: for an unknown rule, a column that records do not have, a single level, or a number out of range.

    Reference: CRAFT-GUI (2508.11360); Curr-ReFT (2503.07065); SARI (2504.15900); MedCCO (2505.19213); Mobile-R1
    (2506.20332); qweb (1812.09195).
    Certainty: reconstructed
    """
    if advance not in get_args(Advance):
        raise ValueError(f"advance is {advance!r}; it must be one of {', '.join(get_args(Advance))}")
    if cuts:
        numbers = column(records, level, f"level is {level}")
        of_record = np.searchsorted(np.sort(np.asarray(cuts, np.float64)), np.asarray(numbers, np.float64), side="left")
        records_of = [{level: int(stage), "of": record} for stage, record in zip(of_record, records, strict=True)]
    else:
        records_of = records
    made = pool(records_of, level, name="level")
    stages, ids = len(made.kinds), record_ids(records)
    of_item = (stages - 1 - made.of_item if descending else made.of_item).astype(np.int32)
    if replay_power > 0 and stages > _MOST_STAGES:
        raise ValueError(f"level has {stages} values; replay_power allows at most {_MOST_STAGES}, so give cuts")

    def init() -> Stages:
        none = jnp.full(2 * window, jnp.nan, jnp.float32)
        return Stages(jnp.int32(0), jnp.int32(1), none, jnp.zeros(len(ids), jnp.int32))

    def choose(memory: Stages, key: Array, count: int) -> Int[Array, "N"]:
        of_slots, of_order = jax.random.split(key)
        slots = stage_slots(memory.stage, memory.steps, of_slots, count=count, replay=replay, power=replay_power)
        return items_by_turns(slots, of_item, memory.visits, of_order, ids, stages)

    def update(
        memory: Stages,
        item: Int[Array, "B"],
        correct: Float[Array, "B"],
        rewards: Float[Array, "B"],
        weight: Float[Array, "B"],
    ) -> Stages:
        there = (weight > 0) & (jnp.asarray(of_item)[item] == memory.stage)
        values = correct if score == "correct" else rewards
        mean, met = means_of(values, jnp.zeros_like(item), there, 1)
        scores = jnp.where(met[0], jnp.append(memory.scores[1:], mean[0]), memory.scores)
        visits, steps = visited(memory.visits, item, weight), memory.steps + 1
        rules = {
            "steps": lambda: steps >= steps_per_stage,
            "success": lambda: scores[-window:].mean() > threshold,
            "plateau": lambda: has_plateaued(scores, window=window, tolerance=tolerance, chance=chance),
            "epochs": lambda: jnp.all((visits > 0) | (jnp.asarray(of_item) != memory.stage)),
        }
        on = rules[advance]() & (memory.stage < stages - 1)
        stage = memory.stage + on
        return Stages(stage, jnp.where(on, 0, steps), jnp.where(on, jnp.nan, scores), visits)

    def report(memory: Stages) -> dict[str, Array]:
        return {"stage": memory.stage, "stage_steps": memory.steps}

    return Selection(init, choose, update, report)


class Pacing(NamedTuple):
    """State of `growing_difficulty`: steps chosen for, the centre of the Gaussian, and visits of each item."""

    steps: Int[Array, ""]
    aim: Float[Array, ""]
    visits: Int[Array, "I"]


@ranged
def competence(step: Int[Array, ""], *, total_steps: Count, first: OpenShare = 0.01, power: Positive = 2.0) -> Array:
    """Competence at a step: min(1, ((1 - first^power) step / total_steps + first^power)^(1 / power)).

    Args:
      step: number of the step, from 0.
      total_steps: steps until the competence is 1.
      first: competence at step 0.
      power: 1 is linear; a larger power rises faster at the start.

    Returns:
      A difficulty in (0, 1].

    Reference: competence-based curriculum learning.
    Certainty: recalled
    """
    share = jnp.asarray(step, jnp.float32) / total_steps
    return jnp.minimum(1.0, ((1.0 - first**power) * share + first**power) ** (1.0 / power))


@ranged
def growing_difficulty(
    *,
    records: Records,
    difficulty: str = "level",
    total_steps: Count,
    pace: Pace = "competence",
    first: OpenShare = 0.01,
    power: Positive = 2.0,
    width: Positive = 0.2,
    target: Share = 0.5,
    rate: NonNegative = 0.0,
) -> Selection:
    """Prompts up to a growing difficulty, or around one.

        competence   uniform over d <= competence(step)
        gaussian     P ~ exp(-(d - aim)^2 / (2 width^2)), aim = step / total_steps; with a `rate` instead
                     aim <- clip(aim + rate (mean(correct) - target), 0, 1) after each step, which keeps success near
                     the target

    d in (0, 1] is the rank of the prompt's difficulty divided by the number of prompts; equal difficulties share their
    lowest rank. While the competence is below the smallest d, the easiest prompts are drawn.

    Args:
      records: records of the data, one per item; filled from the run.
      difficulty: column of the records, larger for harder prompts.
      total_steps: steps over which the difficulty grows; filled from the run.
      pace: rule, as above.
      first, power: as in `competence`.
      width: standard deviation of the Gaussian.
      target: intended success rate.
      rate: step size of aim; 0 lets aim grow with the steps.

    Returns:
      A `Selection`.

    Raises:
      ValueError: for an unknown pace, a column that records do not have, or a number out of range.

    Reference: competence-based curriculum learning.
    Certainty: recalled
    """
    if pace not in get_args(Pace):
        raise ValueError(f"pace is {pace!r}; it must be one of {', '.join(get_args(Pace))}")
    values = np.asarray(column(records, difficulty, f"difficulty is {difficulty}"), np.float64)
    ids = record_ids(records)
    rank = np.searchsorted(np.sort(values), values, side="left")
    hardness = jnp.asarray((rank + 1) / len(values), jnp.float32)

    def init() -> Pacing:
        return Pacing(jnp.int32(1), jnp.float32(0.0), jnp.zeros(len(ids), jnp.int32))

    def choose(memory: Pacing, key: Array, count: int) -> Int[Array, "N"]:
        if pace == "competence":
            reached = competence(memory.steps, total_steps=total_steps, first=first, power=power)
            wanted = hardness <= jnp.maximum(reached, hardness.min())
            return items_by_turns(jnp.ones(count, jnp.int32), wanted.astype(jnp.int32), memory.visits, key, ids, 2)
        aim = memory.aim if rate > 0 else jnp.minimum(memory.steps / total_steps, 1.0)
        distance = jnp.square(hardness - aim)
        return items_by_weight(jnp.exp((distance.min() - distance) / (2.0 * width**2)), key, count, ids)

    def update(memory: Pacing, item: Int[Array, "B"], correct: Float[Array, "B"], weight: Float[Array, "B"]) -> Pacing:
        chex.assert_equal_shape([item, correct, weight])
        mean, met = means_of(correct, jnp.zeros_like(item), weight, 1)
        moved = jnp.clip(memory.aim + rate * (mean[0] - target), 0.0, 1.0)
        return Pacing(memory.steps + 1, jnp.where(met[0], moved, memory.aim), visited(memory.visits, item, weight))

    def report(memory: Pacing) -> dict[str, Array]:
        reached = competence(memory.steps, total_steps=total_steps, first=first, power=power)
        over_time = reached if pace == "competence" else jnp.minimum(memory.steps / total_steps, 1.0)
        return {"difficulty": memory.aim if pace == "gaussian" and rate > 0 else over_time}

    return Selection(init, choose, update, report)
