"""Rewards on arrays: the worked example of each card, and laws of all of them.

All run in one program on eight rows; the rows after the example are absent. It runs on one device, with the rows in
reverse order, with NaN in the absent rows, and in a separate process on eight devices.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrl_llm
from jaxrl_llm import advantages, rewards
from jaxrl_llm.parallel import make_mesh

ROWS = 8
NAN = float("nan")


def named(function, *names, **hyper):
    """A record with columns of these names."""
    return partial(function, reward_names=names, **hyper)


def remembered(made, *batches):
    """The result of a method on its data after updates with these batches."""

    def last(**data):
        memory = made.init()
        for batch in batches:
            _, memory = made.update(memory, *(jnp.asarray(part) for part in batch))
        return made.update(memory, **data)[0]

    return last


def of_turns(**hyper):
    """VeRPO's two parts on episodes with one token per turn."""

    def both(test_passes, correct, mask, group, weight):
        turn = jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape)
        r = rewards.weighted_tests(test_passes, group, weight)
        return advantages.outcome_and_turn_centred(r, correct, turn, mask, group, weight, **hyper)

    return both


def observed(rewards_, correct, length, group, weight):
    shaped = rewards.shortest_right_bonus(rewards_, correct, length, group, weight)
    found = advantages.group_normalized(shaped, group, weight, eps=1e-9)
    return advantages.solve_rate_weighted(found[:, None], correct, group, weight)[:, 0]


def quantities(**hyper):
    return {name: np.asarray(value) for name, value in hyper.items()}


PASSES = [[[1.0, 0], [1, 1]], [[1, 0], [NAN, NAN]]]
STEPS = {"turn_rewards": [[0.9, 0.4, 0.6, 0.2]], "turn": [[0, 1, 2, 3]], "mask": [[1.0] * 4]}
PAR = {"rewards": [2.0, -1], "reference_rewards": [[1.0, 0], [0, 0.5]]}
SCORES = [[1.0, 0.5, 0], [0.2, 0.4, 0.3]]
HEADS = ("a", "b", "c")
SIMILAR = {"quality": [0.8, 0.78, 0.7]}
LEVELS = {"step_match": [[1.0, 0]], "stated_confidence": [[1.0, 0.75]], "internal_confidence": [[0.75, 0.25]]}
LENGTHS = {"correct": [1.0, 1, 0, 0], "length": [25, 100, 25, 150]}

# name: (function, data of the example, expected). Data that are not rows are scalars.
EXAMPLES = {
    # rewards of turns
    "sotopia-rl": (
        partial(rewards.attributed_turns, highest=(10.0, 5.0, 8.0), lowest=(0.0, 0.0, 0.0), scale=10.0),
        {"contributions": [[[1.0, 0, 1], [1 / 3, 2 / 3, 0]]], "correct": [[8.0, 3, 6]]},
        [[5.166667, 2.222222]],
    ),
    "sotopia-rl, one dimension": (
        partial(rewards.attributed_turns, unrated=-1.0),
        {"contributions": [[1.0, 0, 1 / 3, NAN]], "correct": [0.7]},
        [[0.7, 0, 0.233333, -1]],
    ),
    "sotopia-rl, shares": (
        partial(rewards.attributed_turns, form="share"),
        {"contributions": [[1.0, 0, 3], [0, 0, 0]], "correct": [1.0, 1]},
        [[0.25, 0, 0.75], [0, 0, 0]],
    ),
    "calm": (
        partial(rewards.subgoal_rewards, coefficient=0.5),
        {"hits": [[[1.0, 0], [1, 1], [0, 0]]], "turn_rewards": [[0.0, 0, 1]]},
        [[0.5, 0.5, 1]],
    ),
    "calm, again and again": (
        partial(rewards.subgoal_rewards, coefficient=0.5, once=False),
        {"hits": [[[1.0, 0], [1, 1], [0, NAN]]], "turn_rewards": [[0.0, 0, 1]]},
        [[0.5, 1, 1]],
    ),
    "vlm-rm": (
        rewards.projected_similarity,
        {"embedding": [[0.6, 0.8], [0, 0]], "goal_embedding": [[1.0, 0]] * 2, "baseline_embedding": [[0.0, 1], [2, 0]]},
        [0.63, NAN],
    ),
    "vlm-rm, cosine": (
        partial(rewards.projected_similarity, alpha=0.0),
        {"embedding": [[3.0, 4]], "goal_embedding": [[1.0, 0]], "baseline_embedding": [[0.0, 1]]},
        [0.6],
    ),
    # combination
    "a column": (
        named(rewards.reward_column, "x", "y", column="y"),
        {"reward_components": [[1.0, 2], [3, NAN]]},
        [2, NAN],
    ),
    "g-ra": (
        named(rewards.gated_sum, *HEADS, order=HEADS, thresholds=(0.0, 0.3)),
        {"reward_components": [[1.0, 0.6, 0.5], [0, 0.6, 0.5], [1, 0.2, 0.5], [1, NAN, 0.5], [NAN, NAN, NAN]]},
        [2.1, 0, 1.2, 1.5, NAN],
    ),
    "p-grpo": (
        named(rewards.outcome_gated_sum, "f", "o", "t", outcome="o", plain={"f": 1.0, "o": 1.0}, gated={"t": 1.0}),
        {"reward_components": [[1.0, 1, 0.7], [1, 0, 0.9], [0, 1, 0.5], [1, 1, NAN], [1, NAN, 1], [NAN, NAN, NAN]]},
        [2.7, 1, 1.5, 2, 1, NAN],
    ),
    "videorft": (
        named(rewards.outcome_gated_sum, "a", "s", outcome="a", plain={}, gated={"s": 2.0}, gate="positive", limit=1.0),
        {"reward_components": [[1.0, 0.3], [0.5, 0.7], [0, 0.4], [1, -3]]},
        [0.6, 1, 0, 0],
    ),
    "r1-reward": (
        named(rewards.outcome_gated_sum, "a", "f", "c", outcome="a", plain={"a": 1.0, "f": 0.5}, gated={"c": 0.5}),
        {"reward_components": [[1.0, 1, 1], [0, 1, 1], [1, 0, 0]]},
        [2, 0.5, 1],
    ),
    "sophia-trust": (
        named(rewards.trusted_sum, "o", "t", outcome="o", thinking="t"),
        {"reward_components": [[1.0, 0.5], [1, 0.7], [0, 0.9], [0, 0.8]], **quantities(step=100)},
        [1.095644, 1.133902, 0.17216, 0.153031],
    ),
    "sophia-trust, all right": (
        named(rewards.trusted_sum, "o", "t", outcome="o", thinking="t"),
        {"reward_components": [[1.0, 0.5], [1, NAN]], **quantities(step=0)},
        [1, 1],
    ),
    "crm": (
        partial(rewards.concise_correctness, total_steps=4),
        {"correct": [1.0, 1, 0], "conciseness": [0.9, 0.2, 0.9], "difficulty": [0.25] * 3, **quantities(step=2)},
        [1.3375, 1.075, 0],
    ),
    "crm, share of right answers": (
        partial(rewards.concise_correctness, total_steps=4),
        {"correct": [1.0, 1, 0, 0], "conciseness": [0.9, NAN, 0.9, 1], **quantities(step=9)},
        [1.675, 1, 0, 0],
    ),
    "crm, conciseness of lengths": (
        partial(rewards.length_conciseness, max_completion_tokens=40),
        {"length": [0, 20, 40, 90]},
        [1, 0.55, 0.1, 0.1],
    ),
    "weighted-sum, clipped": (
        named(
            rewards.floored_sum,
            *HEADS,
            weights=dict(zip(HEADS, (1.0, 0.5, 0.2), strict=True)),
            floors=dict(zip(HEADS, (-1.0, -0.5, -0.2), strict=True)),
            least=-1.0,
            most=1.0,
        ),
        {"reward_components": [[1.0, -3, 0.5], [0.2, -0.1, -9], [NAN, NAN, 0.5], [NAN, NAN, NAN]]},
        [0.85, 0.11, 0.1, NAN],
    ),
    "job-reward": (
        named(rewards.floored_sum, "b", "p", weights={"b": 1.0, "p": 1.0}, floors={"p": -0.5}, least=-1.0, most=1.0),
        {"reward_components": [[1.0, -10], [0.2, 0]]},
        [0.5, 0.2],
    ),
    "annealed": (
        named(
            rewards.annealed_sum, "a", "b", first={"a": 1.0}, last={"a": 1.0, "b": 2.0}, total_steps=12, hold_steps=2
        ),
        {"reward_components": [[1.0, 1], [1, NAN], [NAN, 1], [NAN, NAN]], **quantities(step=7)},
        [2, 1, 1, NAN],
    ),
    **{
        f"rm-ensemble, {form}": (
            named(rewards.ensemble_score, *HEADS, heads=HEADS, form=form, coefficient=0.5, **more),
            {"reward_components": SCORES},
            expected,
        )
        for form, more, expected in [
            ("mean", {}, [0.5, 0.3]),
            ("least", {}, [0, 0.2]),
            ("variance", {}, [0.375, 0.295]),
            ("deviation", {}, [0.25, 0.25]),
            ("variance", {"ddof": 0}, [0.416667, 0.296667]),
        ]
    },
    "rm-ensemble, median with an outlier and a head that does not apply": (
        named(rewards.ensemble_score, *HEADS, heads=HEADS, form="median"),
        {"reward_components": [[1.0, 0.5, -9], [0.2, NAN, 0.3], [NAN] * 3]},
        [0.5, 0.25, NAN],
    ),
    "reward-robust": (
        partial(rewards.robust_score, alpha=0.3),
        {
            "reward_scores": np.concatenate(
                [[[1.0, 0.5, 0], [0.2, 0.4, 0.3]], np.log([[0.3, 0.2, 0.9], [0.1, 0.5, 0.4]])], axis=1
            ).tolist()
        },
        [0.15, 0.2],
    ),
    # shaping
    "cosine-length": (
        partial(rewards.cosine_length, max_completion_tokens=100),
        LENGTHS,
        [0.926777, 0.5, -0.926777, -0.5],
    ),
    "cosine-length, exceeded": (
        partial(rewards.cosine_length, max_completion_tokens=100, exceeded=-2.0),
        {"correct": [1.0, 1, NAN], "length": [100, 0, 5]},
        [-2, 1, NAN],
    ),
    "repetition": (
        partial(rewards.repetition_penalty, ngram=3),
        {"tokens": [[1, 2, 3, 1, 2, 3, 1, 2], [1, 2, 3, 4, 9, 9, 9, 9], [5] * 8, [5] * 8], "length": [8, 4, 8, 2]},
        [-0.5, 0, -5 / 6, 0],
    ),
    "l1, exact": (
        rewards.target_length,
        {"correct": [1.0, 0], "length": [900, 1500], "budget": [1000.0] * 2},
        [0.97, -0.15],
    ),
    "l1, most": (
        partial(rewards.target_length, form="most"),
        {"correct": [1.0, 1, 1], "length": [900, 1500, 4000], "budget": [1000.0] * 3},
        [0.53, 0.35, 0],
    ),
    "l1, released": (
        partial(rewards.target_length, form="released"),
        {"correct": [1.0, 1, NAN], "length": [900, 9000, 1], "budget": [1000.0] * 3},
        [0.515, 0, NAN],
    ),
    "videorft, band": (
        partial(rewards.length_band_bonus, least_tokens=320, most_tokens=512),
        {"rewards": [1.0, 1, 0], "correct": [1.0, 1, 0], "length": [400, 200, 400]},
        [1.2, 1, 0],
    ),
    "observe-r1": (
        rewards.shortest_right_bonus,
        {"rewards": [1.5, 1.5, 0.5, 0], "correct": [1.0, 1, 0, 0], "length": [150, 300, 90, 80]},
        [1.7, 1.5, 0.5, 0],
    ),
    "observe-r1, advantages": (
        lambda rewards, **data: observed(rewards, **data),
        {"rewards": [1.5, 1.5, 0.5, 0], "correct": [1.0, 1, 0, 0], "length": [150, 300, 90, 80]},
        [1.722572, 1.278038, -0.944636, -2.055973],
    ),
    "observe-r1, nobody right": (
        rewards.shortest_right_bonus,
        {"rewards": [0.5, 0], "correct": [0.0, 0], "length": [150, 300]},
        [0.5, 0],
    ),
    **{
        f"par, {form}": (partial(rewards.reference_bounded, form=form), PAR, expected)
        for form, expected in [
            ("sigmoid", [0.805928, 0.225683]),
            ("centered", [1.5, -1.25]),
            ("tanh", [0.862811, -0.833371]),
            ("arctan", [0.946273, -0.884096]),
            ("shifted", [0.194072, 0.014487]),
            ("polynomial", [0.800938, 0.235305]),
            ("log_sigmoid", [-0.38141, -1.797602]),
        ]
    },
    "par, uncentred": (rewards.reference_bounded, {"rewards": [2.0, -1, NAN]}, [0.880797, 0.268941, NAN]),
    "par, one reference": (
        rewards.reference_bounded,
        {"rewards": [2.0, 2, 2], "reference_rewards": [2.0, 1, NAN]},
        [0.5, 0.731059, NAN],
    ),
    "medgrpo": (
        rewards.percentile_bounded,
        {
            "rewards": [0.2, 0.5, 0.9, NAN, 9],
            "low": [0.3] * 4 + [0.5],
            "middle": [0.5] * 5,
            "high": [0.7] * 4 + [0.5],
        },
        [0.095349, 0.5, 0.952574, NAN, 1],
    ),
    "tests of an answer": (
        rewards.answer_token_tests,
        {
            "tokens": [[5, 98, 20, 21, 6, 2], [5, 20, 6, 2, 0, 0], [5, 20, 21, 9, 9, 9], [2] * 6],
            "length": [6, 4, 6, 1],
            "answer_tokens": [[20, 22, 0], [20, 21, 22], [20, 21, 0], [20, 0, 0]],
            "answer_length": [2, 3, 2, 1],
        },
        [[1, 0, NAN], [1, 0, 0], [0, 0, NAN], [0, NAN, NAN]],
    ),
    "whiten": (rewards.whitened_rewards, {"rewards": [1.0, 2, 4]}, [-0.872872, -0.218218, 1.091089]),
    "whiten, not centred": (
        partial(rewards.whitened_rewards, center=False),
        {"rewards": [1.0, 2, 4]},
        [0.654654, 1.309307, 2.618615],
    ),
    "whiten, mean kept": (
        partial(rewards.whitened_rewards, keep_mean=True),
        {"rewards": [1.0, 2, 4, NAN]},
        [1.460462, 2.115115, 3.424423, NAN],
    ),
    "clip": (rewards.clipped_rewards, {"rewards": [11.0, -11, 3, NAN]}, [10, -10, 3, NAN]),
    "running, first": (remembered(rewards.running_normalized()), {"rewards": [1.0, 3]}, [-1, 1]),
    "running, second": (
        remembered(rewards.running_normalized(), ([1.0, 3], [1.0, 1])),
        {"rewards": [2.0, 6, NAN]},
        [-0.534522, 1.603567, NAN],
    ),
    "running, bounded": (
        remembered(rewards.running_normalized(limit=1.0), ([1.0, 3], [1.0, 1])),
        {"rewards": [2.0, 6]},
        [-0.534522, 1],
    ),
    "running, equal": (remembered(rewards.running_normalized()), {"rewards": [3.0, 3]}, [0, 0]),
    "armed": (
        remembered(rewards.sharpened_scores(memory=4), ([0.7, 0.74, 0.76, 0.8], [1.0] * 4)),
        SIMILAR,
        [0.731059, 0.645656, 0.268941],
    ),
    "armed, the oldest is forgotten": (
        remembered(
            rewards.sharpened_scores(memory=4), ([9.0, 9, 9], [1.0] * 3), ([0.7, 0.74, 0.76, 0.8, 5], [1.0] * 4 + [0])
        ),
        SIMILAR,
        [0.731059, 0.645656, 0.268941],
    ),
    "armed, nothing remembered": (
        remembered(rewards.sharpened_scores()),
        {"quality": [0.5, 0.5, NAN]},
        [0.5, 0.5, NAN],
    ),
    "armed, stretched": (rewards.stretched_scores, SIMILAR, [0.98, 0.798, 0.07]),
    "armed, nothing to stretch": (rewards.stretched_scores, {"quality": [0.7, 0.7, NAN]}, [0.7, 0.7, NAN]),
    "noisy-rpr, flip": (
        partial(rewards.flipped_rewards, share=0.5, seed=0),
        {"rewards": [0.0, 1, 1, 1, NAN], "prompt_id": [2, 2, 1, 4, 2]},
        [1, 0, 1, 1, NAN],
    ),
    "noisy-rpr, calibration": (
        rewards.pattern_calibrated,
        {"rewards": [0.2, 0.7, 0.2, 0.49, NAN], "patterns": [0.5, 0.5, NAN, 9, 1]},
        [0.25, 0.7, 0.2, 1, NAN],
    ),
    "rlcr": (
        rewards.calibrated_correctness,
        {"correct": [1.0, 0, 1, 1], "confidence": [0.8, 0.8, 0.1, 1.7]},
        [0.96, -0.64, 0.19, -1],
    ),
    "rlcr, recipe": (
        partial(
            rewards.calibrated_correctness, format_weight=0.5, accuracy_weight=0.5, calibration_weight=0.5, offset=1.0
        ),
        {"correct": [1.0, 0, 1, 1], "confidence": [0.8, 0.8, 0.1, 1.7]},
        [1.48, 0.68, 1.095, 0],
    ),
    "brier": (
        rewards.proper_score,
        {"correct": [1.0, 0, 0, 1, 0], "confidence": [0.8, 0.8, 0.1, NAN, 1.7]},
        [-0.04, -0.64, -0.01, -1, -1],
    ),
    "log score": (
        partial(rewards.proper_score, rule="log"),
        {"correct": [1.0, 0, 0, 1], "confidence": [0.8, 0.8, 1, NAN]},
        [-0.223144, -1.609438, -9.21034, -9.21034],
    ),
    "mmboundary": (rewards.step_calibration, LEVELS, [1.75]),
    "mmboundary, squared": (partial(rewards.step_calibration, deviation="squared"), LEVELS, [2.0625]),
    "mmboundary, whole answers": (
        rewards.step_calibration,
        {"step_match": [1.0, 1, NAN], "stated_confidence": [0.5, NAN, 1], "internal_confidence": [0.5, 1, 1]},
        [2.5, 1, NAN],
    ),
    "mean probability": (
        partial(rewards.sequence_likelihood, form="mean_probability"),
        {"old_logprobs": [[-1.0, -2, 9], [NAN, NAN, NAN]], "mask": [[1.0, 1, 0], [0, 0, 0]]},
        [0.22313, 1],
    ),
    # steps and turns
    **{
        f"clip-delta, {label}": (
            partial(rewards.clipped_delta, **hyper),
            STEPS,
            [expected],
        )
        for label, hyper, expected in [
            ("clip", {"delta": "none"}, [0, -0.1, 0, -0.3]),
            ("drop", {"threshold": None}, [0.5, -0.2, 0.6, 0]),
            ("both", {}, [0.1, -0.1, 0, 0]),
            ("keep", {"threshold": None, "delta": "keep"}, [0.5, -0.2, 0.4, 0.2]),
        ]
    },
    "clip-delta, short, with the outcome": (
        partial(rewards.clipped_delta, threshold=None),
        {
            "turn_rewards": [[0.9, 0.4, 7, NAN], [0.9, 1, 1, 1], [1.0] * 4],
            "turn": [[0, 0, 1, 2], [0] * 4, [0] * 4],
            "mask": [[1.0, 1, 1, 0], [1] * 4, [0] * 4],
            "rewards": [1.0, NAN, 1],
        },
        [[0.9, 1, 0, 0], [0] * 4, [0] * 4],
    ),
    "pbrs": (
        partial(rewards.potential_shaped, gamma=0.9),
        {
            "potentials": [[0.1, 0.4, 0.7, 0.9], [0.5, NAN, 1, 1]],
            "turn": [[0, 1, 2], [0, 0, 0]],
            "mask": [[1.0] * 3, [1, 0, 0]],
            "rewards": [1.0, 1],
        },
        [[0.26, 0.23, 0.3], [0.5, 0, 0]],
    ),
    "pbrs, rewards of turns": (
        partial(rewards.potential_shaped, gamma=0.9),
        {
            "potentials": [[0.1, 0.4, 0.7, 0.9]],
            "turn": [[0, 1, 2]],
            "mask": [[1.0] * 3],
            "rewards": [5.0],
            "turn_rewards": [[0.0, 0, 1]],
        },
        [[0.26, 0.23, 0.3]],
    ),
    "pbrs, progress": (rewards.accumulated_potentials, {"turn_rewards": [[1.0, 0, 1]]}, [[0, 1, 1, 2]]),
    "blended": (rewards.blended_rewards, {"rewards": [1.0, 0, NAN], "quality": [0.731059, NAN, 1]}, [0.865529, 0, NAN]),
    "turns": (rewards.turn_count, {"turns": [3, 0]}, [3, 0]),
    "verpo, tests": (
        rewards.weighted_tests,
        {"test_passes": PASSES},
        [[0.366462, 1.080234], [0.366462, 0]],
    ),
    "verpo, single turns": (
        rewards.weighted_tests,
        {"test_passes": [[1.0, NAN, 0], [0, NAN, 0]]},
        [0.581003, 0],
    ),
    "verpo, copies count once": (
        rewards.weighted_tests,
        {"test_passes": [[1.0] * 5 + [0], [1] * 5 + [1]]},
        [0.364675, 0.861959],
    ),
    "verpo": (
        of_turns(),
        {"test_passes": PASSES, "correct": [1.0, 0], "mask": [[1.0, 1], [1, 0]]},
        [[0.167076, 0.880847], [-0.642924, 0]],
    ),
}


def filled(data: dict, fill: float) -> dict:
    """The data of an example, followed by absent rows in separate groups."""
    rows = {name: np.asarray(value) for name, value in data.items()}
    count = max(len(value) for value in rows.values() if value.ndim)
    absent = {
        name: np.full((ROWS - count, *value.shape[1:]), fill if value.dtype.kind == "f" else 1, value.dtype)
        for name, value in rows.items()
        if value.ndim
    }
    whole = {name: np.concatenate([value, absent[name]]) if value.ndim else value for name, value in rows.items()}
    weight = np.arange(ROWS) < count
    return whole | {"group": np.where(weight, 0, 7), "weight": weight.astype(np.float32)}


def wanted(name: str, data: dict) -> dict:
    """The arguments of a function, with floats in float32."""
    function = EXAMPLES[name][0]
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__wrapped__", function)
    takes = function.__code__.co_varnames[: function.__code__.co_argcount]
    everything = bool(function.__code__.co_flags & 8)
    method = everything and "made" in function.__code__.co_freevars
    keep = lambda key: key in takes or (everything and (key != "group" or not method))  # noqa: E731
    cast = {"f": np.float32, "i": np.int32}
    return {key: value.astype(cast[value.dtype.kind]) for key, value in data.items() if keep(key)}


def inputs(fill: float = 0.0, reverse: bool = False) -> dict[str, dict]:
    found = {name: wanted(name, filled(data, fill)) for name, (_, data, _) in EXAMPLES.items()}
    turned = lambda value: value[::-1] if reverse and value.ndim else value  # noqa: E731
    return jax.tree.map(turned, found)


@jax.jit
def program(data):
    return {name: EXAMPLES[name][0](**given) for name, given in data.items()}


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """All of them on eight devices, in a concurrent process."""
    path = tmp_path_factory.mktemp("cards") / "eight.npz"
    root = str(Path(jaxrl_llm.__file__).parent.parent)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run(
        [sys.executable, __file__, str(path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(path) as found:
        return dict(found)


@pytest.fixture(scope="module")
def one():
    return jax.device_get(program(inputs()))


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_worked_example(name, one):
    expected = np.asarray(EXAMPLES[name][2])
    np.testing.assert_allclose(one[name][: len(expected)], expected, atol=2e-6, rtol=2e-6)


def test_absent_rows_change_nothing_whatever_they_hold(one):
    poisoned = jax.device_get(program(inputs(NAN)))
    for name, (_, _, expected) in EXAMPLES.items():
        np.testing.assert_array_equal(poisoned[name][: len(expected)], one[name][: len(expected)], err_msg=name)


def test_the_order_of_rows_does_not_matter(one):
    reversed_rows = jax.device_get(program(inputs(reverse=True)))
    for name, value in one.items():
        np.testing.assert_allclose(reversed_rows[name][::-1], value, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_eight_devices_find_the_same(one, eight):
    assert eight.keys() == one.keys()
    for name, value in one.items():
        np.testing.assert_allclose(eight[name], value, atol=1e-6, rtol=1e-6, err_msg=name)


STEP = jnp.ones((1, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: rewards.reward_column(jnp.ones((2, 2)), column="z", reward_names=("x", "y")),
            "'z'.*none of the rewards x, y",
        ),
        (lambda: rewards.reward_column(jnp.ones((2, 2)), column="x", reward_names=("x", "x")), "'x'.*2 of the rewards"),
        (lambda: rewards.reward_column(jnp.ones((2, 2)), column="x", reward_names=("x",)), "2 reward components"),
        (
            lambda: rewards.gated_sum(
                jnp.ones((2, 2)), order=("x", "y"), reward_names=("x", "y"), thresholds=(1.0, 2.0)
            ),
            "order names 2 rewards, but there are 2 thresholds",
        ),
        (
            lambda: rewards.floored_sum(jnp.ones((2, 1)), weights={"x": 1.0}, reward_names=("x",), floors={"y": 0.0}),
            "floors names 'y'",
        ),
        (
            lambda: rewards.robust_score(jnp.ones((2, 3))),
            r"shape \(2, 3\); K Gaussian heads are 2K outputs",
        ),
        (
            lambda: rewards.annealed_sum(
                jnp.ones((2, 1)), jnp.int32(0), first={}, last={}, total_steps=3, hold_steps=3, reward_names=("x",)
            ),
            "hold_steps is 3.*below total_steps",
        ),
        (lambda: rewards.clipped_rewards(jnp.ones(2), least=1.0, most=0.0), r"least is 1\.0"),
        (lambda: rewards.whitened_rewards(jnp.ones(2), jnp.ones(2), center=False, keep_mean=True), "keep_mean is true"),
        (lambda: rewards.reference_bounded(jnp.ones(2), form="relu"), "form is 'relu'.*sigmoid"),
        (lambda: rewards.proper_score(jnp.ones(2), jnp.ones(2), rule="linear"), "rule is 'linear'"),
        (lambda: rewards.target_length(jnp.ones(2), jnp.ones(2), jnp.ones(2), form="min"), "form is 'min'"),
        (lambda: rewards.clipped_delta(*[jnp.ones((1, 2))] * 3, delta="add"), "delta is 'add'"),
        (
            lambda: rewards.potential_shaped(*[jnp.ones((1, 2))] * 3, jnp.ones(1), STEP),
            "2 columns for 2 turns",
        ),
        (
            lambda: rewards.cosine_length(jnp.ones(2), jnp.ones(2), max_completion_tokens=0),
            "max_completion_tokens is 0",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


if __name__ == "__main__":
    spread = jax.sharding.NamedSharding(make_mesh(8), jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(make_mesh(8), jax.sharding.PartitionSpec())
    laid = jax.tree.map(lambda value: jax.device_put(value, spread if value.ndim else whole), inputs())
    np.savez(sys.argv[1], **jax.device_get(program(laid)))
