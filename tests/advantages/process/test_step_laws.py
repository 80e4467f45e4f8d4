"""What holds of the whole family of step and turn credit: padding, observations, rows without a step, borders moved
where nothing is paid, the order of rows, and eight devices."""

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
from jaxrl_llm.signatures import signature

ROWS, TOKENS, STEPS = 8, 6, 5


def to_go(token_rewards, mask):
    """The sum of what stands at a token and behind it."""
    return advantages.generalized_advantages(token_rewards, jnp.zeros_like(token_rewards), mask, gamma=1.0, lam=1.0)[0]


def summed(turn_rewards, turn, mask):
    return to_go(rewards.turn_end_rewards(turn_rewards, turn, mask), mask)


def spans(turn_rewards, turn, mask):
    return to_go(rewards.added_span_rewards(turn_rewards, turn, mask, scale=0.6), mask)


def potentials(turn_rewards, turn, mask, rewards_):
    phi = rewards.accumulated_potentials(turn_rewards)
    return summed(rewards.potential_shaped(phi, turn, mask, rewards_, turn_rewards), turn, mask)


def differences(turn_rewards, turn, mask):
    return summed(rewards.clipped_delta(turn_rewards, turn, mask), turn, mask)


def attributed(turn_rewards, turn, mask):
    return summed(rewards.progress_attribution(turn_rewards, turn, mask, beta=0.0), turn, mask)


def labels(turn_rewards, turn, mask):
    return jnp.nan_to_num(rewards.labels_at_ends(turn_rewards, turn, mask), nan=-1.0) * (mask > 0)


def values(turn_rewards, old_values, turn, mask, weight):
    return advantages.turn_advantages(turn_rewards, old_values, turn, mask, weight)[0]


def durations(turn_rewards, turn, mask, weight):
    return rewards.duration_weights(jnp.abs(turn_rewards), mask, weight, turn)


def transitions(advantages_, tokens, turn, source, length, mask, group, weight):
    state, action = rewards.transition_ids(tokens, turn, source, length, max_turns=STEPS + 1, history=1)
    return advantages.merged_transitions(advantages_, state, action, turn, mask, group, weight)


def thoughts(correct, turn_rewards, turn, mask, group, weight):
    return advantages.judged_thoughts(correct, turn_rewards, turn, mask, group, weight)


def gained(turn_rewards, correct, turn, mask, group, weight):
    return advantages.step_value_gains(turn_rewards, correct, turn, mask, group, weight)


FAMILY = {
    "sum": summed,
    "spans": spans,
    "potentials": potentials,
    "differences": differences,
    "attributed progress": attributed,
    "labels": labels,
    "values": values,
    "durations": durations,
    "transitions": transitions,
    "thoughts": thoughts,
    "gains of continuations": gained,
    "information": advantages.information_gain,
    "tree": advantages.tree_advantages,
    "least": advantages.min_form_returns,
    "least, baseline": advantages.min_form_advantages,
    "own turn": advantages.turn_leave_one_out,
    "mixed": partial(advantages.turn_mixed_normalized, gamma=0.9),
    "outcome and turn": advantages.outcome_and_turn_centred,
}
# What is paid is added up, whatever the steps: the others compare steps, or take the worst.
ADDED_UP = ("sum", "spans", "potentials", "attributed progress")
# Observations are states here, and parts of what samples share.
SEES_OBSERVATIONS = ("transitions", "tree")


def batch():
    rng = np.random.default_rng(3)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    turn = np.array([[0, 0, 1, 1, 2, 3]] * 3 + [[0] * 6] * 2 + [[0, 1, 1, 1, 1, 2]] * 3)
    mask = np.ones((ROWS, TOKENS), np.float32)
    mask[2, 4:] = 0  # cut off in its third step
    mask[7] = 0  # nothing was written
    return {
        "turn_rewards": normal(ROWS, STEPS),
        "turn_answer_logprobs": -np.abs(normal(ROWS, STEPS + 1)),
        "rewards": normal(ROWS),
        "rewards_": normal(ROWS),
        "advantages_": normal(ROWS),
        "correct": np.array([1, 0, 1, 1, 0, 0, 1, 0], np.float32),
        "old_values": normal(ROWS, TOKENS),
        "tokens": rng.integers(3, 5, (ROWS, TOKENS)),
        "source": np.where(mask > 0, 1, 0),
        "length": mask.sum(1).astype(np.int64),
        "turn": turn,
        "mask": mask,
        "group": np.array([0, 0, 0, 3, 3, 5, 5, 5]),
        "weight": np.array([1, 1, 1, 1, 1, 1, 0, 1], np.float32),
    }


BATCH = batch()
OF_TOKENS = {"old_values", "tokens", "source", "turn", "mask"}


def padded(data):
    """Two more tokens behind the last, and room for one more step."""
    more = {name: np.pad(data[name], ((0, 0), (0, 2)), mode="edge") for name in OF_TOKENS}
    more["mask"][:, TOKENS:], more["source"][:, TOKENS:] = 0, 0
    room = {name: np.pad(data[name], ((0, 0), (0, 1))) for name in ("turn_rewards", "turn_answer_logprobs")}
    return data | more | room


def observed(data):
    """Something that answers stands behind the second token."""
    more = {name: np.insert(data[name], 2, data[name][:, 1], axis=1) for name in OF_TOKENS}
    more["mask"][:, 2], more["source"][:, 2] = 0, 3
    return data | more | {"length": data["length"] + 1}


def divided(data):
    """Step 1 becomes two, of which the first is paid nothing."""
    turn = data["turn"] + (data["turn"] > 1)
    turn[:, 3] += data["turn"][:, 3] == 1
    turn[5:, 3:5] = np.where(data["turn"][5:, 3:5] == 1, 2, turn[5:, 3:5])
    paid = np.insert(data["turn_rewards"], 1, 0.0, axis=1)[:, :-1]  # the last step is nobody's
    return data | {"turn": turn, "turn_rewards": paid}


@jax.jit
def program(data):
    found = {}
    for name, function in FAMILY.items():
        of = function.func if isinstance(function, partial) else function
        names = [one for one in signature(of).required if one in data]
        found[name] = function(**{one: data[one] for one in names})
    return found


def found(data):
    return jax.device_get(program(jax.tree.map(jnp.asarray, data)))


@pytest.fixture(scope="module")
def whole():
    return found(BATCH)


def test_padding_and_observations_change_nothing(whole):
    larger = found(observed(padded(BATCH)))
    for name, ours in whole.items():
        assert not larger[name][:, [2, -2, -1]].any(), name
        if name not in SEES_OBSERVATIONS:
            np.testing.assert_allclose(np.delete(larger[name], 2, axis=1)[:, :TOKENS], ours, atol=1e-5, err_msg=name)


def test_rows_without_a_step_or_weight_get_nothing_and_the_rest_is_finite(whole):
    unweighted = ("sum", "spans", "potentials", "differences", "attributed progress", "labels")
    for name, ours in whole.items():
        assert np.isfinite(ours).all(), name
        assert not ours[7].any(), name
        assert not ours[2, 4:].any(), name
        assert name in unweighted or not ours[6].any(), name
        assert ours[:6].any(), name


def test_a_border_where_nothing_is_paid_changes_nothing_of_what_is_added_up(whole):
    moved = found(divided(BATCH))
    for name in ADDED_UP:
        np.testing.assert_allclose(moved[name], whole[name], atol=1e-5, err_msg=name)


def test_the_order_of_rows_does_not_matter(whole):
    turned = found({name: value[::-1].copy() for name, value in BATCH.items()})
    for name, ours in whole.items():
        np.testing.assert_allclose(turned[name][::-1], ours, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_eight_devices_find_the_same(whole, tmp_path):
    path, root = tmp_path / "eight.npz", str(Path(jaxrl_llm.__file__).parent.parent)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run(
        [sys.executable, __file__, str(path)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(path) as eight:
        assert set(eight) == set(whole)
        for name, ours in whole.items():
            np.testing.assert_allclose(eight[name], ours, atol=1e-5, err_msg=name)


if __name__ == "__main__":
    spread = jax.sharding.NamedSharding(make_mesh(8), jax.sharding.PartitionSpec("data"))
    np.savez(sys.argv[1], **jax.device_get(program({name: jax.device_put(x, spread) for name, x in BATCH.items()})))
