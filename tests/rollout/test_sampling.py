"""Draws follow the distribution, never leave its support, and have an address of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.rollout import row_keys, sampled_tokens

DRAWS = 20_000
PROBABILITIES = np.array([0.0, 0.30, 0.02, 0.18, 0.0, 0.40, 0.09, 0.01, 0.0])
with np.errstate(divide="ignore"):
    LOG_PROBABILITIES = jnp.asarray(np.log(PROBABILITIES), jnp.float32)
POSSIBLE = PROBABILITIES > 0
# 99.9% quantiles of chi-square with 5 and with 25 degrees of freedom.
QUANTILE = {5: 20.5, 25: 52.6}


def chi_square(counts, expected):
    return float(np.sum((counts - expected) ** 2 / expected))


def rows_of(distribution, rows):
    return jnp.broadcast_to(distribution, (rows, distribution.shape[-1]))


def draws(prompt_id, sample, position, step=0):
    """Tokens of rows that differ in one part of their address."""
    rows = max(np.size(prompt_id), np.size(sample))
    full = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.int32), (rows,))  # noqa: E731
    keys = row_keys(jax.random.key(7), step, full(prompt_id), full(sample))
    return np.asarray(sampled_tokens(rows_of(LOG_PROBABILITIES, rows), keys, position, False))


@pytest.mark.parametrize("varies", ["prompt", "sample", "position", "step"])
def test_frequencies_match_the_distribution_along_every_part_of_the_address(varies):
    count = jnp.arange(DRAWS)
    if varies == "prompt":
        tokens = draws(count, 3, 5)
    elif varies == "sample":
        tokens = draws(11, count, 5)
    elif varies == "position":
        keys = row_keys(jax.random.key(7), 0, jnp.array([11]), jnp.array([3]))
        one = lambda position: sampled_tokens(LOG_PROBABILITIES[None], keys, position, False)[0]  # noqa: E731
        tokens = np.asarray(jax.jit(jax.vmap(one))(count))
    else:
        one = lambda step: row_keys(jax.random.key(7), step, jnp.array([11]), jnp.array([3]))[0]  # noqa: E731
        keys = jax.jit(jax.vmap(one))(count)
        tokens = np.asarray(sampled_tokens(rows_of(LOG_PROBABILITIES, DRAWS), keys, 5, False))
    counts = np.bincount(tokens, minlength=len(PROBABILITIES))
    assert not counts[~POSSIBLE].any()
    assert chi_square(counts[POSSIBLE], DRAWS * PROBABILITIES[POSSIBLE]) < QUANTILE[5]


def test_neighbouring_addresses_draw_independently():
    ids = jnp.arange(DRAWS)
    first = draws(ids, 0, 0)
    for second in (draws(ids, 1, 0), draws(ids, 0, 1), draws(ids, 0, 0, step=1)):
        joint = np.zeros((9, 9))
        np.add.at(joint, (first, second), 1)
        joint = joint[POSSIBLE][:, POSSIBLE]
        rows, columns = joint.sum(1, keepdims=True), joint.sum(0, keepdims=True)
        assert chi_square(joint, rows * columns / DRAWS) < QUANTILE[25]


@pytest.mark.parametrize(
    "uniform, token", [(0.0, 1), (0.2999, 1), (0.3001, 2), (0.5001, 5), (0.9899, 6), (1 - 2**-23, 7)]
)
def test_the_uniform_number_decides_even_at_its_extremes(monkeypatch, uniform, token):
    monkeypatch.setattr(jax.random, "uniform", lambda key: jnp.float32(uniform))
    assert draws(0, 0, 0).tolist() == [token]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-23])
def test_a_large_vocabulary_keeps_to_its_support_at_the_extremes(monkeypatch, uniform):
    monkeypatch.setattr(jax.random, "uniform", lambda key: jnp.float32(uniform))
    vocabulary = 50_021
    scores = np.random.default_rng(0).standard_normal((4, vocabulary)).astype(np.float32)
    scores[:, :9], scores[:, -9:] = -np.inf, -np.inf
    scores[1], scores[1, 77] = -np.inf, 0.0
    log_p = jax.nn.log_softmax(jnp.asarray(scores))
    keys = row_keys(jax.random.key(0), 0, jnp.arange(4), jnp.arange(4))
    tokens = np.asarray(sampled_tokens(log_p, keys, 0, False))
    assert np.isfinite(scores[np.arange(4), tokens]).all()
    assert tokens[1] == 77


def test_greedy_takes_the_likeliest_and_is_chosen_row_by_row():
    keys = row_keys(jax.random.key(0), 0, jnp.arange(200), jnp.zeros(200, jnp.int32))
    log_p = rows_of(LOG_PROBABILITIES, 200)
    sampled = np.asarray(sampled_tokens(log_p, keys, 0, False))
    greedy = jnp.arange(200) % 2 == 0
    mixed = np.asarray(sampled_tokens(log_p, keys, 0, greedy))
    np.testing.assert_array_equal(mixed[::2], 5)
    np.testing.assert_array_equal(mixed[1::2], sampled[1::2])
    np.testing.assert_array_equal(sampled_tokens(log_p, keys, 0, True), 5)
    assert len(set(sampled[::2].tolist())) > 2


def test_keys_are_distinct_and_do_not_depend_on_other_rows():
    grid = np.stack(np.meshgrid(np.arange(5), np.arange(6), np.arange(7), indexing="ij"), -1).reshape(-1, 3)
    key = jax.random.key(0)
    seen = set()
    for step in range(5):
        part = grid[grid[:, 0] == step]
        keys = jax.random.key_data(row_keys(key, step, jnp.asarray(part[:, 1]), jnp.asarray(part[:, 2])))
        alone = jax.random.key_data(row_keys(key, step, jnp.asarray(part[-1:, 1]), jnp.asarray(part[-1:, 2])))
        np.testing.assert_array_equal(alone[0], keys[-1])
        seen |= {tuple(k) for k in np.asarray(keys).tolist()}
    assert len(seen) == len(grid)
